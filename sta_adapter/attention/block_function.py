"""The branch of one block as a single autograd function, with a written backward; and where it can't stand for the layers.

A branch of separate operations costs the host more than the arithmetic of a short clip does. Of each branch the forward
keeps the tokens, their v, their q and k, rotated, and the heads' output; the normed tokens and the attention weights are as
large and cheap to compute again. What needs no gradient gets none computed.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from sta_adapter.attention.frame_attention import FrameAttention, mix_frames
from sta_adapter.attention.kernels import step_back
from sta_adapter.attention.layout import ClipLayout
from sta_adapter.compatibility.seams import calls_are_watched, is_hooked, operations_are_watched, outputs_are_kept
from sta_adapter.config import STAConfig

if TYPE_CHECKING:
    from sta_adapter.attention.module import TemporalAttention

PLAIN = (nn.Parameter, Tensor, FakeTensor)  # the last ones have shapes and no values, for `sta-adapter plan`
NORMS = (nn.LayerNorm, nn.RMSNorm)


class Weights(NamedTuple):
    """The parameters of a branch."""

    norm: Tensor
    norm_bias: Tensor | None
    to_qkv: Tensor
    qkv_bias: Tensor | None
    to_out: Tensor
    out_bias: Tensor | None
    gamma: Tensor | None


class Kind:
    """What blocks of one kind share in a forward, as it takes time to find; without the layout, which keeps it."""

    def __init__(
        self,
        layout: ClipLayout,
        heads: int,
        config: STAConfig,
        eps: float | None,
        recompute: bool,
        like: Tensor,
    ) -> None:
        self.heads = heads  # their number
        self.config = config  # the settings in force
        self.eps = eps  # of the norm
        self.recompute = recompute  # whether the tokens alone are kept
        # of the layers' arithmetic, autocast's where that is at work. All casts are written out, as a backward runs outside
        # of autocast
        self.dtype = like.dtype
        self.attention = FrameAttention(layout, heads, config, like)
        self.skips_pictures = not config.single_frames and any(frames == 1 for frames, _ in layout.clips)


class Call(NamedTuple):
    """What a branch needs beside tensors."""

    layout: ClipLayout  # where each token stands
    kind: Kind


class _Context(Protocol):
    """What is used of autograd's context."""

    call: Call
    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...


class Needs(NamedTuple):
    """Which inputs of the function need a gradient."""

    call: bool
    tokens: bool
    norm: bool
    norm_bias: bool
    to_qkv: bool
    qkv_bias: bool
    to_out: bool
    out_bias: bool
    gamma: bool

    @property
    def qkv(self) -> bool:
        """Whether anything in front of attention does."""
        return self.tokens or self.norm or self.norm_bias or self.to_qkv or self.qkv_bias

    @property
    def heads(self) -> bool:
        """Whether anything does whose gradient is computed from what the heads give."""
        return self.to_out or self.gamma


def weights_or_reason(branch: TemporalAttention, tokens: Tensor, layout: ClipLayout) -> Weights | str:
    """The parameters for `block_branch`; where it would not give what the layers give, why they have to be called one by one."""
    if torch.compiler.is_compiling() or operations_are_watched():
        return "a compiler, a tracer, a transform of torch.func or a forward-mode derivative looks at the operations"
    if outputs_are_kept():
        return "a selective checkpoint keeps what operators give, which the function changes in place"
    if layout.past is not None or not layout.clips:
        return "the clips go on from earlier frames, or there are none"
    children = cast("dict[str, nn.Module]", branch._modules)
    layers = norm, to_qkv, to_out = children["norm"], children["to_qkv"], children["to_out"]
    if type(norm) not in NORMS or type(to_qkv) is not nn.Linear or type(to_out) is not nn.Linear:
        return "a layer is of another class, such as LoRA's"
    if calls_are_watched():
        return "hooks on the calls of all modules are at work"
    found: list[Tensor | None] = []
    for layer in layers:
        own = layer.__dict__
        if is_hooked(layer) or "forward" in own:
            return "a layer has hooks, or a forward of its own"
        # `layer.weight` and `layer.bias`, without the detour that costs as much as an operator
        parameters = own["_parameters"]
        found += [own[name] if name in own else parameters.get(name) for name in ("weight", "bias")]
    if type(tokens) not in PLAIN:
        return "the tokens are of a class that decides itself how it computes"
    found.append(branch.gamma)
    weights = Weights._make(found)
    dtype = weights.norm.dtype
    for parameter in found:
        if parameter is not None and (type(parameter) not in PLAIN or parameter.dtype is not dtype):
            return "a parameter is of a class that decides itself how it computes, or of another dtype than the others"
    return weights


