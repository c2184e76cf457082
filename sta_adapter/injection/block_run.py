"""One run of a block on its own, with what its norm got and gave; also with something added to what the norm gets."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sta_adapter.injection.hooks import RESIDUAL
from sta_adapter.injection.nested import Arguments, iterate_tensors, map_tensors

__all__ = ["BlockRun", "run_block"]


@dataclass
class BlockRun:
    """What a run has shown.

    Attributes:
        tokens: the block's input.
        inputs: what its norm got, once for each call; None for a call without a tensor.
        normed: what its norm gave.
        shares_input: whether the norm got the block's own input, not a fresh sum.
        result: what the block gave.
    """

    tokens: Tensor
    inputs: list[Tensor | None] = field(default_factory=list)
    normed: list[Tensor] = field(default_factory=list)
    shares_input: bool = False
    result: object = None

    def output(self, like: Tensor) -> Tensor:
        """The block's output; where it returns the branch and the residual apart (fused norms), their sum."""
        parts = [t.float() for t in iterate_tensors(self.result) if t.shape == like.shape and t.is_floating_point()]
        return torch.stack(parts).sum(0) if parts else torch.zeros_like(like, dtype=torch.float32)


def run_block(
    block: nn.Module, norm: nn.Module, call: Arguments, delta: Tensor | None = None, normed: Tensor | None = None
) -> BlockRun:
    """Run a block, whose arguments stay as they are.

    Args:
        block: the block.
        norm: its norm in front of the MLP.
        call: the block's arguments.
        delta: added in place to what the norm gets.
        normed: put in the place of what the norm gives.
    """
    args = tuple(map_tensors(Tensor.clone, value) for value in call[0])  # they may be changed in place
    kwargs = {name: map_tensors(Tensor.clone, value) for name, value in call[1].items()}
    run = BlockRun(next(iterate_tensors((args, kwargs))))

    def before(norm: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> Arguments | None:
        residual = kwargs.get(RESIDUAL)
        stream = residual if isinstance(residual, Tensor) else args[0] if args else None
        if not isinstance(stream, Tensor):
            run.inputs.append(None)
            return None
        run.inputs.append(stream.clone())
        if stream is residual:
            return args, {**kwargs, RESIDUAL: stream if delta is None else stream + delta}
        run.shares_input |= stream.untyped_storage().data_ptr() == run.tokens.untyped_storage().data_ptr()
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
