"""Large tensors on their way from a DataLoader's worker: the same values, in memory that was written once."""

import copy
import os
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from sta_adapter.data import Collator
from sta_adapter.data.tensor_handover import HAS_MEMFD, LARGE, hand_over_by_writing

pytestmark = pytest.mark.skipif(not HAS_MEMFD, reason="no files in memory here")
TOKENS = {"input_ids": torch.tensor([5, 6, 7]), "labels": torch.tensor([5, 6, 7])}


class Made(Dataset):
    """Tensors that a worker makes."""

    def __init__(self, make, count=1):
        self.make, self.count = make, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        hand_over_by_writing()
        return self.make(index)


def in_files(tensor):
    """Whether a tensor's memory is a file of ours."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(number, 16) for number in line.split()[0].split("-"))
        if first <= tensor.data_ptr() < last:
            return "memfd:sta-adapter" in line
    return False


def clip(index, dtype=torch.float32, frames=4):
    return (torch.arange(frames * 300_000) % 251 + index).view(frames, 100_000, 3).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64], ids=str)
def test_a_large_tensor_arrives_as_it_was(dtype):
    (found,) = DataLoader(Made(lambda index: clip(index, dtype)), batch_size=None, num_workers=1)
    assert in_files(found)
    assert found.dtype == dtype
    assert torch.equal(found, clip(0, dtype))
    found.zero_()  # it can be written, as any tensor


VIEWS = {
    "transposed": lambda tensor: tensor.transpose(0, 1),
    "a part": lambda tensor: tensor[1:],
    "conjugated": lambda tensor: tensor.to(torch.complex64).conj(),
    "shared already": lambda tensor: tensor.share_memory_(),
    "small": lambda tensor: tensor.view(-1)[:10].clone(),
    "with a gradient": lambda tensor: tensor.requires_grad_(),
    "sparse": lambda tensor: tensor.to_sparse(),
}


@pytest.mark.parametrize("name", VIEWS)
def test_what_is_more_than_its_bytes_arrives_as_well(name):
    view = VIEWS[name]
    (found,) = DataLoader(Made(lambda index: view(clip(index))), batch_size=None, num_workers=1)
    expected = view(clip(0))
    assert (found.shape, found.requires_grad, found.layout) == (expected.shape, expected.requires_grad, expected.layout)
    assert torch.equal(found.to_dense().detach(), expected.to_dense().detach())
    assert in_files(found.to_dense() if name == "sparse" else found) is (name == "a part")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
@pytest.mark.parametrize("workers", [0, 1])
def test_clips_of_a_workers_batch_are_put_together_where_they_are_handed_over(workers, dtype):
    items = [{**TOKENS, "pixel_values_videos": clip(n, dtype, frames=n)} for n in (2, 1, 0)]
    (batch,) = DataLoader(items, batch_size=3, num_workers=workers, collate_fn=Collator(9))
    pixels = batch["pixel_values_videos"]
    assert in_files(pixels) is bool(workers)
    assert not in_files(batch["input_ids"])
    assert pixels.dtype == dtype
    assert torch.equal(pixels, torch.cat([item["pixel_values_videos"] for item in items]))


class _Changed:
    """A collator of one's own around ours."""

    def __call__(self, items):
        batch = Collator(9)(items)
        pixels = batch["pixel_values_videos"].mul_(2)  # in place
        other = Collator(9)(items)["pixel_values_videos"]
        other.data = pixels.half()
        return {"whole": pixels, "end": pixels[1:], "copy": copy.deepcopy(pixels), "other": other}


def test_what_is_made_of_a_batch_in_the_worker_arrives():
    items = [{**TOKENS, "pixel_values_videos": clip(n)} for n in range(2)]
    (batch,) = DataLoader(items, batch_size=2, num_workers=1, collate_fn=_Changed())
    expected = 2 * torch.cat([clip(0), clip(1)])
    assert torch.equal(batch["whole"], expected)
    assert torch.equal(batch["end"], expected[1:])
    assert torch.equal(batch["copy"], expected)
    assert torch.equal(batch["other"], expected.half())


def test_files_go_with_their_tensors():
    before = len(os.listdir("/proc/self/fd"))
    loader = DataLoader(Made(clip, 20), batch_size=None, num_workers=1, persistent_workers=True)
    iterator = iter(loader)
    kept = [next(iterator) for _ in range(15)]
    open_then = len(os.listdir("/proc/self/fd"))
    assert all(torch.equal(tensor, clip(index)) for index, tensor in enumerate(kept))
    assert open_then >= before + 15
    del kept
    assert len(os.listdir("/proc/self/fd")) <= open_then - 15


def test_a_worker_that_is_gone_leaves_what_it_gave():
    loader = DataLoader(Made(clip, 3), batch_size=None, num_workers=1)
    found = list(loader)
    assert all(torch.equal(tensor, clip(index)) for index, tensor in enumerate(found))


def test_the_users_way_of_sharing_is_kept():
    strategy = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        (found,) = DataLoader(Made(clip), batch_size=None, num_workers=1)
    finally:
        torch.multiprocessing.set_sharing_strategy(strategy)
    assert clip(0).nbytes > LARGE
    assert not in_files(found)
    assert torch.equal(found, clip(0))
