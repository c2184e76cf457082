"""`uncompiled`: what `torch.compiler.disable` does, without importing torch's compiler (seconds) before the first call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar, cast

import torch

from sta_adapter.compatibility.seams import disable_dynamo

uncompiled = disable_dynamo()
Hook = TypeVar("Hook", bound=Callable[..., object])


def uncompiled_where(needed: Callable[..., bool]) -> Callable[[Hook], Hook]:
    """`uncompiled` for a hook, which a compiler passes by where it has nothing to do: it would break the graph.

    Args:
        needed: of the hook's arguments, whether it has; traced by the compiler.
    """

    def decorate(hook: Hook) -> Hook:
        outside = uncompiled(hook)

        @functools.wraps(hook)
        def call(*args: object) -> object:
            return None if torch.compiler.is_compiling() and not needed(*args) else outside(*args)

        return cast(Hook, call)

    return decorate
