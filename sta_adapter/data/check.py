"""Look for everything in a file of samples, or in tar shards, that would be a bad sample in training.

Samples are read, decoded, encoded and put into batches exactly as training does it, several at a time.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch.utils.data import DataLoader, Dataset

from sta_adapter.compatibility.processors import Processor
from sta_adapter.data.bad_sample import BadSample
from sta_adapter.data.chat_encoding import Loaded, encode
from sta_adapter.data.collator import Collator
from sta_adapter.data.conversation import Sample
from sta_adapter.data.dataset import VideoDataset
from sta_adapter.data.sample_encoder import DECODE_TIMEOUT
from sta_adapter.data.samples import scan_samples
from sta_adapter.data.shards import is_shards
from sta_adapter.data.visual_processing import Encoded
from sta_adapter.data.worker_process import worker_errors
from sta_adapter.video.frame_settings import FrameSettings

ENDLESS = 10**7  # tokenizers without a limit of their own give a larger number


@dataclass
class DataReport:
    """What a check found; a problem has a `source`, a `kind` (record, missing, unreadable, length, batch) and a `reason`."""

    problems: list[dict[str, str]] = field(default_factory=list)
    samples: int = 0  # bad ones included
    categories: dict[str, int] = field(default_factory=dict)  # how many samples each has
    seconds: list[float] = field(default_factory=list)  # of each clip
    frames: list[int] = field(default_factory=list)  # of each clip that the model gets
    tokens: list[int] = field(default_factory=list)  # of each sample, where a processor was given

    def to_dict(self) -> dict[str, object]:
        """Plain values: the problems, counts, and least, median and largest of each length."""
        lengths: dict[str, Sequence[float]] = {
            "clip_seconds": self.seconds,
            "clip_frames": self.frames,
            "tokens": self.tokens,
        }
        return {
            "samples": self.samples,
            "bad": len(self.problems),
            "problems": self.problems,
            "categories": self.categories,
            **{name: spread(values) for name, values in lengths.items() if values},
        }


def check_data(
    path: str | Path,
    *,
    processor: Processor | None = None,
    format: str | None = None,
    videos: str | Path | None = None,
    frames: FrameSettings | None = None,
    max_length: int | None = None,
    batch_size: int = 4,
    num_workers: int = 2,
    decode_timeout: float | None = DECODE_TIMEOUT,
    progress: bool = False,
) -> DataReport:
    """Check a file of samples, or tar shards: `path`, `format` and `videos` are those of `read_samples`.

    With a `processor`, of the model to train, samples are also counted in tokens and put into batches of `batch_size`;
    `max_length` None takes the tokenizer's limit. `num_workers` processes decode, `decode_timeout` seconds a sample at most.

    Raises:
        DataError: the file can't be read at all.
    """
    items = scan_samples(path, format=format, videos=videos)
    limit = max_length
    if processor is not None and limit is None and processor.tokenizer.model_max_length < ENDLESS:
        limit = processor.tokenizer.model_max_length
    good = [item for item in items if isinstance(item, Sample)]
    given = cast("Processor", processor)  # None decodes alone
    dataset = VideoDataset(good, given, frames=frames, decode_timeout=decode_timeout)
    report = DataReport(
        problems=[
            _problem(item, "unreadable" if is_shards(item.source) else "record")
            for item in items
            if isinstance(item, BadSample)
        ],
        samples=len(items),
        categories=dict(Counter(sample.category for sample in good if sample.category is not None).most_common()),
    )
    for finding in _findings(_Findings(dataset, limit), batch_size, num_workers, progress):
        report.problems += finding.problems
        report.seconds += finding.seconds
        report.frames += finding.frames
        report.tokens += finding.tokens
    return report


def _findings(findings: _Findings, batch_size: int, num_workers: int, progress: bool) -> list[DataReport]:
    """What is found in each sample, in their order; they are mixed for it as training mixes them."""
    order = torch.randperm(len(findings), generator=torch.Generator().manual_seed(0)).tolist()
    loader: Iterable[list[DataReport]] = DataLoader(
        findings, batch_size, sampler=order, num_workers=num_workers, collate_fn=findings.batched
    )
    if progress:
        from tqdm.auto import tqdm

        loader = tqdm(loader, desc="check", unit="batch", dynamic_ncols=True)
    with worker_errors():
        found = [report for batch in loader for report in batch]
    return [report for _, report in sorted(zip(order, found, strict=True), key=lambda pair: pair[0])]


class _Findings(Dataset[tuple[DataReport, Encoded | None]]):
    """What is found in each sample, and what training would encode of it."""

    def __init__(self, dataset: VideoDataset, limit: int | None) -> None:
        self.dataset = dataset
        self.limit = limit
        self.collate = None if dataset.processor is None else Collator.of(dataset.processor)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[DataReport, Encoded | None]:
        sample, found = self.dataset.samples[index], DataReport()
        try:
            visuals = self.dataset.encoder.visuals(sample.messages, index)
        except BaseException as error:
            kind = "missing" if isinstance(error, FileNotFoundError) else "unreadable"
            return DataReport([_problem(BadSample.of(sample.source, error), kind)]), None
        clips = [v.metadata for group in visuals for v in group if v.kind == "video" and v.metadata]
        found.seconds = [float(clip["duration"]) for clip in clips]
        found.frames = [len(set(clip["frames_indices"])) for clip in clips]
        try:
            if not sample.answer or self.dataset.processor is None:
                return found, None
            encoded = encode(self.dataset.processor, sample.messages, visuals)
        except BaseException as error:
            found.problems = [_problem(BadSample.of(sample.source, error), "record")]
            return found, None
        length = len(encoded["input_ids"])
        if self.limit is not None and length > self.limit:
            reason = f"{length} tokens, more than the {self.limit} allowed; take fewer or smaller frames."
            found.problems = [_problem(BadSample(sample.source, reason), "length")]
            return found, None
        found.tokens = [length]
        return found, Loaded.of(encoded, sample.source)

    def batched(self, found: Sequence[tuple[DataReport, Encoded | None]]) -> list[DataReport]:
        """Make a batch of what was encoded, as training does; only what is said of it goes on."""
        whole = [(report, encoded) for report, encoded in found if encoded is not None]
        if self.collate is not None:
            items = self.collate.sort_out([encoded for _, encoded in whole])
            for (report, _), item in zip(whole, items, strict=True):
                if isinstance(item, BadSample):
                    report.problems.append(_problem(item, "batch"))
            self.collate(items)
        return [report for report, _ in found]


def _problem(bad: BadSample, kind: str) -> dict[str, str]:
    return {"source": bad.source, "kind": kind, "reason": bad.reason}


def spread(values: Sequence[float]) -> dict[str, float]:
    """The ends of a list of numbers, and its middle."""
    return {"least": min(values), "median": statistics.median(values), "largest": max(values)}
