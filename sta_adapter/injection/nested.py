"""Tensors in nested containers, as modules take and give them."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Iterator
from typing import cast

from torch import Tensor

Arguments = tuple[tuple[object, ...], dict[str, object]]  # of a module's call


def iterate_tensors(value: object) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists, mappings and data classes."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from iterate_tensors(inner)
    elif isinstance(value, (tuple, list)):
        for inner in value:
            yield from iterate_tensors(inner)
    elif dataclasses.is_dataclass(value) or isinstance(value, types.SimpleNamespace):
        yield from iterate_tensors(vars(value))


def map_tensors(function: Callable[[Tensor], Tensor], value: object) -> object:
    """The same nested tuples, lists and plain dicts, each tensor in them replaced."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (tuple, list)):
        make = getattr(value, "_make", type(value))  # that of named tuples, which take their fields one by one
        return make([map_tensors(function, inner) for inner in value])
    return {key: map_tensors(function, inner) for key, inner in value.items()} if type(value) is dict else value


def require_grad(args: tuple[object, ...], kwargs: dict[str, object]) -> Arguments:
    """The same arguments, the floating-point tensors as leaves that require a gradient."""

    def convert(tensor: Tensor) -> Tensor:
        return tensor.detach().requires_grad_() if tensor.is_floating_point() and not tensor.requires_grad else tensor

    return cast("Arguments", map_tensors(convert, (args, kwargs)))
