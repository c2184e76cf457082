"""Whether the blocks of an encoder are what its backbone declares, looked at in a run of the backbone's dummy clip.

The hook of STA adds to the input of the norm in front of the MLP. That is right exactly if this input is the block's
residual stream: the norm's output kept as it was, what is added must come out of the block, unchanged and once. The
check does just that to the first and the last block, each run on its own with the tokens that reach the first one.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sta_adapter.attention.layout import ClipLayout
from sta_adapter.compatibility.calls import Arguments, iterate_tensors, map_tensors
from sta_adapter.distributed import is_sharded
from sta_adapter.errors import LayoutError
from sta_adapter.injection.backbone import Backbone, DummyInputs, EncoderCall
from sta_adapter.injection.hooks import RESIDUAL, block_input
from sta_adapter.injection.registry import is_built_in
from sta_adapter.injection.target import InjectionTarget, require_fit

logger = logging.getLogger(__name__)
FEW_TOKENS = 32  # enough for the verdict, and cheap for encoders whose dummy clip is large


class _Reached(Exception):
    """Ends the encoder's forward at its first block."""


def validate_target(target: InjectionTarget) -> None:
    """Run the backbone's dummy clip as far as the first block, and probe the blocks; the model stays as it is.

    Nothing is done for a backbone without `dummy_inputs`, whose first call is checked (`FirstCallPreHook`), or while
    parameters are on the meta device, or in parts on several processes (loaded under ZeRO-3). When a built-in
    backbone's dummy clip can't be run (an attention kernel that needs another device, say), that is logged.

    Raises:
        InjectionError: the blocks or the layout function are not as the backbone declares; lists all that was found.
    """
    spec = target.backbone
    if spec.dummy_inputs is None:
        return
    if any(t.is_meta for t in (*target.encoder.parameters(), *target.encoder.buffers())):
        logger.info("backbone %r is not checked: parameters are on the meta device", spec.name)
        return
    if is_sharded(target.encoder.parameters()):
        logger.info("backbone %r is not checked: parameters lie in parts on several processes", spec.name)
        return
    with _undisturbed(target.encoder):
        problems = _find_problems(target, spec.dummy_inputs)
    require_fit(spec, target.encoder, problems)


def validate_call(target: InjectionTarget, args: tuple[object, ...], kwargs: dict[str, object]) -> bool:
    """As `validate_target`, with the arguments of a real call; False when the encoder fails on them, as it will say itself.

    Raises:
        InjectionError: as for `validate_target`.
    """
    with _undisturbed(target.encoder):
        try:
            problems = _problems_of_blocks(target, _first_block_call(target, args, kwargs))
        except Exception as error:
            logger.info("backbone %r is not checked yet: %s: %s", target.backbone.name, type(error).__name__, error)
            return False
    require_fit(target.backbone, target.encoder, problems)
    return True


