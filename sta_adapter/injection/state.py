"""The record that all hooks of one injection share: settings, switch, and per thread the layout at work.

An encoder's forward has one layout. The encoder's hook reads it and puts it into the record, per thread; the blocks'
hooks take it from there, and it is gone when the encoder returns or fails. A block that gradient checkpointing runs
again during backward finds the layout of *its* forward: gradient hooks on the tensors between the blocks put it back
just before the block's backward starts, valid for that backward only.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sta_adapter.adapter.base_marks import mark_base
from sta_adapter.adapter.lora_weights import checked_lora
from sta_adapter.attention.explain import Call
from sta_adapter.attention.layout import ALL_ROWS, ClipLayout, ClipLengths
from sta_adapter.compatibility.seams import graph_task
from sta_adapter.config import STAConfig
from sta_adapter.errors import CheckpointError, LayoutError, STAWarning
from sta_adapter.injection.backbone import Backbone

if TYPE_CHECKING:
    from sta_adapter.injection.stream import Stream

CALLS_KEPT = 256


class Injection:
    """What the hooks of one injection share: configuration, backbone and, per thread, the layout at work.

    Args:
        config: the configuration in force.
        spec: the backbone.
    """

    def __init__(self, config: STAConfig, spec: Backbone) -> None:
        self.config = config
        self.spec = spec
        self.enabled = True
        self.base_marks: dict[str, Any] = {}  # of the model that STA went into, see sta_adapter.adapter.base_marks
        self.calls: dict[Call, None] = {}  # of the attention kernel, see STAHandle.explain
        self._local = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_local", "_handle", "_model")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _local=threading.local())

    @property
    def backbone(self) -> str:
        """Name of the backbone."""
        return self.spec.name

    @property
    def is_enabled(self) -> bool:
        """Whether the branch runs in this thread."""
        return self.enabled and not getattr(self._local, "disabled", 0)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Switch the branch off in this thread."""
        self._local.disabled = getattr(self._local, "disabled", 0) + 1
        try:
            yield
        finally:
            self._local.disabled -= 1

    @property
    def clip_lengths(self) -> ClipLengths | None:
        """Frames of each clip, as the user or the full model's call told them for this thread."""
        return getattr(self._local, "told", None) or getattr(self._local, "clip_lengths", None)

    @contextlib.contextmanager
    def clips(self, lengths: ClipLengths | None) -> Iterator[None]:
        """Tell the frames of each clip for the forwards in this thread."""
        before = (getattr(self._local, "clip_lengths", None), getattr(self._local, "told", None))
        self._local.clip_lengths, self._local.told = lengths, None
        try:
            yield
        finally:
            self._local.clip_lengths, self._local.told = before

    def watch(self, model: nn.Module) -> None:
        """Remember the model that STA goes into, for `warn_of_training`; a copy or an unpickled model is not watched."""
        self.base_marks = mark_base(model)
        self.__dict__["_model"] = weakref.ref(model)

    def warn_of_training(self) -> None:
        """Say at the first forward of a training what of it an adapter can't hold, not when hours later it is saved."""
        model = self.__dict__.pop("_model", lambda: None)()
        if model is None:
            return
        try:
            checked_lora(model)
        except CheckpointError as error:
            warnings.warn(f"handle.save_pretrained can't save what is trained here: {error}", STAWarning, stacklevel=2)

    @property
    def streams(self) -> Sequence[Stream]:
        """The streams whose next frames the forwards in this thread bring; none outside of `handle.stream(...)`."""
        return getattr(self._local, "streams", ())

    @contextlib.contextmanager
    def streaming(self, streams: Sequence[Stream]) -> Iterator[None]:
        """The forwards in this thread bring the next frames of these streams."""
        before = self.streams
        self._local.streams = streams
        try:
            yield
        finally:
            self._local.streams = before

    @property
    def default_lengths(self) -> ClipLengths | None:
        """Frames of each clip where nobody has told them: a single stream takes all rows."""
        return ALL_ROWS if len(self.streams) == 1 else None

    def begin(self, layout: ClipLayout | None) -> None:
        """An encoder forward starts in this thread; None when the branch is switched off."""
        self._local.forward = (layout,)
        self._local.ran = getattr(self._local, "ran", False) or torch.is_grad_enabled()

    def record_calls(self, calls: Iterable[Call]) -> None:
        """A block makes these calls of the attention kernel; the latest kinds are kept."""
        self.calls.update(dict.fromkeys(calls))
        for call in list(self.calls)[:-CALLS_KEPT]:  # a copy: another thread may add to it meanwhile
            self.calls.pop(call, None)

    def set_output(self, output: Any) -> None:
        """A block of the encoder forward of this thread gave this output; nothing is kept when it is recomputed."""
        if getattr(self._local, "forward", None) is not None:
            self._local.output = output

    @property
    def noted(self) -> Any:
        """The output of the block that ran last in the encoder forward of this thread."""
        return getattr(self._local, "output", None)

    def end(self) -> None:
        """The encoder forward of this thread is over."""
        self._local.forward = self._local.output = None

    def set_clips(self, lengths: ClipLengths | None) -> None:
        """The full model's forward of this thread starts with these clips, or is over."""
        self._local.told = lengths

    @property
    def outputs(self) -> list[Tensor] | None:
        """What the encoder gave in the full model's forward of this thread, where that must reach all of it."""
        return getattr(self._local, "outputs", None)

    @outputs.setter
    def outputs(self, tensors: list[Tensor] | None) -> None:
        self._local.outputs = tensors

    @property
    def in_dummy(self) -> bool:
        """Whether the encoder forward of this thread is one of a dummy clip."""
        return getattr(self._local, "in_dummy", False)

    @contextlib.contextmanager
    def dummy(self) -> Iterator[None]:
        """The encoder forwards of this thread are of dummy clips, about which nothing was told and nothing is counted."""
        self._local.in_dummy = True
        try:
            with self.clips(None):
                yield
        finally:
            self._local.in_dummy = self._local.ran = False

    def pop_ran(self) -> bool:
        """Whether an encoder forward with gradients began in this thread since the last call."""
        ran = getattr(self._local, "ran", False)
        self._local.ran = False
        return ran

    def restore(self, layout: ClipLayout | None) -> None:
        """The backward at work in this thread is about to recompute blocks of the forward with this layout."""
        self._local.backward = (graph_task(), layout)

    def layout(self) -> ClipLayout | None:
        """The layout of the forward, or of the recomputation, that this thread is in; None when switched off.

        Raises:
            LayoutError: when a block runs outside of its encoder.
        """
        forward = getattr(self._local, "forward", None)
        if forward is not None:
            return forward[0]
        task, layout = getattr(self._local, "backward", (-1, None))
        if task != -1 and task == graph_task():
            return layout
        if not self.is_enabled:
            return None
        raise LayoutError(
            "a block with STA ran outside of its encoder's forward, so its clips can't be known. "
            "Call the encoder, or switch STA off with handle.disabled()."
        )

    def restore_on_backward(self, tensor: Tensor) -> None:
        """Put this forward's layout back when the gradient of `tensor`, which lies behind a block, has been computed."""
        if tensor.requires_grad:
            tensor.register_hook(_Restore(self, self.layout()))


class _Restore:
    """A gradient hook that changes nothing and puts a layout back."""

    def __init__(self, injection: Injection, layout: ClipLayout | None) -> None:
        self.injection = injection
        self.layout = layout

    def __call__(self, grad: Tensor) -> None:
        self.injection.restore(self.layout)
