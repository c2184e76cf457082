"""The hooks that put STA into a model; what they share is an `Injection`.

All hooks are objects of module-level classes, so that a copied or unpickled model has working hooks of its own.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from itertools import chain

import torch
from torch import Tensor, nn

from sta_adapter.attention.layout import ClipLayout, ClipLengths
from sta_adapter.attention.module import CHILD
from sta_adapter.compatibility.calls import Arguments, iterate_tensors, require_grad
from sta_adapter.compatibility.checkpointing import checkpoints_reentrantly, require_known_flags
from sta_adapter.compatibility.seams import active_ddp, drop_hooks, graph_task, hook_table, put_first, uncompiled
from sta_adapter.distributed import execution_device, is_parallel, require_averages
from sta_adapter.errors import InjectionError, LayoutError, STAWarning, UnknownClipsError
from sta_adapter.injection.backbone import EncoderCall
from sta_adapter.injection.state import Injection
from sta_adapter.injection.stream import continue_streams
from sta_adapter.injection.target import sta_modules, sta_trains
from sta_adapter.injection.told import take_clip_lengths

RESIDUAL = "residual"  # the keyword of fused norms that take a second summand of the stream


class Hook:
    """Base of all hooks: knows its injection."""

    def __init__(self, injection: Injection) -> None:
        self.injection = injection


class EncoderPreHook(Hook):
    """Forward pre-hook of the encoder: the forward begins, with its layout."""

    @uncompiled
    def __call__(self, encoder: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> Arguments:
        """Take `clip_lengths` away; with re-entrant checkpointing, see to it that gradients reach the blocks."""
        injection = self.injection
        injection.end()
        if vars(encoder).get("_is_replica", False):
            raise InjectionError(
                "this is a copy of nn.DataParallel's, which STA's weights don't follow to its device. transformers' Trainer wraps models so "
                "where one process sees several GPUs: start it by torchrun (one process a GPU), or set CUDA_VISIBLE_DEVICES to one."
            )
        injection.require_same_switch((args, kwargs))
        kwargs, told = take_clip_lengths(encoder, kwargs)
        injection.begin(self._layout(encoder, args, kwargs, told) if injection.is_enabled else None)
        if injection.is_enabled:
            self._come_first(encoder)
            self._look_at_gradients(encoder, (args, kwargs))
        if injection.is_enabled and torch.is_grad_enabled() and is_parallel() and (ddp := active_ddp()) is not None:
            stas = (module.parameters() for module in sta_modules(encoder, injection.spec).values())
            injection.thread.averaged = require_averages(chain.from_iterable(stas), ddp, injection.thread.averaged)
        if injection.is_enabled and torch.is_grad_enabled():
            injection.warn_of_training(encoder)
            if encoder.training and checkpoints_reentrantly(encoder):
                self._require_one_run()
                return require_grad(args, kwargs)
        return args, kwargs

    def _come_first(self, encoder: nn.Module) -> None:
        """Put the hooks of norms in front of others that came later (`prepend=True`, as FSDP2's) and may pass on a copy of the stream."""
        if self.injection.config.order != "after_spatial":
            return
        spec = self.injection.spec
        blocks = encoder.get_submodule(spec.blocks)._modules.values()  # children() costs the host ten times as much
        for block in blocks:
            try:
                norm = None if block is None else block._modules.get(spec.norm) or block.get_submodule(spec.norm)
            except AttributeError:  # the block was replaced, as where layers are left out
                continue
            if norm is not None and not isinstance(next(iter(norm._forward_pre_hooks.values()), None), NormPreHook):
                put_first(norm, lambda hook: isinstance(hook, NormPreHook))

    def _look_at_gradients(self, encoder: nn.Module, inputs: object) -> None:
        """Warn where the model trains and runs its encoder without gradients; a re-entrant checkpoint does so with inputs that need one."""
        if (
            self.injection.thread.model_with_grad
            and not torch.is_grad_enabled()
            and encoder.training
            and not any(tensor.requires_grad for tensor in iterate_tensors(inputs))
            and sta_trains(encoder, self.injection.spec)
        ):
            warnings.warn(
                f"STA gets no gradient from this forward: the model runs its {type(encoder).__name__} within torch.no_grad(), as for frozen "
                "encoders. Take that out of the model's code; what is frozen needs requires_grad_(False) alone.",
                STAWarning,
                stacklevel=4,
            )

    def _require_one_run(self) -> None:
        """Each run under re-entrant checkpointing has backwards of its own, and DDP averages gradients once."""
        if self.injection.thread.outputs and (ddp := active_ddp()) is not None and not ddp.static_graph:
            raise InjectionError(
                "the vision encoder runs more than once in one step, as for pictures and clips, under re-entrant checkpointing, and "
                "DistributedDataParallel would average the gradients of one run alone, so that each process trains weights of its own. Checkpoint "
                "with use_reentrant=False (gradient_checkpointing: true), or give DistributedDataParallel static_graph=True."
            )

    def _layout(
        self, encoder: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], told: ClipLengths | None
    ) -> ClipLayout:
        """The layout of this call, with all that the blocks need of it made ready."""
        injection = self.injection
        call = EncoderCall.bind(encoder, args, kwargs, told or injection.clip_lengths or injection.default_lengths)
        try:
            layout = injection.spec.dummy_layout(call) if injection.thread.in_dummy else injection.spec.layout(call)
        except UnknownClipsError as error:
            if graph_task() == -1:
                raise
            raise _told_before(encoder) from error
        if not isinstance(layout, ClipLayout):
            raise LayoutError(f"Backbone.layout returns a {type(layout).__name__}; expected a ClipLayout")
        if call.clip_lengths is None and layout.rows is not None and layout.max_frames > 1 and graph_task() != -1:
            raise _told_before(encoder)
        modules = sta_modules(encoder, injection.spec)
        if streams := injection.held_streams.value:
            layout = continue_streams(streams, call, layout, modules)
        prepared = set()  # blocks of one kind need the same tables and make the same calls; a stream tells blocks apart
        for module in modules.values():
            kind = module.num_heads, module.head_dim, id(module.config), module.placement
            if layout.past is not None or kind not in prepared:
                prepared.add(kind)
                injection.record_calls(module.prepare(layout))
        return layout


