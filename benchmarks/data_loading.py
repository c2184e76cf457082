"""Loading clips for training, against plain decord reads of the same frames by as many worker processes.

    python benchmarks/data_loading.py

Each round reads the clips of a few files through a `DataLoader` with new workers. The variants of a case take turns:
- decord: `VideoReader(path).get_batch(indices)`, where the clips have the size that the model takes; else it resizes as well;
- clips: `VideoDataset` up to the processor, with its frame table, time sampling, resizing and the process that may be killed;
- samples: the same with the model's processor and tokenizer, so that the difference to clips is the processor's cost;
- cached: samples of which all are in a `cache` on disk (in the system's page cache, as they were written just before).
Values are clips a second, by the clock and by a worker's CPU time; the ratio is to decord, more is better.
"""

from __future__ import annotations

import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from common import Report, benchmark_options, set_threads, use_checkout

use_checkout()

import torch  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402

from sta_adapter.data import (  # noqa: E402
    FrameSettings,
    Sample,
    VideoDataset,
)
from sta_adapter.video import Sampling, choose_frames  # noqa: E402
from sta_adapter.video.frame_table import read_frame_table  # noqa: E402
from sta_adapter.video.resize import fit_frames  # noqa: E402

# seconds, frames a second, height and width of the files; frames taken; whether they are resized
CASES = {
    "4 s, 8 frames": (4, 12, 224, 336, 8, False),
    "4 s, 8 frames, resized": (4, 12, 240, 426, 8, True),
    "10 s, 16 frames": (10, 30, 336, 560, 16, False),
}


FILES = 6
NOISE = 4
VARIANTS = ("decord", "clips")  # that read the same frames


class Function(Dataset):
    """Items made by a function of their number."""

    def __init__(self, make: Callable[[int], Any], count: int) -> None:
        self.make, self.count = make, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return self.make(index)


