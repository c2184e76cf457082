"""What each of several processes gets of an epoch: every sample once, also where these don't come out even.

accelerate gives out batches in turn and fills up the last ones with samples from the beginning of the epoch, which would be
trained twice, and in a step that one process takes without them.
"""

from __future__ import annotations

from collections.abc import Iterator

from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, DataLoader, Dataset

from sta_adapter.data.bad_sample import BadSample
from sta_adapter.data.dataset import VideoDataset
from sta_adapter.data.visual_processing import Encoded

__all__ = ["Fillable", "fill_up"]


class Fillable(Dataset[Encoded | BadSample | None]):
    """A data set in which None is the index of nothing, which a `Collator` leaves out."""

    def __init__(self, dataset: VideoDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int | None) -> Encoded | BadSample | None:
        return None if index is None else self.dataset[index]


class FilledUp(BatchSampler):
    """An epoch's batches, all of one size and as many for each process, with None for what is missing at the end."""

    def __init__(self, batches: BatchSampler, processes: int) -> None:
        super().__init__(batches.sampler, batches.batch_size, batches.drop_last)
        self.batches, self.processes = batches, processes

    def __len__(self) -> int:
        return -(-len(self.batches) // self.processes) * self.processes

    def __iter__(self) -> Iterator[list[int | None]]:  # type: ignore[override]
        """Batch by batch."""
        indices: list[int | None] = [index for batch in self.batches for index in batch]
        size = self.batch_size
        indices += [None] * (len(self) * size - len(indices))
        for start in range(0, len(indices), size):
            yield indices[start : start + size]


def fill_up(loader: DataLoader[object]) -> DataLoader[object]:
    """Let a loader of a `Fillable` that accelerate has prepared give nothing in the place of samples that came before."""
    shard = loader.batch_sampler
    if isinstance(shard, BatchSamplerShard):
        shard.batch_sampler = FilledUp(shard.batch_sampler, shard.num_processes)
    return loader
