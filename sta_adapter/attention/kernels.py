"""attend(q, k, v): attention over the frames of each position; the kernel is chosen per call, with a reason."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sta_adapter.attention import xformers_kernels
from sta_adapter.attention.weights import attention_weights, visible_keys
from sta_adapter.compatibility.seams import softmax_gradient
from sta_adapter.errors import BackendError, ConfigError

BACKENDS = ("auto", "xformers", "sdpa", "eager")
NARROW = (torch.bfloat16, torch.float16)
CUDA_BATCH_LIMIT = 65535  # the kernels' grids have one entry per batch row in a dimension of 16 bits


class Choice(NamedTuple):
    """Which kernel computes a call, and why."""

    backend: str
    reason: str


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, window: int | None = None, backend: str = "auto"
) -> Tensor:
    """Softmax attention over the second axis, scaled by 1/sqrt(D).

    Args:
        q: queries (P, T, H, D): P independent sequences of T tokens in H heads of size D; floating dtype. Strides are free.
        k: keys (P, S, H, D). With `causal`, S may be larger than T: the queries are those of the last T tokens.
        v: values, as k.
        causal: token t sees only tokens up to t.
        window: with `causal`, how many tokens each one sees, itself and those just before it; None for all.
        backend: "auto", "xformers", "sdpa" or "eager".

    Returns:
        (P, T, H, D), in q's dtype.

    Raises:
        ConfigError: for an unknown backend, shapes that differ, or a window without `causal`.
        BackendError: when the backend asked for can't take these tensors; the message has the reason.
    """
    _check(q, k, v, causal, window)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return attend_by_head(q, k, v, causal=causal, window=window, backend=backend).transpose(1, 2)


def attend_by_head(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, window: int | None = None, backend: str = "auto"
) -> Tensor:
    """`attend` of (P, H, T, D), the order of torch's SDPA, without its checks."""
    if causal:
        queries, keys = q.shape[2], k.shape[2]
        if window is not None and keys >= queries + window:  # no query sees the first of them
            k, v = k[:, :, 1 - queries - window :], v[:, :, 1 - queries - window :]
            keys = k.shape[2]
        causal, window = _bounds(queries, keys, window)
    kernel = _KERNELS[_name(q, backend)]
    if q.is_cuda and _is_split(q):
        parts = zip(*(torch.split(x, CUDA_BATCH_LIMIT) for x in (q, k, v)), strict=True)
        return torch.cat([kernel(a, b, c, causal, window) for a, b, c in parts])
    return kernel(q, k, v, causal, window)


def _bounds(queries: int, keys: int, window: int | None) -> tuple[bool, int | None]:
    """(causal, window) of a causal call, where they leave anything out."""
    if queries == 1:  # sees all that is left
        return False, None
    return True, None if window is not None and window >= keys else window


