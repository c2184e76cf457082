"""Forward of Qwen2-VL's vision encoder: untouched, with STA, and with the published arithmetic.

Cases: clips of 4 to 256 frames at an equal number of tokens, and a packed batch of eight clips of different length and
size against the eight one by one.
"""

from __future__ import annotations

from pathlib import Path

import click
from common import Report, benchmark_options, set_threads
from towers import FULL_DEPTH, dtype_of, forward, inputs, scaled_clips, tower, unequal_clips, with_sta


@click.command()
@benchmark_options
@click.option("--depth", type=int, help="Blocks. [default: 4 on the CPU, 32 on a GPU]")
@click.option("--frames", default="4,8,16,32,64,256", show_default=True, help="Of the clips.")
@click.option("--packed/--no-packed", default=True, help="Measure the packed batch.")
def main(
    device: str, repeats: int, threads: int | None, out: Path, depth: int | None, frames: str, packed: bool
) -> None:
    """Measure the encoder's forward."""
    set_threads(threads)
    dtype = dtype_of(device)
    untouched = tower(depth or (FULL_DEPTH if device == "cuda" else 4), device, dtype)
    models = {
        "untouched": untouched,
        "STA": with_sta(untouched),
        "as published": with_sta(untouched, like_published=True),
    }
    tokens = 16384 if device == "cuda" else 2048
    title = f"Forward of Qwen2-VL's encoder, {len(untouched.blocks)} blocks, {dtype}, {tokens} patches in all"
    report = Report("forward", title, device, out, settings={"tokens": tokens, "dtype": str(dtype)})
    for length in map(int, frames.split(",")):
        arguments = inputs(scaled_clips(length, tokens), untouched)
        calls = {name: lambda m=model, a=arguments: forward(m, a) for name, model in models.items()}
        report.measure(f"T = {length}", calls, repeats=repeats)
    report.finish()
    if packed:
        measure_packed(models, device, repeats, out)


def measure_packed(models: dict, device: str, repeats: int, out: Path) -> None:
    """Eight unequal clips at once, against the same clips one by one."""
    clips = unequal_clips(8 if device == "cuda" else 2)
    title = f"Eight packed clips against the same clips one by one, {sum(t * h * w for t, h, w in clips)} patches"
    report = Report("packed", title, device, out, ratio_label="time / one by one", settings={"clips": clips})
    for name, model in models.items():
        together = inputs(clips, model)
        single = [inputs([clip], model) for clip in clips]
        calls = {
            "one by one": lambda m=model, s=single: [forward(m, a) for a in s],
            "packed": lambda m=model, a=together: forward(m, a),
        }
        report.measure(name, calls, repeats=repeats)
    report.finish()


if __name__ == "__main__":
    main()
