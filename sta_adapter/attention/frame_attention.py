"""Attention over the frames of each position, from q, k, v of all tokens to what the heads give; and its gradient.

Plain views and permutations, whose patterns stand in comments: this is where every block of every forward comes by. What
they need to know of the clips is found once, for all blocks of a kind.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sta_adapter.attention.kernels import attend_by_head, attend_by_head_gradient
from sta_adapter.attention.layout import ClipLayout
from sta_adapter.attention.rotary import apply_rotary, rotary_gradient, rotate_
from sta_adapter.compatibility.seams import operations_are_watched
from sta_adapter.config import STAConfig

PART = 2**17  # numbers of q that a core of the CPU computes at once: half a MiB in float32, as much of k, v and others
POSITIONS = -4  # their axis, in tokens (b) t n k h d


def mix_frames(qkv: Tensor, layout: ClipLayout, heads: int, config: STAConfig) -> Tensor:
    """`FrameAttention.mix`, of a single call."""
    return FrameAttention(layout, heads, config, qkv).mix(qkv, layout)


class FrameAttention:
    """Section 3 of arXiv 2510.26027: each position of a clip attends over the clip's frames.

    Args:
        layout: where each token stands; it is given again with the tokens, as it keeps this.
        heads: their number.
        config: the settings of rotation, mask, kernel and order.
        like: of the width, dtype and device of the queries, keys and values (tokens, 3 * heads * head size).
    """

    def __init__(self, layout: ClipLayout, heads: int, config: STAConfig, like: Tensor) -> None:
        self.config = config
        self.batches = [_Batch(layout, batch, heads, config, like) for batch in layout.batches]
        self.sizes = [clips * frames * positions for clips, frames, positions in layout.batches]

    def mix(self, qkv: Tensor, layout: ClipLayout) -> Tensor:
        """(tokens, 3 * heads * head size) of all tokens of the layout -> (tokens, heads * head size), in the same dtype."""
        return self._mix(_gathered(qkv, layout), layout, in_place=False)

    def mix_in_place(self, qkv: Tensor, layout: ClipLayout) -> tuple[Tensor, Tensor]:
        """As `mix`, and what `gradient` needs: `qkv`, which is written to, or a copy. To be called without gradients."""
        rotated = _gathered(qkv, layout)
        return self._mix(rotated, layout, in_place=True), rotated

    def gradient(self, grad: Tensor, rotated: Tensor, layout: ClipLayout) -> Tensor:
        """The gradient at `qkv` of `mix`; attention is computed again, and the gradient has none itself."""
        if self.config.token_order == "published":
            grad = torch.empty_like(grad).index_copy_(0, layout.published_index(grad.device), grad)
        grad, found = _gathered(grad, layout), torch.empty_like(rotated)
        if len(self.batches) == 1:
            self.batches[0].write_gradient(grad, rotated, found)
        else:
            parts = (torch.split(x, self.sizes) for x in (grad, rotated, found))
            for batch, *part in zip(self.batches, *parts, strict=True):
                batch.write_gradient(*part)
        return _scattered(found, layout)

    def _mix(self, qkv: Tensor, layout: ClipLayout, in_place: bool) -> Tensor:
        if len(self.batches) == 1:
            out = self.batches[0].mix(qkv, in_place)
        else:
            parts = zip(self.batches, torch.split(qkv, self.sizes), strict=True)
            out = torch.cat([batch.mix(part, in_place) for batch, part in parts])
        out = _scattered(out, layout)
        if self.config.token_order == "published":
            out = out.index_select(0, layout.published_index(out.device))
        return out


def _gathered(x: Tensor, layout: ClipLayout) -> Tensor:
    return x.index_select(0, layout.gather_index(x.device)) if layout.is_gathered else x


def _scattered(x: Tensor, layout: ClipLayout) -> Tensor:
    return x.index_select(0, layout.scatter_index(x.device)) if layout.is_gathered else x


class _Batch:
    """Attention over the frames of clips of one size, without mask or padding."""

    def __init__(
        self, layout: ClipLayout, batch: tuple[int, int, int], heads: int, config: STAConfig, like: Tensor
    ) -> None:
        clips, frames, positions = batch
        self.config = config
        self.frames = frames
        self.positions = positions
        self.width = like.shape[-1] // 3
        self.is_one = clips == 1
        self.shape = (frames, positions) if self.is_one else (clips, frames, positions)
        self.heads = heads, self.width // heads
        self.tables: tuple[Tensor, Tensor] | None = None  # cos and sin for folded tokens; `token_tables` for t n k h d
        if config.rope_theta is not None and frames > 1:
            cos, sin = (x[:frames] for x in layout.rotary_tables(self.heads[1], config.rope_theta, like))
            self.tables = cos, sin
            self.token_tables = cos[:, None, None, None], sin[:, None, None, None]

    def mix(self, qkv: Tensor, in_place: bool) -> Tensor:
        """(b t n) (3 h d) -> (b t n) (h d); `in_place` leaves the rotated q and k in `qkv`."""
        if self.frames == 1:
            return qkv[:, 2 * self.width :]  # v: a softmax over one frame is 1
        tokens = qkv.view(*self.shape, 3, *self.heads)
        step = self._positions_at_once(qkv)
        if step >= self.positions:
            return self._unfold(self._attend(tokens, in_place))
        out = qkv.new_empty(qkv.shape[0], self.width)
        wholes = tokens, out.view(*self.shape, 1, *self.heads)
        for part, into in zip(*(x.split(step, POSITIONS) for x in wholes), strict=True):
            into = self._fold(into).select(0, 0)
            into.copy_(self._attend(part, in_place).view(into.shape))
        return out

    def write_gradient(self, grad: Tensor, rotated: Tensor, found: Tensor) -> None:
        """Write the gradient of `mix` at its q, k and v into `found`; `rotated` is what `mix` has left of them."""
        if self.frames == 1:
            found[:, : 2 * self.width] = 0
            found[:, 2 * self.width :] = grad
            return
        wholes = [x.view(*self.shape, k, *self.heads) for x, k in ((rotated, 3), (grad, 1), (found, 3))]
        step = self._positions_at_once(rotated)
        parts = [wholes] if step >= self.positions else zip(*(x.split(step, POSITIONS) for x in wholes), strict=True)
        for part in parts:
            self._write_attention_gradient(*part)

    def _fold(self, x: Tensor) -> Tensor:
        """(b) t n k h d -> k (b) n h t d, a view: k are q, k and v, or one alone."""
        return x.permute(2, 1, 3, 0, 4) if self.is_one else x.permute(3, 0, 2, 4, 1, 5)

    def _sequences(self, x: Tensor) -> Tensor:
        """(b) t n k h d -> k (b n) h t d, a view of one clip and a copy of several."""
        folded = self._fold(x)
        return folded if self.is_one else folded.flatten(1, 2)

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

    def _attend(self, tokens: Tensor, in_place: bool) -> Tensor:
        """What the heads give, (b n) h t d, from (b) t n 3 h d."""
        if self.tables is not None and in_place:
            rotate_(tokens.narrow(-3, 0, 2), *self.token_tables)
        q, k, v = self._sequences(tokens).unbind()
        if self.tables is not None and not in_place:
            q, k = self._sequences(apply_rotary(tokens.narrow(-3, 0, 2), *self.token_tables)).unbind()
        config = self.config
        return attend_by_head(q, k, v, causal=config.causal, window=config.window, backend=config.attention)

    def _write_attention_gradient(self, rotated: Tensor, to_out: Tensor, to_qkv: Tensor) -> None:
        """Write the gradient of `_attend` at its tokens into `to_qkv`, from that at what it gives, (b) t n 1 h d."""
        qkv, grad, config = self._sequences(rotated), self._sequences(to_out).select(0, 0), self.config
        to_both, to_v = attend_by_head_gradient(
            grad, qkv, causal=config.causal, window=config.window, backend=config.attention
        )
        into = self._fold(to_qkv)
        both, into_v = into.narrow(0, 0, 2), into.select(0, 2)
        to_both = to_both.view(both.shape)
        if self.tables is not None:
            rotary_gradient(to_both, *self.tables, out=both)
        else:
            both.copy_(to_both)
        into_v.copy_(to_v.view(into_v.shape))
