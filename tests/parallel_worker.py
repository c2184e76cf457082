"""One of two processes of tests/test_parallel.py: trains a tiny Qwen2-VL, the second process without any video."""

import sys

import torch
from cases import make_qwen2_vl, qwen2_vl_prompt, randomize, seeded
from torch import distributed

from sta_adapter import inject_sta


def prompt(step, with_video):
    """A training batch, with a clip or of text alone."""
    if with_video:
        batch = qwen2_vl_prompt(2 + step)
    else:
        tokens = torch.tensor([[5, 6, 7, 8, 9 + step]])
        batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return {**batch, "labels": batch["input_ids"]}


def train(kind, text_ranks):
    """Three steps; a line for process 0 to print."""
    rank = distributed.get_rank()
    model = seeded(make_qwen2_vl).train()
    handle = inject_sta(model)
    for module in handle.blocks.values():
        randomize(module)
    start = [p.detach().clone() for p in handle.freeze_base().parameters()]
    if kind == "ddp":
        model = torch.nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for block in handle.encoder.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(handle.parameters(), lr=0.1)
    for step in range(3):
        model(**prompt(step, rank not in text_ranks)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in handle.parameters()]
    norms = torch.stack([p.detach().double().norm() for p in whole])
    both = [torch.zeros_like(norms) for _ in range(2)]
    distributed.all_gather(both, norms)
    moved = all((a - b).abs().max() > 0 for a, b in zip(whole, start, strict=True))
    return f"{kind} text on {text_ranks}: agree {torch.equal(*both)}, moved {moved}"


def main():
    """Every case that the command line names, such as `ddp: ddp:1`."""
    distributed.init_process_group("gloo")
    for argument in sys.argv[1:]:
        kind, _, ranks = argument.partition(":")
        line = train(kind, [int(r) for r in ranks.split(",") if r])
        if distributed.get_rank() == 0:
            print(line, flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
