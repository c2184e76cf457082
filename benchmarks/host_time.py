"""Host time of a block: what Python, torch's dispatcher and autograd cost, where the arithmetic costs next to nothing.

    python benchmarks/host_time.py --threads 1

The encoder is Qwen2-VL's with 32 blocks so narrow, and clips so short, that a call of an operator takes longer than its
arithmetic. On a GPU that is what a short clip, a small batch or a step of generation costs. Values are microseconds a
block: the time of the whole encoder over its number of blocks, on the CPU those that the process had the processor. A
step is forward and backward; "all parameters" trains the encoder as well, "STA alone" has a gradient to the patch
embedding of a frozen encoder, with STA or without.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
from common import Report, benchmark_options, measure_in_turn, set_threads
from torch import nn
from towers import FULL_DEPTH, Clip, forward, inputs, tower, with_sta
from training_step import step, trainable

CLIPS: dict[str, list[Clip]] = {
    "one clip": [(4, 2, 2)],
    "equal clips": [(4, 2, 2)] * 2,
    "unequal clips": [(4, 2, 2), (6, 2, 2)],
}


def all_parameters(model: nn.Module) -> nn.Module:
    """Everything trains."""
    return model.requires_grad_(True).train()


def sta_alone(model: nn.Module) -> nn.Module:
    """STA trains, or nothing does; a gradient reaches the first block."""
    return trainable(model, lora=False, checkpointed=False)


def checkpointed(model: nn.Module) -> nn.Module:
    """As `sta_alone`, with activation checkpointing of the blocks."""
    return trainable(model, lora=False, checkpointed=True)


STEPS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "all parameters": all_parameters,
    "STA alone": sta_alone,
    "STA alone, checkpointed": checkpointed,
}


@click.command(help=__doc__)
@benchmark_options
@click.option("--depth", default=FULL_DEPTH, show_default=True, help="Blocks.")
@click.option("--calls", default=3, show_default=True, help="Calls of each variant in a round; the fastest counts.")
@click.option("--case", "wanted", help="Only cases whose name has this in it.")
def main(device: str, repeats: int, threads: int | None, out: Path, depth: int, calls: int, wanted: str | None) -> None:
    """Measure the forward and the steps."""
    set_threads(threads)
    title = f"Host time of a block, encoder of {depth} blocks of width 64, torch.float32"
    settings = {"clips": CLIPS, "calls": calls, "load_of_the_machine_at_the_start": os.getloadavg()[0]}
    report = Report("host-time", title, device, out, "us", settings)
    base = tower(depth, device, torch.float32, width=64, heads=4)
    models = {"untouched": base, "STA": with_sta(base)}

    def measure(case: str, variants: dict[str, Callable[[], object]]) -> None:
        if wanted is not None and wanted not in case:
            return
        clock = time.process_time if device == "cpu" else time.perf_counter
        rounds = measure_in_turn(variants, repeats=repeats * calls, device=device, warmup=calls, clock=clock)
        best = {n: [min(s[i : i + calls]) for i in range(0, len(s), calls)] for n, s in rounds.items()}
        report.add(case, {n: [1e6 * seconds / depth for seconds in found] for n, found in best.items()})

    for kind, clips in CLIPS.items():
        arguments = inputs(clips, base)
        measure(f"forward, {kind}", {n: lambda m=model, a=arguments: forward(m, a) for n, model in models.items()})
    for what, prepare in STEPS.items():
        prepared = {name: prepare(model) for name, model in models.items()}
        for kind, clips in list(CLIPS.items())[: None if what == "all parameters" else 1]:
            arguments = inputs(clips, base)
            measure(f"step, {what}, {kind}", {n: step(m, arguments) for n, m in prepared.items()})
    report.finish()


if __name__ == "__main__":
    main()
