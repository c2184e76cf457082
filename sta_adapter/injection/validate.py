"""Whether a model can be injected into: nothing wraps it yet, and its blocks are what its backbone declares.

The blocks are looked at in a run of the backbone's dummy clip.

The hook of STA adds to the input of the norm in front of the MLP. That is right exactly if this input is the block's
residual stream: the norm's output kept as it was, what is added must come out of the block, unchanged and once. The
check does just that to the first and the last block, each run on its own with the tokens that reach the first one.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from sta_adapter.attention.layout import ClipLayout
from sta_adapter.errors import InjectionError
from sta_adapter.injection.backbone import Backbone, DummyInputs, EncoderCall
from sta_adapter.injection.block_run import run_block
from sta_adapter.injection.nested import Arguments, iterate_tensors
from sta_adapter.injection.target import InjectionTarget

logger = logging.getLogger(__name__)
WRAPPERS = {
    "DistributedDataParallel": "before wrapping the model in DistributedDataParallel",
    "DataParallel": "and train with DistributedDataParallel, which nn.DataParallel's copies of modules don't replace",
    "FullyShardedDataParallel": "before wrapping the model in FullyShardedDataParallel",
    "FSDPModule": "before fully_shard(model)",
    "DeepSpeedEngine": "before deepspeed.initialize",
    "OptimizedModule": "into the original model, then torch.compile it",
}
FEW_TOKENS = 32  # enough for the verdict, and cheap for encoders whose dummy clip is large


def refuse_wrapped(model: nn.Module) -> None:
    """Refuse models whose wrapper would not see parameters that come later.

    Raises:
        InjectionError: naming the wrapper, and what to do instead.
    """
    for module in model.modules():
        for cls in type(module).__mro__:
            if cls.__name__ in WRAPPERS and not cls.__module__.startswith("sta_adapter"):
                raise InjectionError(
                    f"the model is wrapped in {cls.__name__} already, which would not synchronise, shard or compile STA's "
                    f"parameters. Inject {WRAPPERS[cls.__name__]}."
                )
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise InjectionError(f"{type(module).__name__} is compiled already. Inject first, then call compile().")


class _Reached(Exception):
    """Ends the encoder's forward at its first block."""


def validate_target(target: InjectionTarget) -> None:
    """Run the backbone's dummy clip as far as the first block, and probe the blocks; the model stays as it is.

    Nothing is done for a backbone without `dummy_inputs`, whose first call is checked (`FirstCallPreHook`), or while
    parameters are on the meta device. When a built-in backbone's dummy clip can't be run (an attention kernel that
    needs another device, say), that is logged.

    Raises:
        InjectionError: the blocks or the layout function are not as the backbone declares; lists all that was found.
    """
    spec = target.backbone
    if spec.dummy_inputs is None:
        return
    if any(t.is_meta for t in (*target.encoder.parameters(), *target.encoder.buffers())):
        logger.info("backbone %r is not checked: parameters are on the meta device", spec.name)
        return
    with _undisturbed(target.encoder):
        problems = _find_problems(target, spec.dummy_inputs)
    _refuse(target, problems)


def validate_call(target: InjectionTarget, args: tuple[object, ...], kwargs: dict[str, object]) -> bool:
    """As `validate_target`, with the arguments of a real call; False when the encoder fails on them, as it will say itself.

    Raises:
        InjectionError: as for `validate_target`.
    """
    with _undisturbed(target.encoder):
        try:
            call = _first_block_call(target, args, kwargs)
            if call is None:
                problems = [f"its forward does not call the first of Backbone.blocks={target.backbone.blocks!r}"]
            else:
                problems = _problems_of_blocks(target, call, next(iterate_tensors(call), None))
        except Exception as error:
            logger.info("backbone %r is not checked yet: %s: %s", target.backbone.name, type(error).__name__, error)
            return False
    _refuse(target, problems)
    return True


def _refuse(target: InjectionTarget, problems: list[str]) -> None:
    if problems:
        raise InjectionError(
            f"backbone {target.backbone.name!r} does not fit {type(target.encoder).__name__}: {'; '.join(problems)}."
        )


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
        args, kwargs = dummy_inputs(target.encoder)
        call = _first_block_call(target, args, kwargs)
    except Exception as error:
        return _unable(spec, "the encoder can't run on Backbone.dummy_inputs", error)
    if call is None:
        return [f"its forward does not call the first of Backbone.blocks={spec.blocks!r}"]
    tokens = next(iterate_tensors(call), None)
    problems = (
        [] if tokens is None else _layout_problems(target, EncoderCall.bind(target.encoder, args, kwargs, None), tokens)
    )
    try:
        return problems + _problems_of_blocks(target, call, tokens)
    except Exception as error:
        return problems + _unable(spec, "block 0 can't run", error)


def _problems_of_blocks(target: InjectionTarget, call: Arguments, tokens: Tensor | None) -> list[str]:
    """What is wrong with the first block and the last, when they get what the first is called with."""
    spec = target.backbone
    if tokens is None or tokens.dim() not in (2, 3) or not tokens.is_floating_point():
        shape = None if tokens is None else tuple(tokens.shape)
        return [f"its blocks' first tensor has the shape {shape}; expected tokens (tokens, C) or (rows, tokens, C)"]
    call = _fewer_tokens(call, tokens)
    problems = _block_problems(target, 0, call)
    if not problems and len(target.blocks) > 1:
        try:
            problems += _block_problems(target, len(target.blocks) - 1, call)
        except Exception as error:
            logger.info("backbone %r: the last block is not checked: %s: %s", spec.name, type(error).__name__, error)
    return problems


def _unable(spec: Backbone, what: str, error: Exception) -> list[str]:
    """A problem, or only a line in the log for a backbone of ours, whose spec is tested."""
    text = f"{what}: {type(error).__name__}: {error}"
    if all(getattr(f, "__module__", "").startswith("sta_adapter.") for f in (spec.layout, spec.heads)):
        logger.info("backbone %r is not checked: %s", spec.name, text)
        return []
    return [f"{text}"]


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
    rows = tokens.shape[0] if tokens.dim() == 3 else 1
    if layout.num_tokens + rows * layout.prefix != tokens.shape[:-1].numel():
        return [
            f"Backbone.layout returns {layout} for Backbone.dummy_inputs, {layout.num_tokens} tokens and {layout.prefix} "
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
    first = run_block(block, norm, call)
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
    change = run_block(block, norm, call, delta, normed).output(stream) - before
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
