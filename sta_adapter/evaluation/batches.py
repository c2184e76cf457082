"""What is asked together: samples of about one length, in the same batches however many processes share them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch.utils.data import DataLoader, Subset

from sta_adapter.data.bad_sample import BadSample
from sta_adapter.data.collator import uncollated
from sta_adapter.data.dataset import VideoDataset
from sta_adapter.data.visual_processing import Encoded
from sta_adapter.data.worker_process import worker_errors

__all__ = ["batches", "units"]

BATCHES = 4  # that are sorted by length together
HELD_BYTES = 1 << 30  # of samples that wait for that


def units(indices: Sequence[int], size: int) -> list[Sequence[int]]:
    """What one process takes at a time: a few batches, which are the same ones however many processes there are."""
    step = size * max(1, min(BATCHES, len(indices) // (size * 4 * BATCHES)))
    return [indices[start : start + step] for start in range(0, len(indices), step)]


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
