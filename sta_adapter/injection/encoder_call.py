"""EncoderCall: one call of an encoder, its arguments by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from sta_adapter.attention.layout import ClipLengths
from sta_adapter.compatibility.seams import incompatible
from sta_adapter.compatibility.signatures import bound_arguments
from sta_adapter.errors import LayoutError


def number_of(owner: object, *names: str, default: int | None = None) -> int:
    """A whole number of a configuration or a module: the first of these names that it has.

    Raises:
        CompatibilityError: it has none of them, and there is no default.
    """
    found = next((value for name in names if isinstance(value := getattr(owner, name, None), int)), default)
    if found is None:
        raise incompatible("transformers", f"{type(owner).__name__} has no whole number {' or '.join(names)}")
    return found


def sizes_of(owner: object, name: str) -> tuple[int, ...]:
    """A size of a configuration or a module, side by side; one number where all sides are alike.

    Raises:
        CompatibilityError: it has none of this name.
    """
    found = getattr(owner, name, None)
    sizes = tuple(found) if isinstance(found, (list, tuple)) else (found,)
    if not sizes or not all(isinstance(size, int) for size in sizes):
        raise incompatible("transformers", f"{type(owner).__name__} has no size {name}, but {found!r}")
    return sizes


@dataclasses.dataclass(frozen=True)
class EncoderCall:
    """One call of an encoder, for a backbone's layout function.

    Attributes:
        encoder: the module that is called.
        arguments: its arguments by the names in its `forward`; those not passed are absent.
        clip_lengths: of each clip its frames, or (frames, rows of each frame), when they were told: by
            `handle.clips(...)`, a `clip_lengths` keyword or a `ClipSource`; None otherwise.
    """

    encoder: nn.Module
    arguments: Mapping[str, object]
    clip_lengths: ClipLengths | None = None

    @classmethod
    def bind(
        cls, encoder: nn.Module, args: Sequence[object], kwargs: Mapping[str, object], clip_lengths: ClipLengths | None
    ) -> EncoderCall:
        """Name the arguments of `encoder(*args, **kwargs)`."""
        return cls(encoder, bound_arguments(encoder, args, kwargs), clip_lengths)

    def tensor(self, *names: str) -> torch.Tensor:
        """The first of these arguments that was passed as a tensor.

        Raises:
            LayoutError: when there is none.
        """
        for name in names:
            if isinstance(found := self.arguments.get(name), torch.Tensor):
                return found
        raise LayoutError(
            f"{type(self.encoder).__name__} was called without {' or '.join(names)}, which tells STA where the clips are; "
            f"found the arguments {', '.join(self.arguments) or 'none'}."
        )
