"""A training step of Qwen2-VL's vision encoder, forward and backward, with what it keeps in memory.

- "STA": only STA trains. Its baseline is the untouched encoder, frozen, with gradients to its patch embedding: the
  backward goes through all blocks, as it must for STA in the first one.
- "LoRA + STA": LoRA on the encoder's attention and MLP as well. Its baseline is the untouched encoder with that LoRA.
- "checkpointed": both with activation checkpointing of the encoder's blocks.

Memory is, on a GPU, the peak that torch allocated in the step; on the CPU, the bytes of all tensors that the forward
keeps for its backward (each storage once, parameters left out), which is what sets the peak.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from common import Report, benchmark_options, set_threads
from torch import nn
from towers import FULL_DEPTH, dtype_of, inputs, kept_bytes, scaled_clips, sta_parameters, tower, with_lora, with_sta

KINDS = ("STA", "LoRA + STA", "checkpointed")


def trainable(model: Any, *, lora: bool, checkpointed: bool) -> nn.Module:
    """Freeze the base, let STA (and LoRA) train, and a gradient reach the first block."""
    model.requires_grad_(False)
    if lora:
        with_lora(model)
    for parameter in sta_parameters(model):
        parameter.requires_grad_(True)
    model.patch_embed.requires_grad_(True)
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def step(model: nn.Module, arguments: dict[str, torch.Tensor]) -> Callable[[], None]:
    """Forward and backward."""
    weight: list[torch.Tensor] = []

    def run() -> None:
        out = model(**arguments)[0]
        if not weight:
            weight.append(torch.randn_like(out))
        out.backward(weight[0])
        model.zero_grad(set_to_none=True)

    return run


def memory(model: nn.Module, arguments: dict[str, torch.Tensor], device: str) -> float:
    """Bytes, as the module's documentation says."""
    if device == "cpu":
        return float(kept_bytes(model, arguments))
    run = step(model, arguments)
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated() - sum(p.nbytes for p in model.parameters())
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return float(torch.cuda.max_memory_allocated() - before)


@click.command()
@benchmark_options
@click.option("--depth", type=int, help="Blocks. [default: 4 on the CPU, 32 on a GPU]")
@click.option("--frames", type=int, help="Of the clip. [default: 8 on the CPU, 16 on a GPU]")
@click.option("--tokens", type=int, help="Patches of the clip. [default: 2048 on the CPU, 16384 on a GPU]")
@click.option("--kinds", default=",".join(KINDS), show_default=True, help="What trains.")
@click.option("--time/--no-time", "timed", default=True, help="Measure the time as well as the memory.")
def main(
    device: str,
    repeats: int,
    threads: int | None,
    out: Path,
    depth: int | None,
    frames: int | None,
    tokens: int | None,
    kinds: str,
    timed: bool,
) -> None:
    """Measure training steps and what they keep."""
    set_threads(threads)
    dtype, big = dtype_of(device), device == "cuda"
    clips = scaled_clips(frames or (16 if big else 8), tokens or (16384 if big else 2048))
    size = f"{depth or (FULL_DEPTH if big else 4)} blocks, {dtype}, clip {'x'.join(map(str, clips[0]))}"
    settings = {"clips": clips, "dtype": str(dtype)}
    label = "memory / untouched encoder"
    for kind in kinds.split(","):
        base = tower(depth or (FULL_DEPTH if big else 4), device, dtype)
        models = {
            "untouched": base,
            "STA": with_sta(base),
            "STA, recomputed": with_sta(base, recompute=True),
            "as published": with_sta(base, like_published=True),
        }
        arguments = inputs(clips, base)
        for model in models.values():
            trainable(model, lora="LoRA" in kind, checkpointed=kind == "checkpointed")
        name = kind.lower().replace(" + sta", "")
        label = "memory / untouched encoder"
        title = f"Memory of a training step ({kind}), {size}"
        kept = Report(f"memory-{name}", title, device, out, "MiB", settings, None, label)
        kept.add(kind, {n: [memory(m, arguments, device) / 2**20] for n, m in models.items()})
        kept.finish()
        if timed:
            title = f"Training step ({kind}) of Qwen2-VL's encoder, {size}"
            times = Report(f"step-{name}", title, device, out, settings=settings)
            times.measure(kind, {n: step(m, arguments) for n, m in models.items()}, repeats=repeats)
            times.finish()


if __name__ == "__main__":
    main()
