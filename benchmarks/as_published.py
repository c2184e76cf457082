"""The published arithmetic of STA, written plainly by us, to measure against.

As in the released Qwen2-VL code: tokens are copied to the order (position, frame), all clips of a batch are one
sequence of frames, scores are materialised and their softmax is computed in float32, the rotary tables are made anew in
each block, and a clip boundary is a mask over the one giant sequence. (Its token order is a slip that costs no time;
ours is the paper's.) The sizes of all clips must be equal, except with the mask over the whole batch's tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class PublishedBranch(nn.Module):
    """One block's branch: norm, qkv, attention over frames with all copies, projection."""

    def __init__(self, width: int, heads: int, head_dim: int, **at: Any) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.norm = nn.LayerNorm(width, eps=1e-6, **at)
        self.qkv = nn.Linear(width, 3 * heads * head_dim, **at)
        self.proj = nn.Linear(heads * head_dim, width, **at)

    def forward(self, tokens: Tensor, clips: list[tuple[int, int]]) -> Tensor:
        """Tokens (tokens, C) -> (tokens, C)."""
        normed = self.norm(tokens)
        if len(set(clips)) == 1:
            return self._one_size(normed, clips)
        return self._giant(normed, clips)

    def _one_size(self, tokens: Tensor, clips: list[tuple[int, int]]) -> Tensor:
        """Every clip has the same frames and positions: positions are the batch."""
        frames, positions = clips[0]
        folded = tokens.view(len(clips), frames, positions, -1).transpose(1, 2).contiguous().flatten(0, 1)
        qkv = self.qkv(folded).view(len(folded), frames, 3, self.heads, self.head_dim)
        q, k, v = (x.contiguous() for x in qkv.permute(2, 0, 3, 1, 4))
        index = torch.arange(frames, device=tokens.device)
        out = self._softmax(self._rotate(q, index), self._rotate(k, index), v, None)
        out = self.proj(out.transpose(1, 2).contiguous().flatten(2))
        return out.view(len(clips), positions, frames, -1).transpose(1, 2).contiguous().view(tokens.shape)

    def _giant(self, tokens: Tensor, clips: list[tuple[int, int]]) -> Tensor:
        """Unequal clips: one sequence of all tokens, masked to the frames of each one's clip and position."""
        device = tokens.device
        frame = torch.cat([torch.arange(t, device=device).repeat_interleave(n) for t, n in clips])
        starts = torch.tensor([0, *(n for _, n in clips)]).cumsum(0).tolist()
        place = torch.cat(
            [torch.arange(n, device=device).repeat(t) + s for (t, n), s in zip(clips, starts, strict=False)]
        )
        qkv = self.qkv(tokens).view(len(tokens), 3, self.heads, self.head_dim)
        q, k, v = (x.contiguous() for x in qkv.permute(1, 2, 0, 3))
        mask = place[:, None] == place[None, :]
        out = self._softmax(self._rotate(q, frame), self._rotate(k, frame), v, mask)
        return self.proj(out.transpose(0, 1).contiguous().flatten(1))

    def _rotate(self, x: Tensor, index: Tensor) -> Tensor:
        """Rotary embedding of (..., T, D) in float32, tables made on the spot."""
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=x.device) / self.head_dim
        angles = torch.outer(index.float(), 10000.0**-exponents).repeat(1, 2)
        wide = x.float()
        left, right = wide.chunk(2, dim=-1)
        return (wide * angles.cos() + torch.cat([-right, left], dim=-1) * angles.sin()).to(x.dtype)

    def _softmax(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        scores = torch.matmul(q, k.transpose(-2, -1)) / self.head_dim**0.5
        if mask is not None:
            scores = scores + torch.zeros_like(scores).masked_fill(~mask, float("-inf"))
        return torch.matmul(torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), v)


def attach_as_published(tower: Any) -> None:
    """Put a branch into every block of a Qwen2-VL tower."""
    clips: list[tuple[int, int]] = []
    parameter = next(tower.parameters())
    head_dim = tower.config.embed_dim // tower.config.num_heads
    heads = max(1, round(0.25 * tower.config.num_heads))

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        clips[:] = [(t, h * w) for t, h, w in kwargs["grid_thw"].tolist()]

    def add(norm: nn.Module, args: tuple[Any, ...]) -> None:
        args[0].add_(branches[id(norm)](args[0].clone(), list(clips)))

    branches: dict[int, PublishedBranch] = {}
    tower.register_forward_pre_hook(begin, with_kwargs=True)
    for block in tower.blocks:
        block.sta = PublishedBranch(
            tower.config.embed_dim, heads, head_dim, device=parameter.device, dtype=parameter.dtype
        )
        branches[id(block.norm2)] = block.sta
        block.norm2.register_forward_pre_hook(add)
