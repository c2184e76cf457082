"""Forward of Qwen2-VL's vision encoder: untouched, with STA, and with the published arithmetic.

Cases: clips of 4 to 256 frames at an equal number of tokens; short clips of few tokens, as they come one by one; and a
packed batch of eight clips of different length and size against the eight one by one.
"""

from __future__ import annotations

from pathlib import Path

import click
from common import Report, benchmark_options, set_threads
from towers import FULL_DEPTH, dtype_of, forward, inputs, scaled_clips, tower, unequal_clips, with_sta


@click.command()
@benchmark_options
@click.option("--depth", type=int, help="Blocks. [default: 4 on the CPU, 32 on a GPU]")
@click.option(
    "--part", type=click.Choice(["forward", "lengths", "short", "packed", "all"]), default="all", show_default=True
)
@click.option("--tokens", type=int, help="Patches of a clip. [default: 2048 on the CPU, 16384 on a GPU]")
def main(
    device: str, repeats: int, threads: int | None, out: Path, depth: int | None, part: str, tokens: int | None
) -> None:
    """Measure the encoder's forward."""
    set_threads(threads)
    big = device == "cuda"
    untouched = tower(depth or (FULL_DEPTH if big else 4), device, dtype_of(device))
    models = {"untouched": untouched, "STA": with_sta(untouched)}
    if part != "lengths":
        models["as published"] = with_sta(untouched, like_published=True)
    tokens = tokens or (16384 if big else 2048)
    if part in ("forward", "all"):
        measure_lengths("forward", [16 if big else 8], models, device, repeats, out, tokens)
    if part in ("lengths", "all"):
        measure_lengths("lengths", [4, 16, 32, 64, 256], models, device, repeats, out, tokens)
    if part in ("short", "all"):
        measure_short(models, device, repeats, out)
    if part in ("packed", "all"):
        measure_packed(models, device, repeats, out, 8 if big else 2 if tokens > 256 else 1)


def measure_lengths(
    name: str, lengths: list[int], models: dict, device: str, repeats: int, out: Path, tokens: int
) -> None:
    """Clips of these lengths, at an equal number of tokens; then the longest in turn with 32 frames."""
    untouched, dtype = models["untouched"], str(dtype_of(device))
    title = f"Forward of Qwen2-VL's encoder, {len(untouched.blocks)} blocks, {dtype}, {tokens} patches in all"
    report = Report(name, title, device, out, settings={"tokens": tokens, "dtype": dtype})
    arguments = {length: inputs(scaled_clips(length, tokens), untouched) for length in lengths}
    for length in lengths:
        calls = {n: lambda m=model, a=arguments[length]: forward(m, a) for n, model in models.items()}
        report.measure(f"T = {length}", calls, repeats=repeats)
    if 32 in arguments:
        calls = {f"STA, T = {t}": lambda a=arguments[t]: forward(models["STA"], a) for t in (32, max(lengths))}
        report.measure("long against short", calls, repeats=repeats)
    report.finish()


def measure_short(models: dict, device: str, repeats: int, out: Path) -> None:
    """One small clip at a time, where the launches count for as much as the arithmetic."""
    untouched = models["untouched"]
    title = f"Forward of one short clip, encoder of {len(untouched.blocks)} blocks, {dtype_of(device)}"
    report = Report("short", title, device, out)
    for clip in ((2, 8, 8), (4, 8, 8), (4, 16, 16), (8, 16, 16)):
        arguments = inputs([clip], untouched)
        calls = {n: lambda m=model, a=arguments: forward(m, a) for n, model in models.items()}
        report.measure(f"clip {'x'.join(map(str, clip))}", calls, repeats=repeats)
    report.finish()


def measure_packed(models: dict, device: str, repeats: int, out: Path, scale: int) -> None:
    """Eight unequal clips at once, against the same clips one by one."""
    clips = unequal_clips(scale)
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
