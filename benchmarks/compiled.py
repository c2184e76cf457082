"""torch.compile on the encoder's forward: untouched and with STA, plain and compiled, each in turn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch
from common import Report, benchmark_options, set_threads
from towers import FULL_DEPTH, dtype_of, forward, inputs, scaled_clips, tower, with_sta


@click.command()
@benchmark_options
@click.option("--depth", type=int, help="Blocks. [default: 2 on the CPU, 32 on a GPU]")
@click.option("--frames", type=int, help="Of the clip. [default: 8 on the CPU, 16 on a GPU]")
@click.option("--tokens", type=int, help="Patches of the clip. [default: 1024 on the CPU, 16384 on a GPU]")
def main(
    device: str,
    repeats: int,
    threads: int | None,
    out: Path,
    depth: int | None,
    frames: int | None,
    tokens: int | None,
) -> None:
    """Measure the compiled encoder's forward."""
    set_threads(threads)
    big = device == "cuda"
    untouched = tower(depth or (FULL_DEPTH if big else 2), device, dtype_of(device))
    with_branch = with_sta(untouched)
    clips = scaled_clips(frames or (16 if big else 8), tokens or (16384 if big else 1024))
    title = f"torch.compile, {len(untouched.blocks)} blocks, {dtype_of(device)}, clip {'x'.join(map(str, clips[0]))}"
    report = Report("compiled", title, device, out, settings={"clips": clips})
    arguments = inputs(clips, untouched)
    for case, prepare in (("plain", lambda m: m), ("compiled", compile_model)):
        models: dict[str, Any] = {"untouched": prepare(untouched), "STA": prepare(with_branch)}
        calls = {name: lambda m=model: forward(m, arguments) for name, model in models.items()}
        report.measure(case, calls, repeats=repeats, warmup=2)
    report.finish()


def compile_model(model: Any) -> Any:
    """The compiled model; each part between graph breaks is compiled on its first calls."""
    return torch.compile(model)


if __name__ == "__main__":
    main()