@contextlib.contextmanager
def _undisturbed(encoder: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; modes and random states are put back."""
    modes = [(module, module.training) for module in encoder.modules()]
    devices = sorted({p.device.index or 0 for p in encoder.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            for module, _ in modes:
                module.training = False
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _find_problems(target: InjectionTarget, dummy_inputs: DummyInputs) -> list[str]:
    spec = target.backbone
    try:
        args, kwargs = found = dummy_inputs(target.encoder)
        if not isinstance(args, (tuple, list)) or not isinstance(kwargs, Mapping):
            kinds = ", ".join(type(part).__name__ for part in found)
            return [
                f"Backbone.dummy_inputs returns ({kinds}); expected the encoder's arguments, ((first, ...), {{name: ...}})"
            ]
        call = _first_block_call(target, args, kwargs)
    except Exception as error:
        return _unable(spec, "the encoder can't run on Backbone.dummy_inputs", error)
    tokens = next(iterate_tensors(call), None)
    problems = (
        [] if tokens is None else _layout_problems(target, EncoderCall.bind(target.encoder, args, kwargs, None), tokens)
    )
    try:
        return problems + _problems_of_blocks(target, call)
    except Exception as error:
        return problems + _unable(spec, "block 0 can't run", error)


def _problems_of_blocks(target: InjectionTarget, call: Arguments | None) -> list[str]:
    """What is wrong with the first block and the last, when they get what the first is called with."""
    spec = target.backbone
    if call is None:
        return [f"its forward does not call the first of Backbone.blocks={spec.blocks!r}"]
    tokens = next(iterate_tensors(call), None)
    if tokens is None or tokens.dim() not in (2, 3) or not tokens.is_floating_point():
        shape = None if tokens is None else tuple(tokens.shape)
        return [f"its blocks' first tensor has the shape {shape}; expected tokens (tokens, C) or (rows, tokens, C)"]
    try:
        block_input(*call)
    except LayoutError:
        return ["its blocks get their tokens within something else; expected a tensor, the first argument or by name"]
    few = _fewer_tokens(call, tokens)
    try:
        problems = _block_problems(target, 0, few)
    except Exception:  # a block with windows, for one, is told how many there are
        few, problems = call, _block_problems(target, 0, call)
    if not problems and len(target.blocks) > 1:
        try:
            problems += _block_problems(target, len(target.blocks) - 1, few)
        except Exception as error:
            logger.info("backbone %r: the last block is not checked: %s: %s", spec.name, type(error).__name__, error)
    return problems


def _unable(spec: Backbone, what: str, error: Exception) -> list[str]:
    """A problem, or only a line in the log for a backbone of ours, whose spec is tested."""
    text = f"{what}: {type(error).__name__}: {error}"
    if is_built_in(spec):
        logger.info("backbone %r is not checked: %s", spec.name, text)
        return []
    return [text]


def _first_block_call(
    target: InjectionTarget, args: tuple[object, ...], kwargs: Mapping[str, object]
) -> Arguments | None:
    """What the encoder calls its first block with; None when it does not call it.

    Blocks that vLLM may compile have a `__call__` that goes past their hooks, straight to `forward`.
    """
    found: list[Arguments] = []
    first = target.blocks[0]
    own = {name: value for name, value in vars(first).items() if name == "forward"}

    def capture(block: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        found.append((args, kwargs))
        raise _Reached

    hook = first.register_forward_pre_hook(capture, with_kwargs=True, prepend=True)
    vars(first)["forward"] = lambda *args, **kwargs: capture(first, args, kwargs)
    try:
        target.encoder(*args, **kwargs)
    except _Reached:
        return found[0]
    finally:
        hook.remove()
        vars(first).pop("forward")
        vars(first).update(own)
    return None


def _layout_problems(target: InjectionTarget, call: EncoderCall, tokens: Tensor) -> list[str]:
    try:
        layout = target.backbone.dummy_layout(call)
    except Exception as error:
        return _unable(target.backbone, "Backbone.layout fails on Backbone.dummy_inputs", error)
    if not isinstance(layout, ClipLayout):
        return [f"Backbone.layout returns a {type(layout).__name__}; expected a ClipLayout"]
    try:
        layout.require_rows(tokens)
    except LayoutError as error:
        return [str(error)]
    rows = tokens.shape[0] if tokens.dim() == 3 else 1
    if layout.num_tokens + rows * (layout.prefix + layout.suffix) != tokens.shape[:-1].numel():
        return [
            f"Backbone.layout returns {layout} for Backbone.dummy_inputs, {layout.num_tokens} tokens and {layout.prefix + layout.suffix} "
            f"class tokens a row, but the blocks get tokens of the shape {tuple(tokens.shape)}"
        ]
    return []


def _fewer_tokens(call: Arguments, tokens: Tensor) -> Arguments:
    """The call with few of its tokens, where nothing else in it depends on their number."""
    if sum(1 for _ in iterate_tensors(call)) > 1 or tokens.shape[-2] <= FEW_TOKENS:
        return call
    few = tokens[..., :FEW_TOKENS, :]
    args, kwargs = call
    return tuple(few if a is tokens else a for a in args), {k: few if v is tokens else v for k, v in kwargs.items()}


def _block_problems(target: InjectionTarget, index: int, call: Arguments) -> list[str]:
    """What is wrong with a block's norm, from two runs of the block."""
    name = f"{target.backbone.norm!r} of block {index}"
    block, norm = target.blocks[index], target.norms[index]
    first = _run_block(block, norm, call)
    if len(first.inputs) != 1:
        return [
            f"{name} is called {len(first.inputs)} times in the block's forward; expected once, in front of the MLP"
        ]
    stream, normed = first.inputs[0], first.normed[0]
    if not isinstance(stream, Tensor):
        return [f"{name} is called without a tensor as its first positional argument"]
    if stream.shape != first.tokens.shape:
        found, expected = tuple(stream.shape), tuple(first.tokens.shape)
        return [f"{name} gets a tensor of the shape {found}, where the block's tokens are {expected}"]
    if first.shares_input:
        return [f"{name} gets the block's own input: it stands in front of spatial attention, not of the MLP"]
    before = first.output(stream)
    scale = before.abs().max().clamp(min=1, max=1000 if stream.dtype == torch.float16 else None)
    delta = (torch.arange(stream.numel(), device=stream.device) * 0.7).cos().view(stream.shape) * scale
    delta = delta.to(stream.dtype)
    change = _run_block(block, norm, call, delta, normed).output(stream) - before
    if not change.isfinite().all():
        logger.info("backbone %r is not checked: block %d gives NaN or infinity", target.backbone.name, index)
        return []
    tolerance = 1e-3 if torch.finfo(stream.dtype).eps < 1e-4 else 5e-2
    if ((change - delta.float()).abs() <= tolerance * (scale + before.abs())).all():
        return []
    if not change.abs().max() > tolerance * scale:
        return [
            f"what is added to the input of {name} does not come out of the block: the norm gets a copy of the residual "
            "stream, or the block is post-norm (norms behind the sums), which STA can't serve"
        ]
    return [
        f"what is added to the input of {name} comes out of the block changed: it is not the last norm in front of the "
        "MLP, or the block is not pre-norm"
    ]


@dataclass
class _BlockRun:
    """What a run has shown."""

    tokens: Tensor  # the block's input
    # what its norm got, once for each call; None for a call without a tensor
    inputs: list[Tensor | None] = field(default_factory=list)
    normed: list[Tensor] = field(default_factory=list)  # what its norm gave
    shares_input: bool = False  # whether the norm got the block's own input, not a fresh sum
    result: object = None  # what the block gave

    def output(self, like: Tensor) -> Tensor:
        """The block's output; where it returns the branch and the residual apart (fused norms), their sum."""
        parts = [t.float() for t in iterate_tensors(self.result) if t.shape == like.shape and t.is_floating_point()]
        return torch.stack(parts).sum(0) if parts else torch.zeros_like(like, dtype=torch.float32)


def _run_block(
    block: nn.Module, norm: nn.Module, call: Arguments, delta: Tensor | None = None, normed: Tensor | None = None
) -> _BlockRun:
    """Run a block on a copy of its arguments, with `delta` added to what its norm gets, or `normed` in place of its result."""
    args = tuple(map_tensors(Tensor.clone, value) for value in call[0])  # they may be changed in place
    kwargs = {name: map_tensors(Tensor.clone, value) for name, value in call[1].items()}
    run = _BlockRun(next(iterate_tensors((args, kwargs))))

    def before(norm: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> Arguments | None:
        residual = kwargs.get(RESIDUAL)
        stream = residual if isinstance(residual, Tensor) else args[0] if args else None
        if not isinstance(stream, Tensor):
            run.inputs.append(None)
            return None
        run.inputs.append(stream.clone())
        if stream is residual:
            return args, {**kwargs, RESIDUAL: stream if delta is None else stream + delta}
        run.shares_input |= stream.untyped_storage()._cdata == run.tokens.untyped_storage()._cdata
        if delta is not None:
            stream.add_(delta)
        return None

    def after(norm: nn.Module, args: tuple[object, ...], output: Tensor | tuple[object, ...]) -> object:
        first = output if isinstance(output, Tensor) else next(iterate_tensors(output))
        run.normed.append(first.clone())
        if normed is None:
            return None
        return normed if isinstance(output, Tensor) else (normed, *output[1:])

    hooks = [norm.register_forward_pre_hook(before, with_kwargs=True), norm.register_forward_hook(after)]
    try:
        run.result = block(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return run