def attend_by_head_gradient(
    grad: Tensor, qkv: Tensor, *, causal: bool = False, window: int | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Gradients of `attend_by_head` at q and k (2, P, H, T, D) and at v (P, H, T, D), from that at its output.

    The attention is computed again, of `qkv` (3, P, H, T, D). To be called without gradients.
    """
    frames, size = qkv.shape[-2:]
    sdpa = _name(qkv, backend) == "sdpa" and not _is_split(qkv[0])
    dtype = qkv.dtype
    if wide := sdpa and _widens(qkv.device.type, dtype):
        grad, qkv = grad.float(), qkv.float()
    if causal:
        causal, window = _bounds(frames, frames, window)
    if sdpa and qkv.device.type == "cpu" and frames <= size:
        both, to_v = _products_gradient(grad, qkv, causal, window)
    else:
        leaves = [leaf.requires_grad_() for leaf in qkv.detach().unbind()]
        with torch.enable_grad():
            if sdpa:
                mask, causal = _sdpa_mask(leaves[0], leaves[1], causal, window) if causal else (None, False)
                out = F.scaled_dot_product_attention(leaves[0], leaves[1], leaves[2], attn_mask=mask, is_causal=causal)
            else:
                out = attend_by_head(leaves[0], leaves[1], leaves[2], causal=causal, window=window, backend=backend)
        to_q, to_k, to_v = step_back(out, leaves, grad)
        both = torch.stack([to_q, to_k])
    return (both.to(dtype), to_v.to(dtype)) if wide else (both, to_v)


def _products_gradient(grad: Tensor, qkv: Tensor, causal: bool, window: int | None) -> tuple[Tensor, Tensor]:
    """As `attend_by_head_gradient`, by batched matrix products: for few frames faster than SDPA on the CPU.

    The weights are (P * H, T, T): with T at most D no more than q is.
    """
    shape, scale = grad.shape, grad.shape[-1] ** -0.5
    q, k, v = qkv.flatten(1, 2).unbind()
    grad = grad.flatten(0, 1)
    scores = torch.bmm(q, k.transpose(1, 2)).mul_(scale)
    if causal:
        scores.masked_fill_(~visible_keys(shape[2], shape[2], window, q.device), float("-inf"))
    weights = scores.softmax(-1)
    to_v = torch.bmm(weights.transpose(1, 2), grad)
    to_scores = softmax_gradient(torch.bmm(grad, v.transpose(1, 2)), weights)
    both = q.new_empty((2, *q.shape))
    to_q, to_k = both.unbind()
    torch.baddbmm(to_v, to_scores, k, beta=0, alpha=scale, out=to_q)
    torch.baddbmm(to_v, to_scores.transpose(1, 2), q, beta=0, alpha=scale, out=to_k)
    return both.view(2, *shape), to_v.view(shape)


def _check(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None) -> None:
    if q.dim() != 4 or k.shape != v.shape or not (q.shape == k.shape or (causal and _ends_with(k, q))):
        raise ConfigError(
            f"attend takes q, k, v of one shape (positions, frames, heads, head size); found {tuple(q.shape)}, "
            f"{tuple(k.shape)}, {tuple(v.shape)}. With causal=True k and v may have more frames than q."
        )
    if window is not None and (not causal or window < 1):
        raise ConfigError(f"window={window} with causal={causal}: expected a number above 0, and causal=True.")


def _ends_with(k: Tensor, q: Tensor) -> bool:
    """Whether k are the keys of q's tokens and of others before them."""
    return k.dim() == 4 and k.shape[0] == q.shape[0] and k.shape[2:] == q.shape[2:] and k.shape[1] >= q.shape[1]


def _name(q: Tensor, requested: str) -> str:
    """The kernel for queries like `q`, without the look at xformers where there is nothing to choose."""
    if requested == "sdpa" or (requested == "auto" and q.device.type == "cpu"):
        return "sdpa"
    return choose_kernel(q.device.type, q.dtype, q.shape[-1], requested).backend


def _is_split(q: Tensor) -> bool:
    return q.is_cuda and q.shape[0] > CUDA_BATCH_LIMIT


def choose_kernel(device: str, dtype: torch.dtype, head_dim: int, requested: str = "auto") -> Choice:
    """The kernel for queries of such tensors, with the reason for it.

    "auto" takes xformers where it can (CUDA), and for all else torch's SDPA, which picks among its own kernels.
    "eager" is batched matrix products, written out.

    Raises:
        ConfigError: for an unknown name.
        BackendError: when "xformers" was asked for by name and can't take them.
    """
    if requested not in BACKENDS:
        raise ConfigError(f"attention backend {requested!r}: expected one of {', '.join(BACKENDS)}.")
    if requested in ("sdpa", "eager"):
        return Choice(requested, "asked for by name")
    refusal = xformers_refusal(device, dtype, head_dim)
    if refusal is None:
        reason = "asked for by name" if requested == "xformers" else "CUDA tensors that xformers takes"
        return Choice("xformers", reason)
    if requested == "xformers":
        raise BackendError(
            f"attention='xformers' can't be used here: {refusal}. Use attention='auto', which falls back to torch's SDPA: in "
            "STAConfig(...), or, for an adapter that was saved so, in load_sta(...)."
        )
    wide = "; in float32, which the CPU's kernel is faster in" if _widens(device, dtype) else ""
    return Choice("sdpa", f"not xformers: {refusal}{wide}")


_REFUSALS: dict[tuple[str, torch.dtype, int], str | None] = {}


def xformers_refusal(device: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why xformers can't compute such a call; None when it can. Found out once per kind of call."""
    key = (device, dtype, head_dim)
    if key not in _REFUSALS:
        _REFUSALS[key] = xformers_kernels.refusal(device, dtype, head_dim)
    return _REFUSALS[key]


def _xformers(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None) -> Tensor:
    from xformers.ops import memory_efficient_attention

    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    bias = xformers_kernels.causal_bias(q, k, window) if causal else None
    return cast("Tensor", memory_efficient_attention(q, k, v, attn_bias=bias)).transpose(1, 2)


def _widens(device: str, dtype: torch.dtype) -> bool:
    """Whether SDPA gets float32 copies: its 16-bit CPU kernel takes up to ten times as long (benchmarks/kernels.py)."""
    return dtype in NARROW and device == "cpu"


def _sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None) -> Tensor:
    if q.dtype in NARROW and _widens(q.device.type, q.dtype):
        return _sdpa(q.float(), k.float(), v.float(), causal, window).to(q.dtype)
    if not causal:
        return F.scaled_dot_product_attention(q, k, v)
    mask, causal = _sdpa_mask(q, k, causal, window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


def _sdpa_mask(q: Tensor, k: Tensor, causal: bool, window: int | None) -> tuple[Tensor | None, bool]:
    """SDPA's `attn_mask` and `is_causal`."""
    if causal and (window is not None or q.shape[2] != k.shape[2]):
        return visible_keys(q.shape[2], k.shape[2], window, q.device), False
    return None, causal


def _eager(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None) -> Tensor:
    weights = attention_weights(q.transpose(1, 2), k.transpose(1, 2), causal=causal, window=window)
    return (weights @ v.to(weights.dtype)).to(q.dtype)


_KERNELS: dict[str, Callable[[Tensor, Tensor, Tensor, bool, int | None], Tensor]] = {  # of (P, H, T, D)
    "xformers": _xformers,
    "sdpa": _sdpa,
    "eager": _eager,
}


def step_back(output: Tensor, leaves: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    """Gradients of `output` at leaves that require one.

    Where one operation of torch lies between them its backward is called as it is: inside of a backward, a run of the
    engine takes several times as long.

    Args:
        output: computed from the leaves, with gradients.
        leaves: tensors without a history, in the order in which the operation takes them.
        grad: shaped as `output`.
    """
    if callable(node := output.grad_fn) and not isinstance(node, torch.autograd.function.BackwardCFunction):
        functions = [function for function, _ in node.next_functions]
        reached = [getattr(function, "variable", None) for function in functions if function is not None]
        if len(reached) == len(leaves) and all(map(operator.is_, reached, leaves)):
            given = node(grad)
            pairs = zip(given if isinstance(given, tuple) else (given,), functions, strict=True)
            found = [x for x, function in pairs if function is not None and x is not None]
            if len(found) == len(leaves):  # else within `torch.autograd.grad(..., inputs)`
                return found
    return list(torch.autograd.grad(output, leaves, grad))
