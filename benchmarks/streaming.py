"""Time of one frame in a stream, from frame 8 to frame 10,000, beside the untouched encoder on the same single frame.

A stream is brought to a frame by loading a state that says so, with random keys and values of the window; the frame
that is measured, and those after it, are computed as always.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch
from common import Report, benchmark_options, set_threads
from towers import FULL_DEPTH, dtype_of, forward, inputs, scaled_clips, tower, with_sta

FRAMES = (8, 64, 1000, 10_000)


@click.command()
@benchmark_options
@click.option("--depth", type=int, help="Blocks. [default: 4 on the CPU, 32 on a GPU]")
@click.option("--window", type=click.IntRange(min=2), default=64, show_default=True, help="Frames looked back to.")
@click.option("--patches", type=int, help="Of a frame. [default: 256 on the CPU, 1024 on a GPU]")
def main(
    device: str, repeats: int, threads: int | None, out: Path, depth: int | None, window: int, patches: int | None
) -> None:
    """Measure a frame's time in a stream."""
    from sta_adapter import get_sta

    set_threads(threads)
    big = device == "cuda"
    patches = patches or (1024 if big else 256)
    untouched = tower(depth or (FULL_DEPTH if big else 4), device, dtype_of(device))
    streaming = with_sta(untouched, causal=True, window=window)
    handle = get_sta(streaming)
    stream = handle.stream()
    frame = inputs(scaled_clips(1, patches), untouched)
    dtype = str(dtype_of(device))
    size = f"{len(untouched.blocks)} blocks, {dtype}, {patches} patches a frame, window {window}"
    settings = {"dtype": dtype, "window": window, "patches": patches}
    report = Report("streaming", f"A frame in a stream: Qwen2-VL's encoder, {size}", device, out, settings=settings)

    def step() -> torch.Tensor:
        with stream:
            return forward(streaming, frame)

    for count in FRAMES:
        stream.reset()
        step()
        state = stream.state_dict()
        kept = min(count - 1, window - 1)
        like = next(iter(state["blocks"].values()))
        shape = (2, like.shape[1], kept, *like.shape[3:])
        state["blocks"] = {i: torch.randn(shape, dtype=like.dtype, device=like.device) for i in state["blocks"]}
        stream.load_state_dict({**state, "frames": count - 1})
        calls = {"untouched": lambda: forward(untouched, frame), "STA": step}
        report.measure(f"frame {count:,}", calls, repeats=repeats)
        report.settings[f"MiB kept at frame {count}"] = stream.bytes / 2**20
    report.finish()


if __name__ == "__main__":
    main()
