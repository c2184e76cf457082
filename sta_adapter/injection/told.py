"""What an injection is told from outside of its hooks: by a `with` block of the user's, or by a call of the full model."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from types import MappingProxyType
from typing import Generic, TypeVar, cast

from torch import Tensor, nn

from sta_adapter.attention.layout import ClipLengths, checked_lengths
from sta_adapter.compatibility.calls import takes
from sta_adapter.compatibility.seams import is_running

T = TypeVar("T")
_HELD: ContextVar[Mapping[object, object]] = ContextVar("held", default=MappingProxyType({}))


class Held(Generic[T]):
    """A value that a `with` block gives to all that runs in it: in its thread and, of coroutines, in its task alone."""

    def __init__(self, otherwise: T) -> None:
        self.otherwise = otherwise

    @property
    def value(self) -> T:
        """That of the innermost block; `otherwise` outside of any."""
        return cast("T", _HELD.get().get(self, self.otherwise))

    @contextlib.contextmanager
    def holding(self, value: T) -> Iterator[None]:
        """The `with` block."""
        before = self.value
        _HELD.set({**_HELD.get(), self: value})
        try:
            yield
        finally:
            others = {held: given for held, given in _HELD.get().items() if held is not self}
            _HELD.set(others if before is self.otherwise else {**others, self: before})


class _Call(threading.local):
    """What a call of the full model, in this thread, has told."""

    def __init__(self) -> None:  # a compiler sees no change of what stands as a default in the class
        self.lengths: ClipLengths | None = None
        self.model: weakref.ref[nn.Module] | None = None  # whose call it is


class Told:
    """Frames of each clip.

    A copy of the whole model is told its own. One of the encoder alone shares them: PEFT's `modules_to_save` copies it out
    of the model whose calls tell its clips.
    """

    def __init__(self, model: weakref.ref[nn.Module] | None = None) -> None:
        self.model = model  # that STA went into
        self.by_user: Held[ClipLengths | None] = Held(None)  # by `clips(...)`
        self.by_call = _Call()

    def begin(self, model: nn.Module) -> None:
        """A call of this model begins: what an earlier one told, which an interrupt ended, is over."""
        if self.by_call.model is not None and self.by_call.model() is model:
            self.forget()

    def tell(self, lengths: ClipLengths, model: nn.Module) -> None:
        """Note what a call of this model tells."""
        self.by_call.lengths, self.by_call.model = lengths, weakref.ref(model)

    def forget(self) -> None:
        """What a call has told is over."""
        self.by_call.lengths = self.by_call.model = None

    def lengths(self) -> ClipLengths | None:
        """What holds now."""
        call = self.by_call
        if call.model is not None and not is_running(call.model()):  # ended by an interrupt
            self.forget()
        return call.lengths or self.by_user.value

    @contextlib.contextmanager
    def clips(self, lengths: ClipLengths | None) -> Iterator[None]:
        """Tell what counts more than what a call of the model has told before."""
        call = self.by_call
        before = call.lengths, call.model
        self.forget()
        try:
            with self.by_user.holding(lengths):
                yield
        finally:
            call.lengths, call.model = before

    def __deepcopy__(self, memo: dict[int, object]) -> Told:
        model = None if self.model is None else self.model()
        if model is None:
            return Told()
        return Told(weakref.ref(cast("nn.Module", memo[id(model)]))) if id(model) in memo else self

    def __reduce__(self) -> tuple[type[Told], tuple[()]]:
        return Told, ()


def take_clip_lengths(
    module: nn.Module, kwargs: dict[str, object], name: str = "forward"
) -> tuple[dict[str, object], ClipLengths | None]:
    """(the keywords without `clip_lengths`, its checked value); a method with a parameter of that name keeps it."""
    lengths = kwargs.get("clip_lengths")
    if "clip_lengths" in kwargs and not takes(module, "clip_lengths", name):
        kwargs = {k: v for k, v in kwargs.items() if k != "clip_lengths"}
    if isinstance(lengths, Tensor):  # as collators batch it
        lengths = lengths.tolist()
    return kwargs, None if lengths is None else checked_lengths(cast("Sequence[int]", lengths))