class EncoderPostHook(Hook):
    """Forward hook of the encoder, called also after an exception: the forward is over."""

    @uncompiled
    def __call__(self, encoder: nn.Module, args: tuple[object, ...], output: object) -> None:
        """Follow the outputs into the backward, and end the forward; streams go on, if it has not failed.

        Warns:
            STAWarning: a branch was not computed, or none of those that train gets a gradient.
        """
        try:
            if output is not None:
                self._check(encoder, output)
            layout = None if output is None else self.injection.layout()
            if layout is not None and layout.past is not None:
                layout.past.commit()
            self.injection.follow_outputs(output)
        finally:
            self.injection.end()

    def _check(self, encoder: nn.Module, output: object) -> None:
        injection = self.injection
        forward = injection.thread.forward
        if forward is None or forward.layout is None:
            return
        if forward.checkpointed:
            require_known_flags(encoder)
        name, found = type(encoder).__name__, ""
        where = "blocks" if injection.config.order == "before_spatial" else repr(injection.spec.norm)
        if not forward.branches and not forward.compiled:
            found = (
                f"STA was not computed in this forward of {name}: it called none of its {where} that have STA. "
                "Hooks don't see block.forward(...) called directly, nor a block that is left out."
            )
        elif forward.branches < forward.blocks and not forward.compiled:
            found = (
                f"STA was not computed in {forward.blocks - forward.branches} of {forward.blocks} blocks that ran in this forward of {name}: "
                f"their {where} was not called, or is another module than STA's hook went onto. Replace modules before injection."
            )
        elif encoder.training and forward.with_grad and torch.is_grad_enabled():
            tensors = list(iterate_tensors(output))
            if tensors and not any(t.requires_grad for t in tensors) and sta_trains(encoder, injection.spec):
                found = (
                    f"STA gets no gradient from this forward of {name}, whose output needs none: its blocks run without gradients, "
                    "or under re-entrant checkpointing of inputs that need none. Checkpoint with use_reentrant=False."
                )
        if found:
            warnings.warn(found, STAWarning, stacklevel=3)