def write_clips(folder: Path, count: int, seconds: int, rate: int, height: int, width: int) -> list[Path]:
    """H.264 files of a moving picture with noise, about as large as real ones: 100 KB for 4 s (Something-Something v2: 90)."""
    from sta_adapter.video import write_clip

    made = []
    for number in range(count):
        generator = np.random.default_rng(number)
        coarse = generator.integers(NOISE, 255 - NOISE, (height // 8, width // 8, 3))
        picture = np.kron(coarse, np.ones((8, 8, 1), int))
        still = np.zeros((height, width, 3), int)
        still[: picture.shape[0], : picture.shape[1]] = picture
        moved = (np.roll(still, (step, 2 * step), (0, 1)) for step in range(seconds * rate))
        frames = [np.clip(one + generator.integers(-NOISE, NOISE + 1, one.shape), 0, 255) for one in moved]
        made.append(write_clip(folder / f"{number}.mp4", np.stack(frames).astype(np.uint8), rate))
    return made


def plain(
    paths: Sequence[Path], indices: Sequence[list[int]], size: tuple[int, int] | None, index: int
) -> torch.Tensor:
    """What one would write without this package."""
    import decord

    scaled = {} if size is None else {"height": size[0], "width": size[1]}
    reader = decord.VideoReader(str(paths[index]), **scaled)
    return torch.from_numpy(reader.get_batch(indices[index]).asnumpy())


def clips(dataset: VideoDataset, index: int) -> torch.Tensor:
    """The decoded frames of a sample, as they go to the processor."""
    return torch.from_numpy(dataset.encoder.visuals(dataset.samples[index].prompt, index)[0][0].pixels)


def sample(path: Path) -> Sample:
    """A question about a clip."""
    user = [{"type": "video", "video": str(path)}, {"type": "text", "text": "Which way?"}]
    return Sample(
        [{"role": "user", "content": user}, {"role": "assistant", "content": [{"type": "text", "text": "up"}]}]
    )


def throughput(items: Callable[[int], Any], count: int, workers: int) -> float:
    """Clips a second of one round, from the first request to the last clip; starting the workers is left out."""
    loader = DataLoader(Function(items, count), batch_size=None, num_workers=workers, persistent_workers=False)
    iterator = iter(loader)
    next(iterator)
    begun = time.perf_counter()
    taken = sum(1 for _ in iterator)
    return taken / (time.perf_counter() - begun)


def check_same_frames(variants: dict[str, Callable[[int], Any]], resized: bool) -> None:
    """Stop if the variants that are compared don't read the same frames."""
    one, other = (
        next(iter(DataLoader(Function(variants[key], 1), batch_size=None, num_workers=1))) for key in VARIANTS
    )
    if one.shape != other.shape or not (resized or torch.equal(one, other)):
        raise click.ClickException(f"the frames differ: {tuple(one.shape)} and {tuple(other.shape)}")


def measure(report: Report, name: str, folder: Path, options: dict[str, Any], processor: Any) -> None:
    """All variants of a case, in turn."""
    *shape, frames, resized = CASES[name]
    count = options["clips"]
    paths = write_clips(folder, FILES, *shape) * math.ceil(count / FILES)
    settings = FrameSettings(nframes=frames, max_tokens=256)
    dataset = VideoDataset([sample(path) for path in paths], processor, frames=settings)
    # decord in this process would hang those that are forked from it
    tables = [read_frame_table(path) for path in paths[:FILES]] * math.ceil(count / FILES)
    sampling = Sampling(None, frames, 1, frames, None, None)
    indices = [choose_frames(table.times, table.duration, sampling).tolist() for table in tables]
    size = fit_frames(np.zeros((1, *shape[2:], 3), np.uint8), factor=28, min_pixels=0, max_pixels=256 * 28**2).shape[
        1:3
    ]
    variants = {
        "decord": partial(plain, paths, indices, size if resized else None),
        "clips": partial(clips, dataset),
        "samples": dataset.__getitem__,
    }
    cached = VideoDataset([sample(path) for path in paths], processor, frames=settings, cache=folder / "cache")
    variants["cached"] = cached.__getitem__  # its first round, which is not counted, fills the cache
    check_same_frames(variants, resized)
    if options["clock"]:
        measure_by_the_clock(report, name, variants, options)
    here = {"frames": settings, "decode_timeout": None}  # whose CPU time is that of another process otherwise
    samples = VideoDataset(dataset.samples, processor, **here)
    kept = VideoDataset(dataset.samples, processor, cache=folder / "cache", **here)
    variants |= {"clips": partial(clips, samples), "samples": samples.__getitem__, "cached": kept.__getitem__}
    measure_cpu_time(report, name, variants, options["repeats"], ("samples", "cached"))


def measure_by_the_clock(
    report: Report, name: str, variants: dict[str, Callable[[int], Any]], options: dict[str, Any]
) -> None:
    """Clips per second, with as many workers as asked for."""
    workers = options["workers"]
    values: dict[str, list[float]] = {key: [] for key in variants}
    for turn in range(options["repeats"] + 1):
        for key, make in variants.items():
            value = throughput(make, options["clips"], workers)
            if turn:
                values[key].append(value)
    report.add(name, values)
    rates = {key: statistics.median(found) for key, found in values.items()}
    cost = 1000 * workers * (1 / rates["samples"] - 1 / rates["clips"])
    click.echo(f"{name}: the processor takes {cost:.1f} ms of a worker's time for each clip")
    click.echo(f"{name}: from the cache {rates['cached'] / rates['samples']:.1f} times as many samples a second")


def measure_cpu_time(
    report: Report, name: str, variants: dict[str, Callable[[int], Any]], repeats: int, equal: tuple[str, str]
) -> None:
    """Clips per second of a worker's CPU time, whatever else the machine does; what handing them over takes is left out."""
    rounds = Function(partial(cpu_rates, variants, repeats, equal), 1)
    found = next(iter(DataLoader(rounds, batch_size=None, num_workers=1)))
    if not found.pop("equal"):
        raise click.ClickException("a sample from the cache differs from one that was made anew")
    report.add(f"{name}, by CPU time", found)


def cpu_rates(
    variants: dict[str, Callable[[int], Any]], repeats: int, equal: tuple[str, str], _: int
) -> dict[str, Any]:
    """Of each variant, in turn; and whether two of them give the same, bit for bit."""
    one, other = ([variants[key](index) for index in range(FILES)] for key in equal)
    pairs = [(a, b) for a, b in zip(one, other, strict=True)]
    same = all(list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a) for a, b in pairs)
    found: dict[str, list[float]] = {key: [] for key in variants}
    for turn in range(repeats + 1):
        for key, make in variants.items():
            begun = time.process_time()
            for index in range(FILES):
                make(index)
            if turn:
                found[key].append(FILES / (time.process_time() - begun))
    return {**found, "equal": same}


@click.command(help=__doc__)
@benchmark_options
@click.option("--workers", type=click.IntRange(1), default=2, show_default=True)
@click.option("--clips", type=click.IntRange(8), default=120, show_default=True, help="Clips a round.")
@click.option(
    "--clock/--no-clock", default=True, help="Leave out what other work on the machine changes: clips a second."
)
@click.option("--model", help="Whose processor to take. [default: Qwen2-VL's sizes over the demo's tokenizer]")
def main(
    device: str,
    repeats: int,
    threads: int | None,
    out: Path,
    workers: int,
    clips: int,
    clock: bool,
    model: str | None,
) -> None:
    """Measure every case and write the report."""
    set_threads(threads or 1)
    options = {"workers": workers, "clips": clips, "repeats": repeats, "clock": clock}
    report = Report(
        "data-loading",
        f"Loading clips with {workers} workers" if clock else "Loading clips",
        device,
        out,
        unit="clips/s",
        settings=options,
        ratio_label="clips a second / plain decord",
    )
    processor = make_processor(model)
    for name in CASES:
        with tempfile.TemporaryDirectory() as folder:
            measure(report, name, Path(folder), options, processor)
    report.finish()


def make_processor(model: str | None) -> Any:
    """The processor of a model; or the demo's, with the patch sizes of Qwen2-VL."""
    from sta_adapter.demo import TINY_BASE
    from sta_adapter.loading import load_processor

    processor = load_processor(model or TINY_BASE)
    if model is None:
        for part in (processor.image_processor, getattr(processor, "video_processor", None)):
            if part is not None:
                part.patch_size, part.merge_size, part.temporal_patch_size = 14, 2, 2
    return processor


if __name__ == "__main__":
    sys.exit(main())
