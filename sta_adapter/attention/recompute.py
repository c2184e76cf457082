"""What a backward computes again instead of keeping it: cheap to compute, as large as the tokens.

Of each STA branch the forward keeps the tokens, their q, k, v and the heads' output; not the normed tokens, the rotated
q and k, or the attention weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sta_adapter.compatibility.seams import is_hooked


def recomputed(function: Callable[..., Tensor], tensor: Tensor, *args: Any) -> Tensor:
    """`function(tensor, *args)`, of which the backward keeps only `tensor`.

    Nothing is done without gradients, or inside `torch.compile`, which chooses by itself what to keep.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return function(tensor, *args)
    return checkpoint(function, tensor, *args, use_reentrant=False, preserve_rng_state=False)


def project_normed(norm: Any, linear: Any, tokens: Tensor) -> Tensor:
    """`linear(norm(tokens))`, of which the backward keeps `tokens` (..., C), not the normed ones.

    Modules that are not plain, such as one with hooks or inside a LoRA layer, are called as they are.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not _is_plain(norm, linear):
        return cast("Tensor", linear(norm(tokens.to(linear.weight.dtype))))
    return cast(
        "Tensor",
        _ProjectNormed.apply(tokens, norm.weight, getattr(norm, "bias", None), linear.weight, linear.bias, norm.eps),
    )


def _is_plain(norm: Any, linear: Any) -> bool:
    plain = type(norm) in (nn.LayerNorm, nn.RMSNorm) and type(linear) is nn.Linear
    return plain and not (is_hooked(norm) or is_hooked(linear))


def _normalize(tokens: Tensor, scale: Tensor, shift: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    tokens = tokens.to(dtype)
    if shift is None:
        return F.rms_norm(tokens, scale.shape, scale, eps)
    return F.layer_norm(tokens, scale.shape, scale, shift, eps)


class _ProjectNormed(torch.autograd.Function):
    """Linear layer behind a norm; the backward norms again."""

    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, scale: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
    ) -> Tensor:
        ctx.save_for_backward(tokens, scale, shift, weight)
        ctx.eps = eps
        return F.linear(_normalize(tokens, scale, shift, eps, weight.dtype), weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tokens, scale, shift, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        inputs: list[Any] = [None if x is None else x.detach().requires_grad_() for x in (tokens, scale, shift)]
        with torch.enable_grad():
            normed = _normalize(inputs[0], inputs[1], inputs[2], ctx.eps, weight.dtype)
        flat = grad.flatten(0, -2)
        to_weight = flat.t() @ normed.detach().flatten(0, -2).to(grad.dtype) if needs[3] else None
        wanted = [x for x, need in zip(inputs, needs, strict=False) if x is not None and need]
        if wanted:
            through = (grad @ weight.to(grad.dtype)).to(normed.dtype)
            found = iter(torch.autograd.grad(normed, wanted, through))
        to_inputs = [next(found) if x is not None and need else None for x, need in zip(inputs, needs, strict=False)]
        return *to_inputs, to_weight, flat.sum(0) if needs[4] else None, None
