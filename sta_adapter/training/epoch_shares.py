"""What each process gets of an epoch: every sample once, in the epoch's order, also where these don't come out even.

accelerate gives out batches in turn and fills up the last ones with samples from the beginning of the epoch, which would be
trained twice, and in a step that one process takes without them. The order depends on the epoch's number, which not every
pair of accelerate and transformers tells a loader that begins within an epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from typing import cast

from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from sta_adapter.data.bad_sample import BadSample
from sta_adapter.data.dataset import VideoDataset
from sta_adapter.data.visual_processing import Encoded


class Fillable(Dataset[Encoded | BadSample | None]):
    """A data set in which None is the index of nothing, which a `Collator` leaves out."""

    def __init__(self, dataset: VideoDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int | None) -> Encoded | BadSample | None:
        return None if index is None else self.dataset[index]


class FilledUp(Sampler[int | None]):
    """The samples of an epoch, then None up to a multiple of `share`."""

    def __init__(self, samples: Iterable[int], share: int, epoch: Callable[[], int]) -> None:
        self.samples, self.epoch = samples, epoch
        self.missing = -len(cast(Sized, samples)) % share

    def __len__(self) -> int:
        return len(cast(Sized, self.samples)) + self.missing

    def __iter__(self) -> Iterator[int | None]:
        """Index by index, in the order of the epoch that there is now."""
        if hasattr(self.samples, "set_epoch"):
            self.samples.set_epoch(self.epoch())
        yield from self.samples
        yield from [None] * self.missing


def fill_up(loader: DataLoader[object], epoch: Callable[[], int] = lambda: 0, batches: int = 1) -> DataLoader[object]:
    """Let a loader of a `Fillable` that accelerate has prepared give nothing in the place of samples that came before.

    The loader is of one of the processes, with its share of the batches; each of them gets a multiple of `batches`.
    `epoch` is asked which one it is when it begins.
    """
    if isinstance(loader.dataset, Fillable):
        shard = loader.batch_sampler
        processes = getattr(shard, "num_processes", 1)
        whole = cast(BatchSampler, getattr(shard, "batch_sampler", shard))  # the batches of all processes
        share = whole.batch_size * processes * batches
        whole.sampler = FilledUp(whole.sampler, share, epoch)  # type: ignore[assignment]
    return loader
