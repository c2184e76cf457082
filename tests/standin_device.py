"""A second device for machines that have none: its tensors keep their values in the CPU's memory, and can't be mixed with the CPU's.

An operation on tensors of both is the error that it would be on a GPU, and `device=` decides where a tensor is made. It is
called cpu:1, so that kernels are chosen as on the CPU: what is tested with it is where tensors lie, not what a GPU computes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("cpu", 1)
COPIES = {"copy_", "_to_copy"}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}  # a GPU's tensors take the CPU's as indices


class OnDevice(Tensor):
    """A tensor of the device; `held` has its values."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        return Tensor._make_wrapper_subclass(
            cls, held.size(), held.stride(), held.storage_offset(), dtype=held.dtype, layout=held.layout, device=DEVICE
        )

    def __init__(self, held: Tensor) -> None:
        self.held = held

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: object) -> OnDevice:
        return OnDevice(inner["held"])

    def tolist(self) -> Any:
        return self.held.tolist()

    def __repr__(self, **_: object) -> str:
        return f"{self.held!r} on {DEVICE}"

    __format__ = object.__format__

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Collection[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})


class StandInDevice(TorchDispatchMode):
    """While it is entered, tensors can be made on the device."""

    def __enter__(self) -> StandInDevice:
        self._patches = [
            mock.patch.object(torch, name, _made_here(getattr(torch, name))) for name in ("tensor", "as_tensor")
        ]
        for patch in self._patches:
            patch.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for patch in self._patches:
            patch.stop()

    def __torch_dispatch__(
        self, func: Any, types: Collection[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})


def _made_here(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.tensor and torch.as_tensor, which go past Python on their way to a device."""

    def made(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        numbers = tree_map(
            lambda leaf: leaf.held if isinstance(leaf, OnDevice) and not isinstance(data, Tensor) else leaf, data
        )
        found = make(numbers, *args, **kwargs)
        return found if device is None else found.to(device)

    return made


def _run(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    here = [isinstance(tensor, OnDevice) for tensor in tensors]
    name = func.overloadpacket.__name__
    if any(here) and name not in COPIES:
        others = [tuple(t.shape) for t, on in zip(tensors, here, strict=True) if not on and t.dim()]
        if others and not (name in INDEXED and here[0]):
            raise RuntimeError(f"{func} of tensors on {DEVICE} and of the CPU's, shaped {others}")
    asked = kwargs.get("device")
    on_device = any(here) if asked is None else asked == DEVICE
    inner_args, inner_kwargs = tree_map(_held, (args, dict(kwargs)))
    found = func(*inner_args, **inner_kwargs)
    if not on_device:
        return found
    wrapped = tree_map(lambda leaf: OnDevice(leaf) if isinstance(leaf, Tensor) else leaf, found)
    return return_and_correct_aliasing(func, args, dict(kwargs), wrapped) if any(here) else wrapped


def _held(leaf: Any) -> Any:
    """What computes in the place of an argument."""
    if isinstance(leaf, OnDevice):
        return leaf.held
    return torch.device("cpu") if leaf == DEVICE else leaf