def block_branch(branch: TemporalAttention, weights: Weights, tokens: Tensor, layout: ClipLayout) -> Tensor:
    """As `TemporalAttention.forward`, with what `weights_or_reason` gave."""
    dtype, device = weights.to_qkv.dtype, tokens.device
    if (autocast := is_autocast(device.type)) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device.type)
    call = _call(branch, layout, dtype, device)
    if torch.is_grad_enabled():
        return cast("Tensor", _Branch.apply(call, tokens, *weights))
    if autocast:
        with torch.autocast(device.type, enabled=False):
            return _compute(tokens, weights, call)[2]
    return _compute(tokens, weights, call)[2]


def _call(branch: TemporalAttention, layout: ClipLayout, dtype: torch.dtype, device: torch.device) -> Call:
    eps, config = cast("nn.LayerNorm", branch._modules["norm"]).eps, branch.config
    key = (branch.num_heads, branch.head_dim, id(config), eps, branch.recompute, dtype, device)
    if (kind := layout.kinds.get(key)) is None:  # it holds the configuration, so that no other one has this id
        like = torch.empty(0, 3 * branch.num_heads * branch.head_dim, dtype=dtype, device=device)
        kind = layout.kinds[key] = Kind(layout, branch.num_heads, config, eps, branch.recompute, like)
    return Call(layout, kind)


