"""Look for everything in a file of samples, or in tar shards, that would be a bad sample in training.

Public: `check_data(path)` -> `DataReport`. Samples are read and decoded exactly as training does it, several at a time.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset

from sta_adapter.clips import FrameSettings
from sta_adapter.data import DECODE_TIMEOUT, VideoDataset
from sta_adapter.errors import DataError, STAError
from sta_adapter.isolation import worker_errors
from sta_adapter.samples import BadSample, Sample, scan_samples
from sta_adapter.shards import is_shards

ENDLESS = 10**7  # tokenizers without a limit of their own give a larger number


@dataclass
class DataReport:
    """What a check found.

    Attributes:
        problems: each with `source`, `kind` (record, missing, unreadable, length) and `reason`.
        samples: how many there are, bad ones included.
        categories: how many samples each category has.
        seconds: length of each clip.
        frames: how many frames of each clip the model gets.
        tokens: length of each sample, where a processor was given.
    """

    problems: list[dict[str, str]] = field(default_factory=list)
    samples: int = 0
    categories: dict[str, int] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    frames: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values: the problems, counts, and least, median and largest of each length."""
        lengths: dict[str, list[Any]] = {
            "clip_seconds": self.seconds,
            "clip_frames": self.frames,
            "tokens": self.tokens,
        }
        return {
            "samples": self.samples,
            "bad": len(self.problems),
            "problems": self.problems,
            "categories": self.categories,
            **{name: _spread(values) for name, values in lengths.items() if values},
        }


def check_data(
    path: str | Path,
    *,
    processor: Any = None,
    format: str | None = None,
    videos: str | Path | None = None,
    frames: FrameSettings | None = None,
    max_length: int | None = None,
    num_workers: int = 2,
    decode_timeout: float | None = DECODE_TIMEOUT,
    progress: bool = False,
) -> DataReport:
    """Check a file of samples, or tar shards.

    Args:
        path: the file or shards, see `read_samples`; so are `format` and `videos`.
        processor: of the model to train; with it samples are also counted in tokens.
        format: None recognises it.
        videos: where relative paths start.
        frames: how clips are sampled.
        max_length: most tokens of a sample; None takes the tokenizer's limit.
        num_workers: processes that decode.
        decode_timeout: seconds that one sample's clips may take.
        progress: show a bar.

    Raises:
        DataError: the file can't be read at all.
    """
    items = scan_samples(path, format=format, videos=videos)
    limit = max_length
    if processor is not None and limit is None and processor.tokenizer.model_max_length < ENDLESS:
        limit = processor.tokenizer.model_max_length
    good = [item for item in items if isinstance(item, Sample)]
    dataset = VideoDataset(good, processor, frames=frames, decode_timeout=decode_timeout)
    report = DataReport(
        problems=[
            _problem(item, "unreadable" if is_shards(item.source) else "record")
            for item in items
            if isinstance(item, BadSample)
        ],
        samples=len(items),
        categories=dict(Counter(sample.category for sample in good if sample.category is not None).most_common()),
    )
    for finding in _findings(_Findings(dataset, limit), num_workers, progress):
        report.problems += finding.problems
        report.seconds += finding.seconds
        report.frames += finding.frames
        report.tokens += finding.tokens
    return report


def _findings(findings: _Findings, num_workers: int, progress: bool) -> Iterator[DataReport]:
    loader: Any = DataLoader(findings, batch_size=None, num_workers=num_workers)
    if progress:
        from tqdm.auto import tqdm

        loader = tqdm(loader, desc="check", unit="sample", dynamic_ncols=True)
    with worker_errors():
        yield from loader


class _Findings(Dataset):
    """What is found in each sample."""

    def __init__(self, dataset: VideoDataset, limit: int | None) -> None:
        self.dataset = dataset
        self.limit = limit

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> DataReport:
        sample, found = self.dataset.samples[index], DataReport()
        try:
            visuals = self.dataset.visuals(sample.messages, index)
        except (STAError, OSError) as error:
            kind = "missing" if isinstance(error, FileNotFoundError) else "unreadable"
            return DataReport([_problem(BadSample(sample.source, str(error)), kind)])
        clips = [v.metadata for group in visuals for v in group if v.kind == "video" and v.metadata]
        found.seconds = [float(clip["duration"]) for clip in clips]
        found.frames = [len(set(clip["frames_indices"])) for clip in clips]
        try:
            if sample.answer and self.dataset.processor is not None:
                found.tokens = [self._length(sample, visuals)]
        except DataError as error:
            kind = "length" if isinstance(error, _TooLongError) else "record"
            found.problems = [_problem(BadSample(sample.source, str(error)), kind)]
        return found

    def _length(self, sample: Sample, visuals: list[list[Any]]) -> int:
        from sta_adapter.encoding import encode

        length = len(encode(self.dataset.processor, sample.messages, visuals)["input_ids"])
        if self.limit is not None and length > self.limit:
            raise _TooLongError(f"{length} tokens, more than the {self.limit} allowed; take fewer or smaller frames.")
        return length


class _TooLongError(DataError):
    pass


def _problem(bad: BadSample, kind: str) -> dict[str, str]:
    return {"source": bad.source, "kind": kind, "reason": bad.reason.removeprefix(f"{bad.source}: ")}


def _spread(values: list[Any]) -> dict[str, Any]:
    return {"least": min(values), "median": statistics.median(values), "largest": max(values)}
