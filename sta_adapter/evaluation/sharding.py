"""How an evaluation's work is shared out: what each of several processes takes, in which batches, and what they tell each other.

Samples of about one length are asked together, in the same batches however many processes share them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

from torch import distributed
from torch.utils.data import DataLoader, Subset

from sta_adapter.data.bad_sample import BadSample
from sta_adapter.data.collator import uncollated
from sta_adapter.data.dataset import VideoDataset
from sta_adapter.data.visual_processing import Encoded
from sta_adapter.data.worker_process import worker_errors
from sta_adapter.distributed import is_parallel
from sta_adapter.errors import STAError

Value = TypeVar("Value")
PATIENCE = timedelta(days=7)  # for the slowest; a process that dies is noticed at once, and so is one that fails
BATCHES = 4  # that are sorted by length together
HELD_BYTES = 1 << 30  # of samples that wait for that


def units(indices: Sequence[int], size: int) -> list[Sequence[int]]:
    """What one process takes at a time: a few batches, which are the same ones however many processes there are."""
    step = size * max(1, min(BATCHES, len(indices) // (size * 4 * BATCHES)))
    return [indices[start : start + step] for start in range(0, len(indices), step)]


@dataclass(frozen=True)
class Processes:
    """This process among those that share the work; one of one, where none have found each other."""

    rank: int = 0  # this one's number
    size: int = 1  # how many there are
    group: distributed.ProcessGroup | None = None  # through which they talk, on the CPU

    @classmethod
    def joined(cls) -> Processes:
        """Those of `torch.distributed`'s process group; all of them must call this."""
        if not is_parallel():
            return cls()
        group = cast("distributed.ProcessGroup", distributed.new_group(backend="gloo", timeout=PATIENCE))
        return cls(distributed.get_rank(), distributed.get_world_size(), group)

    def close(self) -> None:
        """Give back what `joined` took."""
        if self.group is not None:
            distributed.destroy_process_group(self.group)

    def share(self, units: Sequence[Value]) -> Sequence[Value]:
        """Every `size`-th one, so that neighbours, which are often about one clip or of one length, are spread."""
        return units[self.rank :: self.size]

    def gather(self, make: Callable[[], Value]) -> list[Value]:
        """What each process makes, by rank. Where one fails, all fail when the others are done: they with a STAError."""
        if self.size == 1:
            return [make()]
        failure: Exception | None = None
        mine: tuple[bool, Value | str]
        try:
            mine = (True, make())
        except Exception as error:  # whatever it is, the others must hear of it
            failure, mine = error, (False, f"{type(error).__name__}: {error}")
        found = [mine] * self.size
        distributed.all_gather_object(found, mine, group=self.group)
        if failure is not None:
            raise failure
        for rank, (worked, value) in enumerate(found):
            if not worked:
                raise STAError(f"process {rank} failed: {value}")
        return [cast(Value, value) for _, value in found]


def batches(
    dataset: VideoDataset, shares: Sequence[Sequence[int]], size: int, num_workers: int, progress: bool | str
) -> Iterator[list[tuple[int, Encoded | BadSample]]]:
    """Batches of samples of about one length, so that little is padded: those of a unit, from the longest on."""
    from tqdm.auto import tqdm

    indices = [index for unit in shares for index in unit]
    workers = 0 if dataset.cached else num_workers
    ahead = 2 * size if workers else None
    loader = DataLoader(
        Subset(dataset, indices), batch_size=None, num_workers=workers, collate_fn=uncollated, prefetch_factor=ahead
    )
    what = f"{progress if isinstance(progress, str) else 'answers'}, {dataset.encoder.frame_order} frames"
    with worker_errors(), tqdm(total=len(indices), desc=what, dynamic_ncols=True, disable=not progress) as bar:
        items = iter(loader)
        for unit in shares:
            held: list[tuple[int, Encoded | BadSample]] = []
            for index in unit:
                held.append((index, next(items)))
                if sum(map(_bytes, held)) > HELD_BYTES:
                    yield from _sorted_batches(held, size)
                    bar.update(len(held))
                    held = []
            yield from _sorted_batches(held, size)
            bar.update(len(held))


def _sorted_batches(
    held: list[tuple[int, Encoded | BadSample]], size: int
) -> Iterator[list[tuple[int, Encoded | BadSample]]]:
    ordered = sorted(held, key=lambda entry: 0 if isinstance(entry[1], BadSample) else -len(entry[1]["input_ids"]))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def _bytes(entry: tuple[int, Encoded | BadSample]) -> int:
    """Of a sample's tensors; of an engine's, the pixels that it is to have."""
    item = entry[1]
    if isinstance(item, BadSample):
        return 0
    prompt = getattr(item, "prompt", None)
    pixels = [] if prompt is None else [visual.pixels for visual in prompt.visuals]
    return sum(array.nbytes for array in (*item.values(), *pixels))
