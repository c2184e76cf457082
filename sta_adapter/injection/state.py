"""The record that all hooks of one injection share: settings, switch, and per thread the layout at work.

An encoder's forward has one layout. The encoder's hook reads it and puts it into the record, per thread; the blocks'
hooks take it from there, and it is gone when the encoder returns or fails. A block that activation checkpointing runs
again during backward finds the layout of *its* forward: gradient hooks on the tensors between the blocks put it back
just before the block's backward starts, valid for that backward only. Where nothing is checkpointed there are no such
hooks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sta_adapter.adapter.base_marks import BaseMarks, mark_base
from sta_adapter.attention.explain import KernelCall
from sta_adapter.attention.layout import ALL_ROWS, ClipLayout, ClipLengths
from sta_adapter.attention.module import TemporalAttention
from sta_adapter.compatibility.calls import iterate_tensors
from sta_adapter.compatibility.checkpointing import inside_checkpoint
from sta_adapter.compatibility.seams import graph_task
from sta_adapter.config import STAConfig
from sta_adapter.errors import InjectionError, LayoutError, STAWarning
from sta_adapter.injection.backbone import Backbone
from sta_adapter.injection.steps import StepsOfModel
from sta_adapter.injection.told import Held, Told
from sta_adapter.injection.training_start import remarks_at_start

if TYPE_CHECKING:
    from sta_adapter.injection.data_parallel import AddOnce
    from sta_adapter.injection.stream import Stream

CALLS_KEPT = 256


@dataclasses.dataclass
class EncoderForward:
    """One forward of the encoder."""

    layout: ClipLayout | None  # of its tokens; None where the branch is switched off
    with_grad: bool  # whether it began with gradients
    branches: int = 0  # how many branches were asked for; in a compiled graph they are not counted
    compiled: bool = False  # whether a branch was asked for within one
    blocks: int = 0  # how many blocks' hooks have run; none do inside of a compiled graph
    checkpointed: bool = False  # whether the branch of one of these blocks will be computed again in the backward
    output: object = None  # of the block that ran last


@dataclasses.dataclass
class ThreadState:
    """What one thread knows of an injection."""

    forward: EncoderForward | None = None  # the encoder forward at work
    # (the backward at work, the layout of the blocks that it runs again)
    backward: tuple[int, ClipLayout | None] = (-1, None)
    # what the encoder gave in the full model's forward, where that must reach all of it
    outputs: list[Tensor] | None = None
    model_with_grad: bool = False  # whether the full model's forward is at work, and began with gradients
    to_embed: AddOnce | None = None  # the hook that adds something where the language model embeds its tokens
    in_dummy: bool = False  # whether the encoder forward is one of a dummy clip
    in_check: bool = False  # whether the encoder and its blocks are run to be looked at, before their first forward
    ran: bool = False  # whether an encoder forward with gradients began since `pop_ran`
    averaged: tuple[int, ...] = ()  # the DDP that was looked at last, and the parameters that it averages, by their ids


class Injection:
    """What the hooks of one injection share: configuration, backbone and, per thread, the layout at work."""

    def __init__(self, config: STAConfig, spec: Backbone, depth: int = 0) -> None:
        self.config = config
        self.spec = spec
        self.enabled = True
        self.depth = depth  # how many blocks the encoder had when STA went in; 0 where that isn't known
        self.base_marks: BaseMarks = {}  # of the model that STA went into, see sta_adapter.adapter.base_marks
        self.calls: dict[KernelCall, None] = {}  # of the attention kernel, see STAHandle.explain
        self.told = Told()
        self.held_off = Held(False)  # by an open `disabled()`
        self.held_streams: Held[Sequence[Stream]] = Held(())  # whose next frames the forwards bring
        self._first_runs: set[bool] = set()  # whether it was switched on in first runs, see `require_same_switch`
        self._threads = threading.local()

    def __getstate__(self) -> dict[str, object]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_threads", "_handle", "_model", "_steps")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state, _threads=threading.local())

    @property
    def thread(self) -> ThreadState:
        """What this thread knows."""
        threads = self._threads  # in objects of a derived class torch 2.4's compiler finds no attribute
        if not hasattr(threads, "state"):
            threads.state = ThreadState()
        state: ThreadState = threads.state
        return state

    @property
    def is_enabled(self) -> bool:
        """Whether the branch runs here."""
        return self.enabled and not self.held_off.value

    def disabled(self) -> contextlib.AbstractContextManager[None]:
        """Switch the branch off in a `with` block."""
        return self.held_off.holding(True)

    def require_same_switch(self, inputs: object) -> None:
        """To be called of each encoder forward, with its arguments.

        A re-entrant checkpoint around the whole encoder runs it without gradients, on tensors that need one, and in the backward once
        more. Nothing tells the two runs of a forward from those of another one.

        Raises:
            InjectionError: the branch is switched on in such a second run and was off in some first run, or the other way round.
        """
        if not torch.is_grad_enabled():
            if not self.thread.in_check and any(tensor.requires_grad for tensor in iterate_tensors(inputs)):
                self._first_runs.add(self.is_enabled)
        elif graph_task() != -1 and self._first_runs - {self.is_enabled}:
            now, before = ("on", "off") if self.is_enabled else ("off", "on")
            raise InjectionError(
                f"a checkpoint runs the whole encoder again in the backward with STA switched {now}, and STA was {before} when one ran it first, so "
                "that the gradients may be of another forward. Checkpoint its blocks, as gradient_checkpointing_enable() does, or "
                "use_reentrant=False."
            )

    @property
    def clip_lengths(self) -> ClipLengths | None:
        """Frames of each clip, as the user or the full model's call told them."""
        return self.told.lengths()

    def clips(self, lengths: ClipLengths | None) -> contextlib.AbstractContextManager[None]:
        """Tell the frames of each clip for the forwards in a `with` block."""
        return self.told.clips(lengths)

    def watch(self, model: nn.Module, modules: Mapping[int, TemporalAttention]) -> None:
        """Remember model and STA as they are now, for `warn_of_training`; a copy or an unpickled model is not watched."""
        self.base_marks = mark_base(model)
        start = {index: mark_base(module.to_out) for index, module in modules.items()}
        self.__dict__["_model"] = weakref.ref(model), start
        self.told.model = weakref.ref(model)

    def warn_of_training(self, encoder: nn.Module) -> None:
        """Say at the first forwards of a training that STA takes no part, and what of it an adapter can't hold, not hours later.

        To be called of each forward with gradients; one in eval mode is of a training where an optimizer has made a step before, as in loops that
        leave a model in the mode in which `from_pretrained` gives it.
        """
        reference, start = self.__dict__.get("_model", (lambda: None, {}))
        steps: StepsOfModel | None = self.__dict__.get("_steps")
        if (model := reference()) is not None and steps is None:
            steps = self.__dict__["_steps"] = StepsOfModel(encoder, self.spec, model)
        if steps is None:
            return
        remarks = [steps.remark()]
        if model is not None and (encoder.training or steps.begun):
            del self.__dict__["_model"]
            remarks += remarks_at_start(encoder, self.spec, model, self.base_marks, start)
        for remark in filter(None, remarks):
            warnings.warn(remark, STAWarning, stacklevel=2)

    @property
    def default_lengths(self) -> ClipLengths | None:
        """Frames of each clip where nobody has told them: a single stream takes all rows."""
        return ALL_ROWS if len(self.held_streams.value) == 1 else None

    def record_calls(self, calls: Iterable[KernelCall]) -> None:
        """A block makes these calls of the attention kernel; the latest kinds are kept."""
        self.calls.update(dict.fromkeys(calls))
        for call in list(self.calls)[:-CALLS_KEPT]:  # a copy: another thread may add to it meanwhile
            self.calls.pop(call, None)

    def begin(self, layout: ClipLayout | None) -> None:
        """An encoder forward starts in this thread; None when the branch is switched off."""
        thread = self.thread
        thread.forward = EncoderForward(layout, torch.is_grad_enabled())
        thread.ran = thread.ran or torch.is_grad_enabled()

    def end(self) -> None:
        """The encoder forward of this thread is over."""
        self.thread.forward = None

    def begin_block(self, tokens: Tensor) -> None:
        """A block starts on these tokens; not to be called inside of a compiled graph.

        The gradient of a block's tokens is there just before the block in front of it runs again: where that was
        checkpointed, the layout is put back then.
        """
        forward = self.thread.forward
        if forward is None:  # in a backward, where a part of what runs again may be checkpointed within
            self.restore_on_backward(tokens, self.layout())
            return
        if forward.checkpointed:
            self.restore_on_backward(tokens, forward.layout)
        forward.blocks += 1

    def set_output(self, output: object) -> None:
        """A block gave this output. One that runs again within a larger checkpoint may be checkpointed itself: it is followed."""
        if self.thread.forward is not None:
            self.thread.forward.output = output
            return
        for tensor in iterate_tensors(output):
            self.restore_on_backward(tensor, self.layout())

    def follow_outputs(self, output: object) -> None:
        """Put the layout back before the last block runs again: when the gradient of what came out has been computed.

        A model may take the last block's output as it is, past the end of the encoder; it is followed as well.
        """
        forward = self.thread.forward
        if forward is not None and torch.is_grad_enabled() and (forward.checkpointed or not forward.blocks):
            for tensor in iterate_tensors((output, forward.output)):
                self.restore_on_backward(tensor, forward.layout)

    def restore_on_backward(self, tensor: Tensor, layout: ClipLayout | None) -> None:
        """Put a layout back when the gradient of `tensor`, which lies behind a block, has been computed."""
        if tensor.requires_grad:
            tensor.register_hook(_Restore(self, layout))

    def layout(self) -> ClipLayout | None:
        """The layout of the forward, or of the recomputation, that this thread is in; None when switched off.

        Asked for where a branch is computed, which tells as well whether it will be computed again.

        Raises:
            LayoutError: when a block runs outside of its encoder.
        """
        thread = self.thread
        if (forward := thread.forward) is not None:
            if torch.compiler.is_compiling():
                forward.compiled = True
                return forward.layout
            forward.branches += 1
            if forward.with_grad and not forward.checkpointed:
                forward.checkpointed = inside_checkpoint()
            return forward.layout
        task, layout = thread.backward
        if task != -1 and task == graph_task():
            return layout
        if not self.is_enabled:
            return None
        raise LayoutError(
            "a block with STA ran outside of its encoder's forward, so its clips can't be known. "
            "Call the encoder, or switch STA off with handle.disabled()."
        )

    @contextlib.contextmanager
    def dummy(self) -> Iterator[None]:
        """The encoder forwards of this thread are of dummy clips, about which nothing was told and nothing is counted."""
        thread = self.thread
        thread.in_dummy = True
        try:
            with self.clips(None):
                yield
        finally:
            thread.in_dummy = thread.ran = False

    def pop_ran(self) -> bool:
        """Whether an encoder forward with gradients began in this thread since the last call."""
        ran, self.thread.ran = self.thread.ran, False
        return ran


class _Restore:
    """A gradient hook that changes nothing and puts a layout back: the backward at work is about to run blocks of its forward again."""

    def __init__(self, injection: Injection, layout: ClipLayout | None) -> None:
        self.injection = injection
        self.layout = layout

    def __call__(self, grad: Tensor) -> None:
        self.injection.thread.backward = (graph_task(), self.layout)
