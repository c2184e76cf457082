"""How a DataLoader's worker hands large tensors over: written into memory that both processes have.

torch copies them into /dev/shm, which costs a page fault for each 4 KB, and of which a container has 64 MB by default. To write
a file in memory (memfd) takes half of the time, and it has no limit of its own.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.reduction import DupFd, ForkingPickler
from typing import IO, Protocol, cast

import torch
from torch import Tensor
from torch.multiprocessing import get_sharing_strategy
from torch.multiprocessing.reductions import reduce_tensor

HAS_MEMFD = hasattr(os, "memfd_create")  # Linux, and not every build of Python
LARGE = 1 << 20  # bytes
FILE = "sta_file"  # a tensor's attribute, an `_OpenFile`


class _OpenFile:
    """The file that a tensor's memory is; a copy of the tensor has memory of its own."""

    def __init__(self, file: IO[bytes] | None = None, memory: tuple[int, int] = (0, 0)) -> None:
        self.file = file
        self.memory = memory  # address and bytes

    def __reduce__(self) -> tuple[type[_OpenFile], tuple[()]]:
        return _OpenFile, ()


class Handle(Protocol):
    """A file that another process has opened."""

    def detach(self) -> int:
        """Its number in this process."""


def hand_over_by_writing() -> None:
    """What this process puts into a queue goes to another one as described above; to be called in a worker."""
    if HAS_MEMFD:
        ForkingPickler.register(Tensor, _reduce)


def joined_in_file(tensors: Sequence[Tensor]) -> Tensor:
    """`torch.cat(tensors)`, of one dtype and shape behind the first axis, in memory that is handed over without a copy."""
    parts = [tensor.contiguous() for tensor in tensors]
    hand_over_by_writing()
    file = written(map(_bytes, parts))
    joined = _tensor(os.dup(file.fileno()), parts[0].dtype, (sum(map(len, parts)), *parts[0].shape[1:]))
    setattr(joined, FILE, _OpenFile(file, (joined.data_ptr(), joined.nbytes)))
    return joined


def written(parts: Iterable[memoryview]) -> IO[bytes]:
    """A file in memory of these bytes; it goes when all who have it open close it."""
    file = open(os.memfd_create("sta-adapter"), "wb")  # noqa: SIM115 (the caller's to close)
    try:
        for part in parts:
            file.write(part)
        file.flush()
    except BaseException:
        file.close()
        raise
    return file


def mapped(file: int, size: int) -> mmap.mmap:
    """The bytes of a file in memory, which is closed; they go with the last array in them."""
    try:
        return mmap.mmap(file, size)
    finally:
        os.close(file)


def _reduce(tensor: Tensor) -> tuple[Callable[..., Tensor], tuple[object, ...]]:
    if not _is_plain(tensor) or get_sharing_strategy() != "file_descriptor":
        return cast("tuple[Callable[..., Tensor], tuple[object, ...]]", reduce_tensor(tensor))
    kept: _OpenFile = getattr(tensor, FILE, None) or _OpenFile()
    file = kept.file if kept.memory == (tensor.data_ptr(), tensor.nbytes) else None
    file = file or written([_bytes(tensor)])
    return _rebuild, (DupFd(file.fileno()), tensor.dtype, tensor.shape)


def _is_plain(tensor: Tensor) -> bool:
    """Whether the tensor is large, its bytes and nothing else, and in no memory of torch's that others have."""
    return (
        tensor.device.type == "cpu"
        and tensor.layout == torch.strided
        and tensor.is_contiguous()
        and tensor.nbytes >= LARGE
        and not (
            tensor.requires_grad or tensor.is_quantized or tensor.is_conj() or tensor.is_neg() or tensor.is_shared()
        )
    )


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data


def _rebuild(file: Handle, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    return _tensor(file.detach(), dtype, shape)


def _tensor(file: int, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    return torch.frombuffer(mapped(file, torch.Size(shape).numel() * dtype.itemsize), dtype=dtype).view(shape)