def _compute(tokens: Tensor, weights: Weights, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """(q, k and v as attention leaves them, and the heads' output, each (tokens, its width); the branch, shaped as the tokens)."""
    heads, rotated = call.kind.attention.mix_in_place(_project(tokens, weights, call), call.layout)
    out = _finish(heads, weights, call)
    return rotated, heads, out if tokens.dim() == 2 else out.view(tokens.shape)


def is_autocast(device: str) -> bool:
    """Whether autocast is at work on a kind of device; on the meta device there is none to ask."""
    return device != "meta" and torch.is_autocast_enabled(device)


def _without_autocast(device: str) -> contextlib.AbstractContextManager[object]:
    return torch.autocast(device, enabled=False) if is_autocast(device) else contextlib.nullcontext()


def _normalize(tokens: Tensor, scale: Tensor, shift: Tensor | None, eps: float | None) -> Tensor:
    if shift is None:
        return F.rms_norm(tokens, scale.shape, scale, eps)
    return torch.layer_norm(tokens, scale.shape, scale, shift, cast("float", eps))


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`, which takes as long as an operator where there is nothing to do."""
    return x if x.dtype is dtype else x.to(dtype)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    if weight.dtype is not dtype:  # the bias has the weight's
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    return F.linear(x if x.dtype is dtype else x.to(dtype), weight, bias)


def _project(tokens: Tensor, w: Weights, call: Call) -> Tensor:
    """Norm and `to_qkv`: (..., C) -> (tokens, 3 * heads * head size)."""
    normed = _normalize(_as(tokens, w.norm.dtype), w.norm, w.norm_bias, call.kind.eps)
    return _linear(_rows(normed), w.to_qkv, w.qkv_bias, call.kind.dtype)


def _rows(tokens: Tensor) -> Tensor:
    """(..., C) -> (tokens, C)."""
    return tokens if tokens.dim() == 2 else tokens.flatten(0, -2)


def _finish(heads: Tensor, w: Weights, call: Call) -> Tensor:
    """`to_out`, gamma and the mask of pictures: (tokens, heads * head size) -> (tokens, C)."""
    out = _linear(heads, w.to_out, w.out_bias, call.kind.dtype)
    if w.gamma is not None:
        out = out * w.gamma
    return out if (mask := _pictures(call, out.device)) is None else out.masked_fill(mask, 0)


def _pictures(call: Call, device: torch.device) -> Tensor | None:
    """Booleans (tokens, 1) of the tokens that get no branch; None where all do."""
    return call.layout.single_frame_mask(device) if call.kind.skips_pictures else None


class _Branch(torch.autograd.Function):
    """Inputs: the call, the tokens (..., C), and `Weights` one by one."""

    @staticmethod
    def forward(ctx: _Context, call: Call, tokens: Tensor, *parameters: Tensor | None) -> Tensor:
        weights = Weights._make(parameters)
        with _without_autocast(tokens.device.type):
            rotated, heads, out = _compute(tokens, weights, call)
        needs = Needs(*ctx.needs_input_grad)
        ctx.call = call
        ctx.save_for_backward(
            tokens if needs.qkv or call.kind.recompute else None,
            rotated if needs.qkv and not call.kind.recompute else None,
            heads if needs.heads and not call.kind.recompute else None,
            *parameters,
        )
        return out

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        with _without_autocast(grad.device.type):
            return None, *_gradients(ctx, grad)


def _gradients(ctx: _Context, grad: Tensor) -> list[Tensor | None]:
    """Of the tokens and of each parameter that needs one."""
    tokens, rotated, heads, *parameters = ctx.saved_tensors
    needs, call, weights = Needs(*ctx.needs_input_grad), ctx.call, Weights(*parameters)
    if torch.is_grad_enabled():  # they are to be differentiated
        return _differentiable_gradients(needs, call, weights, tokens, heads, grad)
    if call.kind.recompute:
        heads, rotated = call.kind.attention.mix_in_place(_project(tokens, weights, call), call.layout)
    grad = _rows(grad)
    if (mask := _pictures(call, grad.device)) is not None:
        grad = grad.masked_fill(mask, 0)
    to_gamma = None
    if weights.gamma is not None:
        if needs.gamma:
            branch = _linear(heads, weights.to_out, weights.out_bias, call.kind.dtype)
            to_gamma = _as((grad * branch).sum(0), weights.gamma.dtype)
        grad = grad * weights.gamma
    grad = _as(grad, call.kind.dtype)
    to_end = [
        _as(grad.t() @ heads, weights.to_out.dtype) if needs.to_out else None,
        _as(grad.sum(0), weights.to_out.dtype) if needs.out_bias else None,
        to_gamma,
    ]
    if not needs.qkv:
        return [None] * 5 + to_end
    to_heads = grad @ _as(weights.to_out, call.kind.dtype)
    to_qkv = call.kind.attention.gradient(to_heads, rotated, call.layout)
    return _projection_gradients(needs, call, weights, tokens, to_qkv) + to_end


def _leaf(tensor: Tensor, need: bool, leaves: list[Tensor]) -> Tensor:
    """The tensor; where a gradient is needed a leaf of its own, put behind `leaves`."""
    if need:
        leaves.append(tensor.detach().requires_grad_())
    return leaves[-1] if need else tensor


def _projection_gradients(needs: Needs, call: Call, w: Weights, tokens: Tensor, grad: Tensor) -> list[Tensor | None]:
    """Of the tokens, the norm's parameters and those of `to_qkv`, from q's, k's and v's (tokens, 3 * heads * head size)."""
    through = needs.tokens or needs.norm or needs.norm_bias
    leaves: list[Tensor] = []
    inputs, scale = _leaf(_as(tokens, w.norm.dtype), needs.tokens, leaves), _leaf(w.norm, needs.norm, leaves)
    shift = None if w.norm_bias is None else _leaf(w.norm_bias, needs.norm_bias, leaves)
    to_weight, found = None, iter(leaves)
    if through or needs.to_qkv:
        with torch.set_grad_enabled(through):
            normed = _normalize(inputs, scale, shift, call.kind.eps)
        if needs.to_qkv:
            to_weight = _as(grad.t() @ _as(_rows(normed.detach()), call.kind.dtype), w.to_qkv.dtype)
        if through:
            to_normed = _as(grad @ _as(w.to_qkv, call.kind.dtype), normed.dtype).view_as(normed)
            found = iter(step_back(normed, leaves, to_normed))
    return [
        _as(next(found), tokens.dtype) if needs.tokens else None,
        next(found) if needs.norm else None,
        next(found) if needs.norm_bias else None,
        to_weight,
        _as(grad.sum(0), w.to_qkv.dtype) if needs.qkv_bias else None,
    ]


def _differentiable_gradients(
    needs: Needs, call: Call, w: Weights, tokens: Tensor | None, heads: Tensor | None, grad: Tensor
) -> list[Tensor | None]:
    """As `_gradients`, through torch's own operations, whose gradients have gradients; attention is written out."""
    if heads is None or needs.qkv:  # else nothing in front of them has a gradient
        config = dataclasses.replace(call.kind.config, attention="eager")
        heads = mix_frames(_project(cast("Tensor", tokens), w, call), call.layout, call.kind.heads, config)
    out = _finish(heads, w, call).view(grad.shape)
    inputs = list(zip((tokens, *w), needs[1:], strict=True))
    found = iter(torch.autograd.grad(out, [cast("Tensor", x) for x, need in inputs if need], grad, create_graph=True))
    return [next(found) if need else None for _, need in inputs]
