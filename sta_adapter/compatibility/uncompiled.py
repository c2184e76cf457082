"""`uncompiled`: what `torch.compiler.disable` does, without importing torch's compiler (seconds) before the first call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from sta_adapter.compatibility.seams import disable_dynamo

uncompiled = disable_dynamo()


def uncompiled_where(needed: Callable[..., bool]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`uncompiled` for a hook, which a compiler passes by where it has nothing to do: it would break the graph.

    Args:
        needed: of the hook's arguments, whether it has; traced by the compiler.
    """

    def decorate(hook: Callable[..., Any]) -> Callable[..., Any]:
        outside = uncompiled(hook)

        @functools.wraps(hook)
        def call(*args: Any) -> Any:
            return None if torch.compiler.is_compiling() and not needed(*args) else outside(*args)

        return call

    return decorate
