"""Attention over the frames of each position, from q, k, v of all tokens to what the heads give; and its gradient.

Plain views and permutations, whose patterns stand in comments: this is where every block of every forward comes by. What
they need to know of the clips is found once, for all blocks of a kind.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sta_adapter.attention.kernels import attend_by_head, attend_by_head_gradient
from sta_adapter.attention.layout import ClipLayout
from sta_adapter.attention.rotary import apply_rotary, rotary_gradient
from sta_adapter.compatibility.seams import operations_are_watched
from sta_adapter.config import STAConfig

__all__ = ["FrameAttention", "mix_frames"]

PART = 2**17  # numbers of q that a core of the CPU computes at once: half a MiB in float32, as much of k, v and others
POSITIONS = -4  # their axis, in folded tokens


def mix_frames(qkv: Tensor, layout: ClipLayout, heads: int, config: STAConfig) -> Tensor:
    """`FrameAttention.mix`, of a single call."""
    return FrameAttention(layout, heads, config, qkv).mix(qkv)


class FrameAttention:
    """Section 3 of arXiv 2510.26027: each position of a clip attends over the clip's frames.

    Args:
        layout: where each token stands.
        heads: their number.
        config: the settings of rotation, mask, kernel and order.
        like: of the width, dtype and device of the queries, keys and values (tokens, 3 * heads * head size).
    """

    def __init__(self, layout: ClipLayout, heads: int, config: STAConfig, like: Tensor) -> None:
        self.layout = layout
        self.config = config
        self.batches = [_Batch(layout, *batch, heads, config, like) for batch in layout.batches]
        self.sizes = [clips * frames * positions for clips, frames, positions in layout.batches]

    def mix(self, qkv: Tensor) -> Tensor:
        """(tokens, 3 * heads * head size) of all tokens of the layout -> (tokens, heads * head size), in the same dtype."""
        layout = self.layout
        if layout.is_gathered:
            qkv = qkv.index_select(0, layout.gather_index(qkv.device))
        if len(self.batches) == 1:
            out = self.batches[0].mix(qkv)
        else:
            parts = zip(self.batches, torch.split(qkv, self.sizes), strict=True)
            out = torch.cat([batch.mix(part) for batch, part in parts])
        if layout.is_gathered:
            out = out.index_select(0, layout.scatter_index(qkv.device))
        if self.config.token_order == "published":
            out = out.index_select(0, layout.published_index(out.device))
        return out

    def gradient(self, grad: Tensor, qkv: Tensor) -> Tensor:
        """The gradient at `qkv` of `mix`, all of whose steps are computed again; itself without a gradient."""
        layout = self.layout
        if self.config.token_order == "published":
            grad = torch.empty_like(grad).index_copy_(0, layout.published_index(grad.device), grad)
        if layout.is_gathered:
            grad, qkv = (x.index_select(0, layout.gather_index(qkv.device)) for x in (grad, qkv))
        found = torch.empty_like(qkv)
        if len(self.batches) == 1:
            self.batches[0].write_gradient(grad, qkv, found)
        else:
            parts = (torch.split(x, self.sizes) for x in (grad, qkv, found))
            for batch, *part in zip(self.batches, *parts, strict=True):
                batch.write_gradient(*part)
        return found.index_select(0, layout.scatter_index(qkv.device)) if layout.is_gathered else found


class _Batch:
    """Attention over the frames of clips of one size, without mask or padding."""

    def __init__(
        self,
        layout: ClipLayout,
        clips: int,
        frames: int,
        positions: int,
        heads: int,
        config: STAConfig,
        like: Tensor,
    ) -> None:
        self.config = config
        self.frames = frames
        self.positions = positions
        self.width = like.shape[-1] // 3
        size = self.width // heads
        self.is_one = clips == 1
        self.shape = (frames, positions) if self.is_one else (clips, frames, positions)
        self.heads = heads, size
        self.tables: tuple[Tensor, Tensor] | None = None  # cos and sin (frames, head size)
        if config.rope_theta is not None and frames > 1:
            cos, sin = layout.rotary_tables(size, config.rope_theta, like)
            self.tables = (cos, sin) if frames == layout.max_frames else (cos[:frames], sin[:frames])

    def mix(self, qkv: Tensor) -> Tensor:
        """(b t n) (3 h d) -> (b t n) (h d)."""
        if self.frames == 1:
            return qkv[:, 2 * self.width :]  # v: a softmax over one frame is 1
        fold = self._fold(qkv, 3)
        step = self._positions_at_once(qkv)
        if step >= self.positions:
            return self._unfold(self._attend(fold))
        out = qkv.new_empty(qkv.shape[0], self.width)
        folds = fold, self._fold(out, 1).select(0, 0)
        for part, into in zip(*(x.split(step, POSITIONS) for x in folds), strict=True):
            into.copy_(self._attend(part).view(into.shape))
        return out

    def write_gradient(self, grad: Tensor, qkv: Tensor, found: Tensor) -> None:
        """Write the gradient of `mix` at `qkv` into `found`, which is shaped as it is."""
        if self.frames == 1:
            found[:, : 2 * self.width] = 0
            found[:, 2 * self.width :] = grad
            return
        folds = self._fold(qkv, 3), self._fold(grad, 1).select(0, 0), self._fold(found, 3)
        step = self._positions_at_once(qkv)
        parts = [folds] if step >= self.positions else zip(*(x.split(step, POSITIONS) for x in folds), strict=True)
        for fold, to_out, to_qkv in parts:
            self._write_attention_gradient(fold, to_out, to_qkv)

    def _fold(self, x: Tensor, parts: int) -> Tensor:
        """(b t n) (k h d) -> k b n h t d, a view, of one clip without b: k are q, k and v, or one alone."""
        x = x.view(*self.shape, parts, *self.heads)
        return x.permute(2, 1, 3, 0, 4) if self.is_one else x.permute(3, 0, 2, 4, 1, 5)

    def _unfold(self, x: Tensor) -> Tensor:
        """(b n) h t d -> (b t n) (h d), a copy."""
        if self.is_one:
            return x.permute(2, 0, 1, 3).reshape(-1, self.width)
        return x.view(-1, self.positions, *x.shape[1:]).permute(0, 3, 1, 2, 4).reshape(-1, self.width)

    def _positions_at_once(self, qkv: Tensor) -> int:
        """How many positions of (b t n) (3 h d) to compute at a time.

        On the CPU a part of them stays in the cache, and its memory is taken again for the next one. What autograd, a compiler or a
        transform looks at, or a tensor that decides itself how it computes, is computed at once.
        """
        if (size := qkv.numel() // 3) <= PART or torch.compiler.is_compiling():
            return self.positions
        if type(qkv) is not Tensor or qkv.device.type != "cpu" or torch.is_grad_enabled() or operations_are_watched():
            return self.positions
        return max(1, self.positions * PART * torch.get_num_threads() // size)

    def _queries_keys_values(self, fold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Q and k, rotated, and v: k (b) n h t d -> three of (b n) h t d."""
        both, v = fold.narrow(0, 0, 2), fold.select(0, 2)
        if self.tables is not None:
            both = apply_rotary(both, *self.tables)
        q, k = both.unbind()
        return (q, k, v) if self.is_one else (q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))

    def _attend(self, fold: Tensor) -> Tensor:
        """What the heads give, (b n) h t d."""
        q, k, v = self._queries_keys_values(fold)
        config = self.config
        return attend_by_head(q, k, v, causal=config.causal, window=config.window, backend=config.attention)

    def _write_attention_gradient(self, fold: Tensor, to_out: Tensor, to_qkv: Tensor) -> None:
        """Write the gradient of `_attend` at `fold` into `to_qkv`, from that at what it gives, (b) n h t d."""
        q, k, v = self._queries_keys_values(fold)
        grad = to_out if self.is_one else to_out.flatten(0, 1)
        config = self.config
        to_both, to_v = attend_by_head_gradient(
            grad, q, k, v, causal=config.causal, window=config.window, backend=config.attention
        )
        into, into_v = to_qkv.narrow(0, 0, 2), to_qkv.select(0, 2)
        to_both = to_both.view(into.shape)
        if self.tables is None:
            into.copy_(to_both)
        else:
            rotary_gradient(to_both, *self.tables, out=into)
        into_v.copy_(to_v.view(into_v.shape))