class BlockPreHook(Hook):
    """Forward pre-hook of a block: follows its input; with order="before_spatial" adds the branch to it."""

    def __call__(self, block: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> Arguments | None:
        """Return new arguments, or None to leave them; the block's input is never changed in place."""
        injection = self.injection
        name, tokens = block_input(args, kwargs)
        if not torch.compiler.is_compiling():
            injection.begin_block(tokens)
        if injection.config.order != "before_spatial":
            return None
        layout = injection.layout()
        if layout is None:
            return None
        sta, residual = getattr(block, CHILD), kwargs.get(RESIDUAL)
        if "_hf_hook" in block.__dict__:  # accelerate's, of a device map, which moves them within the block's forward
            tokens = tokens.to(execution_device(block) or tokens.device)
        out = tokens.clone()
        stream = tokens + residual.to(tokens.device) if isinstance(residual, Tensor) else tokens
        layout.patches(out).add_(sta(layout.patches(stream), layout))
        return (args, {**kwargs, name: out}) if name else ((out, *args[1:]), kwargs)


class BlockPostHook(Hook):
    """Forward hook of a block: notes its output, which a model may take as it is, past the end of the encoder."""

    def __call__(self, block: nn.Module, args: tuple[object, ...], output: object) -> None:
        """Change nothing."""
        if not torch.compiler.is_compiling():
            self.injection.set_output(output)


class NormPreHook(Hook):
    """Forward pre-hook of the norm in front of a block's MLP: adds the branch to the residual stream, in place.

    The norm's input is the fresh sum of residual and spatial attention, so that the block's own residual sees the
    change. The hook runs inside of the block's forward and so of its checkpoint.

    The block is looked up for its STA module at each call: PEFT may have put a copy in its place. A copy of the norm
    alone (LN tuning, `modules_to_save`) keeps serving the same block; a copy of the whole block serves the copy.
    """

    def __init__(self, injection: Injection, block: nn.Module) -> None:
        super().__init__(injection)
        self.block = block

    def __call__(self, norm: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, object]) -> Arguments | None:
        """Add the branch to the first argument (..., C).

        A fused norm takes the residual as a second argument of the same shape and adds the two itself; the stream is their sum.
        There the branch is added to a copy: where the residual comes by its name either may be the block's own input (vLLM's norms), and a
        layer's output that a backward hook follows takes no change in place.
        """
        layout = self.injection.layout()
        if layout is None:
            return None
        summand = args[0]
        sta = getattr(self.block, CHILD)
        if isinstance(residual := kwargs.get(RESIDUAL), Tensor):
            summand, stream = residual.clone(), summand + residual
            layout.patches(summand).add_(sta(layout.patches(stream), layout))
            return args, {**kwargs, RESIDUAL: summand}
        if len(args) > 1 and isinstance(args[1], Tensor) and args[1].shape == summand.shape:
            stream, summand = summand + args[1], summand.clone()
            layout.patches(summand).add_(sta(layout.patches(stream), layout))
            return (summand, *args[1:]), kwargs
        stream = patches = layout.patches(summand)
        if torch.is_grad_enabled() and (summand.requires_grad or any(p.requires_grad for p in sta.parameters())):
            stream = patches.clone()
        patches.add_(sta(stream, layout))
        return None

    def __deepcopy__(self, memo: dict[int, object]) -> NormPreHook:
        if id(self.block) not in memo:
            return NormPreHook(self.injection, self.block)
        return NormPreHook(copy.deepcopy(self.injection, memo), copy.deepcopy(self.block, memo))


def remove_hooks(module: nn.Module, injection: Injection) -> None:
    """Take every hook of this injection off a module, also those that came with a copy of it."""
    drop_hooks(module, lambda hook: isinstance(hook, Hook) and hook.injection is injection)


def find_injections(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, Injection]]:
    """(encoder, injection) of every injected encoder among modules."""
    return [
        (module, hook.injection)
        for module in modules
        for hook in hook_table(module, "_forward_pre_hooks").values()
        if isinstance(hook, EncoderPreHook)
    ]


def block_input(args: tuple[object, ...], kwargs: dict[str, object]) -> tuple[str, Tensor]:
    """(keyword, or "" when it is the first positional argument; tensor) of a block's tokens.

    Raises:
        LayoutError: there is none.
    """
    if args and isinstance(args[0], Tensor):
        return "", args[0]
    for name, value in kwargs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            return name, value
    raise LayoutError("a block was called without a floating-point tensor; STA can't tell its tokens.")


def _told_before(encoder: nn.Module) -> UnknownClipsError:
    """The error for a second run of an encoder by a checkpoint, in which what was told of the first is over."""
    return UnknownClipsError(
        f"a checkpoint runs the whole {type(encoder).__name__} again in the backward, when what was told of its clips is over. Checkpoint "
        "its blocks, as gradient_checkpointing_enable() does, or give its call within the checkpoint clip_lengths=[...]."
    )
