"""Methods of a model that can't have hooks, as its forward can.

An object of the same name stands in front of each on the instance, and goes with `handle.remove()`. The class is never touched.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

from torch import nn

from sta_adapter.injection.state import Injection


class MethodInFront:
    """Stands in front of a model's method; copied and pickled with the model."""

    def __init__(self, injection: Injection, model: nn.Module, name: str) -> None:
        self.injection = injection
        self.model = model
        self.name = name
        self.before: Callable[..., object] | None = model.__dict__.get(name)

    @property
    def method(self) -> Callable[..., object]:
        """The model's own method."""
        return self.before or getattr(type(self.model), self.name).__get__(self.model)

    @property
    def __signature__(self) -> inspect.Signature:  # generate() picks a method's arguments by it
        return inspect.signature(self.method)


def remove_methods(module: nn.Module, injection: Injection) -> None:
    """Take every `MethodInFront` of this injection off a module."""
    for name, value in list(module.__dict__.items()):
        if isinstance(value, MethodInFront) and value.injection is injection:
            del module.__dict__[name]
            if value.before is not None:
                module.__dict__[name] = value.before
