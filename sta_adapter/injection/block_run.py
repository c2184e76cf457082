"""One run of a block on its own, with what its norm got and gave; also with something added to what the norm gets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sta_adapter.injection.hooks import RESIDUAL
from sta_adapter.injection.nested import iterate_tensors, map_tensors

__all__ = ["BlockCall", "BlockRun", "run_block"]

BlockCall = tuple[tuple[Any, ...], dict[str, Any]]


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
    inputs: list[Any] = field(default_factory=list)
    normed: list[Tensor] = field(default_factory=list)
    shares_input: bool = False
    result: Any = None

    def output(self, like: Tensor) -> Tensor:
        """The block's output; where it returns the branch and the residual apart (fused norms), their sum."""
        parts = [t.float() for t in iterate_tensors(self.result) if t.shape == like.shape and t.is_floating_point()]
        return torch.stack(parts).sum(0) if parts else torch.zeros_like(like, dtype=torch.float32)


def run_block(
    block: nn.Module, norm: nn.Module, call: BlockCall, delta: Tensor | None = None, normed: Tensor | None = None
) -> BlockRun:
    """Run a block, whose arguments stay as they are.

    Args:
        block: the block.
        norm: its norm in front of the MLP.
        call: the block's arguments.
        delta: added in place to what the norm gets.
        normed: put in the place of what the norm gives.
    """
    args, kwargs = map_tensors(Tensor.clone, call)  # they may be changed in place
    run = BlockRun(next(iterate_tensors((args, kwargs))))

    def before(norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        named = isinstance(kwargs.get(RESIDUAL), Tensor)
        stream = kwargs[RESIDUAL] if named else args[0] if args and isinstance(args[0], Tensor) else None
        run.inputs.append(stream if stream is None else stream.clone())
        if stream is None:
            return None
        if named:
            return args, {**kwargs, RESIDUAL: stream if delta is None else stream + delta}
        run.shares_input |= stream.untyped_storage().data_ptr() == run.tokens.untyped_storage().data_ptr()
        if delta is not None:
            stream.add_(delta)
        return None

    def after(norm: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
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
