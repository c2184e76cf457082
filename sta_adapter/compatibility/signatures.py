"""What the arguments of functions and of modules' methods are called, also where a tool has put a function in a method's place.

ms-swift and accelerate replace `forward` on the instance; what stands there then need not tell its parameters, or tells
them without the first. The class's method does.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import FunctionType, MethodType
from weakref import WeakKeyDictionary

from torch import nn

from sta_adapter.compatibility.releases import incompatible

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
