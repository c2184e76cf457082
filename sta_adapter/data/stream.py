"""Training from tar shards, for data that is larger than a disk or too many files for one.

Public: `StreamDataset`, `Place`, `stream_loader`. Each worker of each process reads shards of its own, in an order that the seed and the pass over the
data decide; a buffer mixes samples of neighbouring shards. So a run that goes on reads its shards again up to where it
stopped, without decoding, and meets the samples that an uninterrupted one would have met.
"""

from __future__ import annotations

import copy
import itertools
import logging
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from sta_adapter.data.chat_encoding import Encoded
from sta_adapter.data.clip_reader import FrameSettings
from sta_adapter.data.dataset import DECODE_TIMEOUT, VideoDataset
from sta_adapter.data.fingerprint import fingerprint, fingerprint_file
from sta_adapter.data.samples import BadSample, check_format
from sta_adapter.data.shard_clips import Packed
from sta_adapter.data.shards import find_shards, read_shard
from sta_adapter.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

SHUFFLE_BUFFER = 100
_SHARING = ("processes", "workers", "batch_size")  # who reads what follows from these


@dataclass(frozen=True)
class Place:
    """Where one of several processes stands in a stream.

    Attributes:
        process: its number.
        processes: how many there are.
        workers: that load for each of them.
        batch_size: clips that a worker hands over at a time.
        seed: of the order.
        since: the run's step at which this order began.
        skip: batches that earlier runs have taken from it.
    """

    process: int = 0
    processes: int = 1
    workers: int = 0
    batch_size: int = 1
    seed: int = 0
    since: int = 0
    skip: int = 0

    def saved(self) -> dict[str, int]:
        """What a checkpoint keeps."""
        return {name: getattr(self, name) for name in (*_SHARING, "seed", "since")}

    def resumed(self, saved: dict[str, int], step: int, accumulation: int) -> Place:
        """The place after `step` steps of a run that saved its place, each of `accumulation` batches."""
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


class StreamDataset(IterableDataset):
    """Samples of tar shards, decoded and encoded as they come, pass after pass.

    In a pass every sample comes once, from one worker of one process; a reader with fewer samples begins its next pass earlier.

    Args:
        shards: a path, a glob pattern or a brace pattern, see `find_shards`.
        processor: the model's processor.
        frames: how clips are sampled.
        on_bad_sample: "skip" gives a `BadSample` in place of an unusable one, "error" raises.
        max_length: samples of more tokens are bad samples.
        decode_timeout: as for `VideoDataset`.
        format: of the records; None recognises each by its keys.
        shuffle: samples that each reader holds in memory to mix them; 0 for the shards' own order.
        seed: of the order.
        passes: over the data; None never ends.
    """

    cached = False

    def __init__(
        self,
        shards: str | Path,
        processor: Any,
        *,
        frames: FrameSettings | None = None,
        on_bad_sample: str = "skip",
        max_length: int | None = None,
        decode_timeout: float | None = DECODE_TIMEOUT,
        format: str | None = None,
        shuffle: int = SHUFFLE_BUFFER,
        seed: int = 0,
        passes: int | None = None,
    ) -> None:
        if on_bad_sample not in ("skip", "error"):
            raise ConfigError(f"on_bad_sample is {on_bad_sample!r}, expected 'skip' or 'error'.")
        check_format(format)
        self.shards = find_shards(shards)
        self.loader = VideoDataset(
            [],
            processor,
            frames=frames,
            max_length=max_length,
            decode_timeout=decode_timeout,
        )
        self.processor = processor
        self.frames = self.loader.frames
        self.on_bad_sample = on_bad_sample
        self.format = format
        self.shuffle = shuffle
        self.passes = passes
        self.place = Place(seed=seed)

    def __iter__(self) -> Iterator[Encoded | BadSample]:
        """This worker's samples, from where an earlier run stopped."""
        worker, place = get_worker_info(), self.place
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        number = (number + place.skip) % workers  # the worker whose turn it was
        done = max(0, -(-(place.skip - number) // workers)) * place.batch_size
        packed = self._packed(place.process * workers + number, place.processes * workers)
        for item in itertools.islice(packed, done, None):
            yield self._load(item)

    def placed(self, place: Place) -> StreamDataset:
        """A copy that reads from a place on."""
        made = copy.copy(self)
        made.place = place
        return made

    def usable_workers(self, wanted: int, processes: int) -> int:
        """How many workers each process can have, as each needs a shard of its own.

        Raises:
            ConfigError: there are fewer shards than processes.
        """
        if len(self.shards) < processes:
            raise ConfigError(
                f"{len(self.shards)} shards for {processes} processes; each needs one of its own. Write more and smaller "
                "shards, best a multiple of all processes' workers."
            )
        return min(wanted, len(self.shards) // processes)

    def digest(self) -> str:
        """Fingerprint of the shards' names, sizes and ends, and of their order."""
        found = [(path.name, fingerprint_file(path)) for path in self.shards]
        return fingerprint(found, self.format, self.shuffle, self.place.seed)

    def _packed(self, reader: int, readers: int) -> Iterator[Packed | BadSample]:
        """One reader's share of every pass, shuffled but not decoded."""
        from webdataset.filters import shuffle

        for turn in itertools.count() if self.passes is None else range(self.passes):
            order = list(self.shards)
            if self.shuffle:
                random.Random(f"{self.place.seed} {turn}").shuffle(order)
            samples = itertools.chain.from_iterable(map(read_shard, order[reader::readers]))
            if self.shuffle:
                mixed = shuffle(self.shuffle, initial=self.shuffle, seed=f"{self.place.seed} {turn} {reader}")
                samples = mixed(samples)
            yield from samples

    def _load(self, packed: Packed | BadSample) -> Encoded | BadSample:
        item = packed if isinstance(packed, BadSample) else self._decode(packed)
        if isinstance(item, BadSample) and self.on_bad_sample == "error":
            raise DataError(f"{item.source}: {item.reason}")
        return item

    def _decode(self, packed: Packed) -> Encoded | BadSample:
        try:
            sample = packed.sample(self.format)
        except DataError as error:
            return BadSample(packed.source, str(error).removeprefix(f"{packed.source}: "))
        return self.loader.load(sample)


def stream_loader(
    dataset: StreamDataset, place: Place, collate: Callable[..., Any], *, pin_memory: bool = False
) -> DataLoader:
    """Batches of a stream; its random numbers are its own, so that a run that goes on draws the same ones elsewhere."""
    return DataLoader(
        dataset.placed(place),
        batch_size=place.batch_size,
        num_workers=place.workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        generator=torch.Generator(),
    )
