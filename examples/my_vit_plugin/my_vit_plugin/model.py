"""The encoder: an ordinary pre-norm vision transformer that knows nothing of sta-adapter."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    """Self-attention over the tokens of one frame."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(frames, tokens, C) -> the same shape."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Two sums on one residual stream, a norm in front of each: what STA asks of a block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(frames, tokens, C) -> the same shape."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class MyViT(nn.Module):
    """Frames of several clips as one batch of images, a class token in front of each frame's patches."""

    def __init__(self, width: int = 32, heads: int = 4, depth: int = 2, patch: int = 4, size: int = 16) -> None:
        super().__init__()
        self.heads, self.patch, self.size = heads, patch, size
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.class_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, (size // patch) ** 2, width) * 0.02)
        self.layers = nn.ModuleList([Layer(width, heads) for _ in range(depth)])

    def forward(self, images: Tensor) -> Tensor:
        """(frames, 3, size, size) -> (frames, 1 + patches, C)."""
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1)
        for layer in self.layers:
            x = layer(x)
        return x
