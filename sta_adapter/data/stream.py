"""Training from tar shards, for data that is larger than a disk or too many files for one.

Each worker of each rank reads shards of its own, in an order that the seed and the pass over the
data decide; a buffer mixes samples of neighbouring shards. So a run that goes on reads its shards again up to where it
stopped, without decoding, and meets the samples that an uninterrupted one would have met.
"""

from __future__ import annotations

import copy
import itertools
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from sta_adapter.compatibility.processors import Processor
from sta_adapter.data.bad_sample import BadSample
from sta_adapter.data.fingerprint import fingerprint, fingerprint_file
from sta_adapter.data.sample_encoder import DECODE_TIMEOUT, SampleEncoder
from sta_adapter.data.samples import check_format
from sta_adapter.data.shard_clips import Packed
from sta_adapter.data.shards import find_shards, read_shard
from sta_adapter.data.visual_processing import Encoded
from sta_adapter.errors import ConfigError, DataError
from sta_adapter.video.frame_settings import FrameSettings

logger = logging.getLogger(__name__)

SHUFFLE_BUFFER = 100
_SHARING = {"processes": "world_size", "workers": "workers", "batch_size": "batch_size"}
"""Who reads what follows from these; checkpoints have the names in front."""


@dataclass(frozen=True)
class WorkerShare:
    """What one worker reads of a stream."""

    reader: int  # its number among all workers of all ranks
    readers: int  # how many there are
    skip: int  # samples of its own that were taken before


@dataclass(frozen=True)
class StreamPosition:
    """Where a rank stands in a stream."""

    rank: int = 0  # of this process
    world_size: int = 1  # how many ranks there are
    workers: int = 0  # that load for each of them
    batch_size: int = 1  # clips that a worker hands over at a time
    seed: int = 0  # of the order
    since: int = 0  # the run's step at which this order began
    skip: int = 0  # batches that earlier runs have taken from it

    def share(self, worker: int, workers: int) -> WorkerShare:
        """What one of a rank's workers reads: they hand over batches in turn, and the one whose turn it was begins."""
        number = (worker + self.skip) % workers
        batches = len(range(number, self.skip, workers))  # of those skipped, this worker's
        return WorkerShare(self.rank * workers + number, self.world_size * workers, batches * self.batch_size)

    def saved(self) -> dict[str, int]:
        """What a checkpoint keeps."""
        sharing = {name: getattr(self, attribute) for name, attribute in _SHARING.items()}
        return {**sharing, "seed": self.seed, "since": self.since}

    def resumed(self, saved: dict[str, int], step: int, accumulation: int) -> StreamPosition:
        """The position after `step` steps of a run that saved its own, each of `accumulation` batches."""
        was, now = ([values[name] for name in _SHARING] for values in (saved, self.saved()))
        if was == now:
            since = saved["since"]
            return replace(self, seed=saved["seed"], since=since, skip=(step - since) * accumulation)
        logger.warning(
            "the shards were read by %d processes with %d workers and batches of %d, now by %d with %d and %d: the weights "
            "are those of the checkpoint, but a new pass over the data begins, in which some clips come again before others "
            "have come once",
            *was,
            *now,
        )
        return replace(self, seed=saved["seed"] + step, since=step)


class StreamDataset(IterableDataset[Encoded | BadSample]):
    """Samples of tar shards, decoded and encoded as they come, pass after pass.

    In a pass every sample comes once, from one worker of one process; a reader with fewer samples begins its next pass
    earlier. Arguments that are not named here are those of `VideoDataset`.

    Args:
        shards: a path, a glob pattern or a brace pattern, see `find_shards`.
        processor: the model's processor.
        format: of the records; None recognises each by its keys.
        shuffle: samples that each reader holds in memory to mix them; 0 for the shards' own order.
        seed: of the order.
        passes: over the data; None never ends.
        cache: a folder that keeps encoded samples on disk, see `sta_adapter.data.sample_cache`.
    """

    def __init__(
        self,
        shards: str | Path,
        processor: Processor,
        *,
        frames: FrameSettings | None = None,
        on_bad_sample: str = "skip",
        max_length: int | None = None,
        decode_timeout: float | None = DECODE_TIMEOUT,
        format: str | None = None,
        shuffle: int = SHUFFLE_BUFFER,
        seed: int = 0,
        passes: int | None = None,
        cache: str | Path | None = None,
    ) -> None:
        check_format(format)
        self.shards = find_shards(shards)
        self.processor = processor
        self.frames = frames or FrameSettings()
        self.encoder = SampleEncoder(
            processor,
            self.frames,
            on_bad_sample=on_bad_sample,
            max_length=max_length,
            decode_timeout=decode_timeout,
            cache=cache,
        )
        self.format = format
        self.shuffle = shuffle
        self.passes = passes
        self.position = StreamPosition(seed=seed)

    def __iter__(self) -> Iterator[Encoded | BadSample]:
        """This worker's samples, from where an earlier run stopped."""
        info = get_worker_info()
        share = self.position.share(0, 1) if info is None else self.position.share(info.id, info.num_workers)
        for packed in itertools.islice(self._packed(share), share.skip, None):
            yield self._load(packed)

    def starting_at(self, position: StreamPosition) -> StreamDataset:
        """A copy that reads from a position on."""
        made = copy.copy(self)
        made.position = position
        return made

    def usable_workers(self, wanted: int, processes: int) -> int:
        """How many workers each process can have, as each needs a shard of its own."""
        if len(self.shards) < processes:
            raise ConfigError(
                f"{len(self.shards)} shards for {processes} processes; each needs one of its own. Write more and smaller "
                "shards, best a multiple of all processes' workers."
            )
        return min(wanted, len(self.shards) // processes)

    def digest(self) -> str:
        """Fingerprint of the shards' names, sizes and ends, and of their order."""
        found = [(path.name, fingerprint_file(path)) for path in self.shards]
        return fingerprint(found, self.format, self.shuffle, self.position.seed)

    def _packed(self, share: WorkerShare) -> Iterator[Packed | BadSample]:
        """One reader's share of every pass, shuffled but not decoded."""
        from webdataset.filters import shuffle

        for turn in itertools.count() if self.passes is None else range(self.passes):
            order = list(self.shards)
            if self.shuffle:
                random.Random(f"{self.position.seed} {turn}").shuffle(order)
            samples = itertools.chain.from_iterable(map(read_shard, order[share.reader :: share.readers]))
            if self.shuffle:
                mixed = shuffle(self.shuffle, initial=self.shuffle, seed=f"{self.position.seed} {turn} {share.reader}")
                samples = mixed(samples)
            yield from samples

    def _load(self, packed: Packed | BadSample) -> Encoded | BadSample:
        if isinstance(packed, BadSample):
            return packed.skipped(self.encoder.on_bad_sample)
        try:
            sample = packed.sample(self.format)
        except DataError as error:
            return BadSample.of(packed.source, error).skipped(self.encoder.on_bad_sample, error)
        return self.encoder.load(sample)


def stream_loader(
    dataset: StreamDataset,
    position: StreamPosition,
    collate: Callable[[Sequence[Encoded | BadSample]], object],
    *,
    pin_memory: bool = False,
) -> DataLoader[Encoded | BadSample]:
    """Batches of a stream; its random numbers are its own, so that a run that goes on draws the same ones elsewhere."""
    return DataLoader(
        dataset.starting_at(position),
        batch_size=position.batch_size,
        num_workers=position.workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        generator=torch.Generator(),
    )
