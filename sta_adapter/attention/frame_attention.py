"""Attention over the frames of each position, from q, k, v of all tokens to what the heads give; and its gradient.

Plain views and permutations, whose patterns stand in comments: this is where every block of every forward comes by.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sta_adapter.attention.kernels import attend_by_head, attend_by_head_gradient
from sta_adapter.attention.layout import ClipLayout
from sta_adapter.attention.rotary import apply_rotary, rotary_gradient
from sta_adapter.compatibility.seams import operations_are_watched
from sta_adapter.config import STAConfig

__all__ = ["mix_frames", "mix_frames_gradient"]

PART = 2**17  # numbers of q that a core of the CPU computes at once: half a MiB in float32, as much of k, v and others
POSITIONS = -4  # their axis, in folded tokens


def mix_frames(qkv: Tensor, layout: ClipLayout, heads: int, config: STAConfig) -> Tensor:
    """Section 3 of arXiv 2510.26027: each position of a clip attends over the clip's frames.

    Args:
        qkv: queries, keys and values (tokens, 3 * heads * head size) of all tokens of the layout.
        layout: where each token stands.
        heads: their number.
        config: the settings of rotation, mask, kernel and order.

    Returns:
        (tokens, heads * head size), in qkv's dtype.
    """
    if layout.is_uniform:
        out = _mix(qkv, layout.clips[0], layout, heads, config)
    else:  # all clips of one length together, so that no mask or padding is needed
        parts = torch.split(qkv.index_select(0, layout.gather_index(qkv.device)), _sizes(layout))
        outs = [_mix(part, clip, layout, heads, config) for part, clip in zip(parts, layout.groups, strict=True)]
        out = torch.cat(outs).index_select(0, layout.scatter_index(qkv.device))
    if config.token_order == "published":
        out = out.index_select(0, layout.published_index(out.device))
    return out


def mix_frames_gradient(grad: Tensor, qkv: Tensor, layout: ClipLayout, heads: int, config: STAConfig) -> Tensor:
    """The gradient at `qkv` of `mix_frames`, all of whose steps are computed again; itself without a gradient."""
    if config.token_order == "published":
        grad = torch.empty_like(grad).index_copy_(0, layout.published_index(grad.device), grad)
    if layout.is_uniform:
        found = torch.empty_like(qkv)
        _mix_gradient(grad, qkv, found, layout.clips[0], layout, heads, config)
        return found
    index = layout.gather_index(qkv.device)
    found, sizes = torch.empty_like(qkv), _sizes(layout)
    parts = (torch.split(x, sizes) for x in (grad.index_select(0, index), qkv.index_select(0, index), found))
    for part, clip in zip(zip(*parts, strict=True), layout.groups, strict=True):
        _mix_gradient(part[0], part[1], part[2], clip, layout, heads, config)
    return found.index_select(0, layout.scatter_index(qkv.device))


def _sizes(layout: ClipLayout) -> list[int]:
    return [frames * positions for frames, positions in layout.groups]


def _fold(x: Tensor, clip: tuple[int, int], heads: int, parts: int) -> Tensor:
    """(b t n) (k h d) -> k b n h t d, a view, of one clip without b: k are q, k and v, or one alone."""
    frames, positions = clip
    size = x.shape[-1] // (parts * heads)
    if x.shape[0] == frames * positions:
        return x.view(frames, positions, parts, heads, size).permute(2, 1, 3, 0, 4)
    return x.view(-1, frames, positions, parts, heads, size).permute(3, 0, 2, 4, 1, 5)


def _unfold(x: Tensor, clip: tuple[int, int], tokens: int) -> Tensor:
    """(b n) h t d -> (b t n) (h d), a copy."""
    frames, positions = clip
    if tokens == frames * positions:
        return x.permute(2, 0, 1, 3).reshape(tokens, -1)
    return x.view(-1, positions, *x.shape[1:]).permute(0, 3, 1, 2, 4).reshape(tokens, -1)


def _positions_at_once(qkv: Tensor, positions: int) -> int:
    """How many positions of (b t n) (3 h d) to compute at a time.

    On the CPU a part of them stays in the cache, and its memory is taken again for the next one. What autograd, a compiler or a
    transform looks at, or a tensor that decides itself how it computes, is computed at once.
    """
    if torch.compiler.is_compiling() or (size := qkv.numel() // 3) <= PART:
        return positions
    if type(qkv) is not Tensor or qkv.device.type != "cpu" or torch.is_grad_enabled() or operations_are_watched():
        return positions
    return max(1, positions * PART * torch.get_num_threads() // size)


def _mix(qkv: Tensor, clip: tuple[int, int], layout: ClipLayout, heads: int, config: STAConfig) -> Tensor:
    """As `mix_frames`, of clips of one size (frames, positions)."""
    if clip[0] == 1:
        return qkv[:, 2 * (qkv.shape[1] // 3) :]  # v: a softmax over one frame is 1
    fold = _fold(qkv, clip, heads, 3)
    tables = _tables(fold, clip[0], layout, config)
    step = _positions_at_once(qkv, clip[1])
    if step >= clip[1]:
        return _unfold(_attend(fold, tables, config), clip, qkv.shape[0])
    out = qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3)
    folds = fold, _fold(out, clip, heads, 1).select(0, 0)
    for part, into in zip(*(x.split(step, POSITIONS) for x in folds), strict=True):
        into.copy_(_attend(part, tables, config).view(into.shape))
    return out


def _attend(fold: Tensor, tables: tuple[Tensor, Tensor] | None, config: STAConfig) -> Tensor:
    """What the heads give, (b n) h t d."""
    q, k, v = _queries_keys_values(fold, tables)
    return attend_by_head(q, k, v, causal=config.causal, window=config.window, backend=config.attention)


def _mix_gradient(
    grad: Tensor,
    qkv: Tensor,
    found: Tensor,
    clip: tuple[int, int],
    layout: ClipLayout,
    heads: int,
    config: STAConfig,
) -> None:
    """Write the gradient of `_mix` at `qkv` into `found`, which is shaped as it is."""
    if clip[0] == 1:
        size = grad.shape[1]
        found[:, : 2 * size] = 0
        found[:, 2 * size :] = grad
        return
    folds = _fold(qkv, clip, heads, 3), _fold(grad, clip, heads, 1).select(0, 0), _fold(found, clip, heads, 3)
    tables = _tables(folds[0], clip[0], layout, config)
    step = _positions_at_once(qkv, clip[1])
    parts = [folds] if step >= clip[1] else zip(*(x.split(step, POSITIONS) for x in folds), strict=True)
    for fold, to_out, to_qkv in parts:
        _attend_gradient(fold, to_out, to_qkv, tables, config)


def _attend_gradient(
    fold: Tensor, to_out: Tensor, to_qkv: Tensor, tables: tuple[Tensor, Tensor] | None, config: STAConfig
) -> None:
    """Write the gradient of `_attend` at `fold` into `to_qkv`, from that at what it gives, (b) n h t d."""
    q, k, v = _queries_keys_values(fold, tables)
    to_both, to_v = attend_by_head_gradient(
        to_out.flatten(0, -4), q, k, v, causal=config.causal, window=config.window, backend=config.attention
    )
    into, into_v = to_qkv.narrow(0, 0, 2), to_qkv.select(0, 2)
    to_both = to_both.view(into.shape)
    if tables is None:
        into.copy_(to_both)
    else:
        rotary_gradient(to_both, *tables, out=into)
    into_v.copy_(to_v.view(into_v.shape))


def _tables(fold: Tensor, frames: int, layout: ClipLayout, config: STAConfig) -> tuple[Tensor, Tensor] | None:
    """Cos and sin (frames, D) for folded tokens; None without a rotation."""
    if config.rope_theta is None:
        return None
    cos, sin = layout.rotary_tables(fold.shape[-1], config.rope_theta, fold)
    return (cos, sin) if frames == layout.max_frames else (cos[:frames], sin[:frames])


def _queries_keys_values(fold: Tensor, tables: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
    """Q and k, rotated, and v: k (b) n h t d -> three of (b n) h t d."""
    both, v = fold.narrow(0, 0, 2), fold.select(0, 2)
    if tables is not None:
        both = apply_rotary(both, *tables)
    q, k = both.unbind()
    return (q, k, v) if q.dim() == 4 else (q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))
