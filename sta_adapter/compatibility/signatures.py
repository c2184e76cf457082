"""What the arguments of a module's method are called, also where a tool has put a function of its own in its place.

ms-swift and accelerate replace `forward` on the instance; what stands there then need not tell its parameters, or tells
them without the first. The class's method does.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FunctionType, MethodType
from weakref import WeakKeyDictionary

from torch import nn

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
