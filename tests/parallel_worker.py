"""One of two processes of tests/test_parallel.py: trains a tiny Qwen2-VL, and the same in one process to compare with."""

import sys
from pathlib import Path

import torch
from cases import make_qwen2_vl, qwen2_vl_prompt, randomize, seeded
from torch import distributed

from sta_adapter import get_sta, inject_sta
from sta_adapter.sharding import whole

STEPS = 3


def prompt(step, rank, with_video):
    """A process's training batch of one step, with a clip or of text alone."""
    if with_video:
        batch = qwen2_vl_prompt(2 + step + rank)
    else:
        tokens = torch.tensor([[5, 6, 7, 8, 9 + step]])
        batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return {**batch, "labels": batch["input_ids"]}


def make(lora):
    """A model and its STA; with `lora` as in stage two."""
    model = seeded(make_qwen2_vl).train()
    handle = inject_sta(model)
    for module in handle.blocks.values():
        randomize(module)
    handle.freeze_base()
    if lora:
        from peft import get_peft_model

        torch.manual_seed(0)
        model = get_peft_model(model, handle.lora_config(r=2, lora_alpha=4))
        handle = get_sta(model)
    return model, handle


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def optimise(model, losses):
    """Steps of gradient descent on the losses that a function gives for each step."""
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    for step in range(STEPS):
        losses(step).backward()
        optimizer.step()
        optimizer.zero_grad()


def wrapped(kind, model, handle):
    if kind == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for block in handle.encoder.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def compare(case, out):
    """Train in two processes and in one; a line for process 0 to print. `case` is such as `ddp+lora:1`."""
    name, _, ranks = case.partition(":")
    kind, _, lora = name.partition("+")
    text = [int(r) for r in ranks.split(",") if r]
    rank = distributed.get_rank()
    one, single = make(lora)
    start = [p.detach().clone() for p in trained(one)]
    optimise(one, lambda step: sum(one(**prompt(step, r, r not in text)).loss for r in range(2)) / 2)
    model, handle = make(lora)
    parallel = wrapped(kind, model, handle)
    optimise(parallel, lambda step: parallel(**prompt(step, rank, rank not in text)).loss)
    values = [whole(p).detach() for p in trained(model)]
    both = [torch.zeros_like(torch.cat([v.flatten() for v in values])) for _ in range(2)]
    distributed.all_gather(both, torch.cat([v.flatten() for v in values]))
    moved = all((a - b).abs().max() > 0 for a, b in zip(values, start, strict=True))
    error = max((a - b).abs().max() for a, b in zip(values, trained(one), strict=True))
    handle.save_pretrained(out / case / "two")  # on both processes
    if rank == 0:
        single.save_pretrained(out / case / "one")  # on one process alone
    return f"{case} agree {torch.equal(*both)}, moved {moved}, as one process {bool(error < 1e-5)}"


def run_training(case, out):
    """`sta_adapter.training.train` on the samples in the folder `case` names, whole or spoilt."""
    from tiny_qwen import make_model, make_processor

    from sta_adapter.data import FrameSettings, VideoDataset
    from sta_adapter.training import TrainingConfig, train

    data = out / case.partition("=")[2]
    rank = distributed.get_rank() if distributed.is_initialized() else 0
    processor = make_processor(data / f"tokenizer{rank}")
    frames = FrameSettings(min_tokens=None, max_tokens=None)
    dataset = VideoDataset(data / "data.jsonl", processor, frames=frames, cache=True)
    config = TrainingConfig(
        batch_size=4,
        device_batch_size=1,
        max_steps=3,
        save_steps=2,
        learning_rate=1e-4,
        logging_steps=1,
        max_grad_norm=0.5,
        eval_steps=3,
        keep_best=False,
    )
    model = make_model(processor.tokenizer)
    folder = data / ("two" if distributed.is_initialized() else "one")
    result = train(model, dataset, output_dir=folder, config=config, eval_data=dataset, progress=False)
    return f"{case} steps {[s['steps'] for s in result.stages.values()]}, bad {len(result.bad_samples)}"


def main():
    """Every case that the command line names after the folder, such as `ddp: ddp+lora:1 train=data`."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    out = Path(sys.argv[1])
    for case in sys.argv[2:]:
        line = (run_training if case.startswith("train") else compare)(case, out)
        if distributed.get_rank() == 0:
            print(line, flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
