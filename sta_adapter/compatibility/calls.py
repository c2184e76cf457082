"""Calls of functions and modules: what their arguments are called, and the tensors in what they take and give.

ms-swift and accelerate replace `forward` on the instance; what stands there then need not tell its parameters, or tells
them without the first. The class's method does.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import FunctionType, MethodType, SimpleNamespace
from typing import cast
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from sta_adapter.compatibility.releases import incompatible

Arguments = tuple[tuple[object, ...], dict[str, object]]  # of a module's call
_SIGNATURES: WeakKeyDictionary[FunctionType, inspect.Signature] = WeakKeyDictionary()  # a function may hold its model


def class_method(module: nn.Module, name: str = "forward") -> Callable[..., object]:
    """The method as the module's class has it, for its signature."""
    method: object = getattr(type(module), name, None)
    found: Callable[..., object] = method.__get__(module) if hasattr(method, "__get__") else getattr(module, name)
    return found


def bound_arguments(
    module: nn.Module,
    args: Sequence[object],
    kwargs: Mapping[str, object],
    name: str = "forward",
    *,
    partial: bool = True,
) -> dict[str, object]:
    """Arguments of `module.name(*args, **kwargs)` by name, those in a `**` among them; if `partial`, some may be missing.

    Raises:
        TypeError: neither the class's method nor what stands in its place takes them.
    """
    *others, last = _signatures(module, name)
    for signature in others:
        try:
            return _named(signature, args, kwargs, partial)
        except TypeError:  # what stands in its place takes other arguments
            continue
    return _named(last, args, kwargs, partial)


def takes(module: nn.Module, parameter: str, name: str = "forward") -> bool:
    """Whether a method has a parameter of that name."""
    return any(parameter in signature.parameters for signature in _signatures(module, name))


def _signatures(module: nn.Module, name: str) -> Iterator[inspect.Signature]:
    if name in vars(module):
        yield _signature(class_method(module, name))
    yield _signature(getattr(module, name))


def _signature(method: Callable[..., object]) -> inspect.Signature:
    """A method's signature is found once: that takes longer than a block's arithmetic may."""
    if not isinstance(method, MethodType) or not isinstance(method.__func__, FunctionType):
        return inspect.signature(method)
    if (found := _SIGNATURES.get(method.__func__)) is None:
        found = _SIGNATURES[method.__func__] = inspect.signature(method)
    return found


def _named(
    signature: inspect.Signature, args: Sequence[object], kwargs: Mapping[str, object], partial: bool
) -> dict[str, object]:
    bind = signature.bind_partial if partial else signature.bind
    arguments = bind(*args, **kwargs).arguments
    kinds = {name: parameter.kind for name, parameter in signature.parameters.items()}
    extra = [value for name, value in arguments.items() if kinds[name] is inspect.Parameter.VAR_KEYWORD]
    return {name: value for part in (*extra, arguments) for name, value in part.items()}


def parameter_names(function: Callable[..., object], what: str, package: str = "transformers") -> tuple[str, ...]:
    """Names of a function's parameters, in order, without * and **."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise incompatible(package, f"the parameters of {what} can't be read ({error})") from error
    return tuple(p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))


def known_parameters(
    function: Callable[..., object], what: str, needed: Collection[str], known: Collection[str] = ()
) -> tuple[str, ...]:
    """Names of a function's parameters, all of which we know, with those in `needed` among them."""
    names = parameter_names(function, what)
    if missing := sorted(set(needed) - set(names)):
        raise incompatible("transformers", f"{what} has no parameter {', '.join(missing)}; it takes {', '.join(names)}")
    if new := sorted(set(names) - set(needed) - set(known)):
        raise incompatible("transformers", f"{what} has the unknown parameter {', '.join(new)}")
    return names


def given_arguments(
    function: Callable[..., object], what: str, args: tuple[object, ...], kwargs: Mapping[str, object]
) -> dict[str, object]:
    """Arguments of a call by name, those passed by position too."""
    names = parameter_names(function, what)
    if len(args) > len(names):
        raise incompatible(
            "transformers", f"{what} got {len(args)} arguments by position and is known to take {len(names)}"
        )
    return {**dict(zip(names, args, strict=False)), **kwargs}


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
    elif dataclasses.is_dataclass(value) or isinstance(value, SimpleNamespace):
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
