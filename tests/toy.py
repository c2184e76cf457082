"""A three-block vision transformer of our own, for tests of the hooks: small enough to reason about.

Tokens are (tokens, C), packed clip after clip; `clips` says (frames, positions). Gradient checkpointing comes in the
three ways that real encoders have: around the block's call, around its forward, and inside its forward.
"""

import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sta_adapter import Backbone, ClipLayout, register_backbone
from sta_adapter.injection.registry import unregister_backbone

WIDTH, HEADS = 16, 2


class ToyBlock(nn.Module):
    """Pre-norm: x + mixing, then + MLP."""

    def __init__(self):
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        self.attn = nn.Linear(WIDTH, WIDTH)
        self.norm2 = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.inside = None

    def _inner(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def forward(self, x):
        if self.inside is not None:
            return checkpoint(self._inner, x, use_reentrant=self.inside)
        return self._inner(x)


class ToyEncoder(nn.Module):
    """Embeds patches and runs the blocks."""

    def __init__(self, depth=3):
        super().__init__()
        self.embed = nn.Linear(8, WIDTH)
        self.blocks = nn.ModuleList(ToyBlock() for _ in range(depth))
        self.gradient_checkpointing = False
        self.style = None

    def forward(self, pixels, clips=((4, 2),)):
        x = self.embed(pixels)
        for block in self.blocks:
            if self.style is None or self.style[0] == "inside":
                x = block(x)
            elif self.style[0] == "call":
                x = checkpoint(block, x, use_reentrant=self.style[1])
            else:
                x = block_with_checkpointed_forward(block, x, self.style[1])
        return x

    def checkpoint_with(self, style, reentrant):
        """Switch checkpointing on in one of the three ways; None switches it off."""
        self.style = None if style is None else (style, reentrant)
        self.gradient_checkpointing = style is not None
        for block in self.blocks:
            block.inside = reentrant if style == "inside" else None


def block_with_checkpointed_forward(block, x, reentrant):
    """As transformers 5 does it: hooks on the block run outside of the checkpoint, hooks on its children inside."""
    original = block.forward
    block.forward = functools.partial(checkpoint, original, use_reentrant=reentrant)
    try:
        return block(x)
    finally:
        del block.forward


TOY = Backbone(
    name="toy",
    encoder_classes=("ToyEncoder",),
    layout=lambda call: ClipLayout(call.arguments.get("clips", ((4, 2),))),
    heads=lambda encoder: HEADS,
    separate_frames=True,
)


@pytest.fixture
def toy():
    """A seeded encoder whose backbone is registered for the test."""
    register_backbone(TOY)
    torch.manual_seed(0)
    yield ToyEncoder()
    unregister_backbone("toy")


def toy_pixels(clips, seed=0):
    """(tokens, 8) for clips of (frames, positions)."""
    return torch.randn(sum(t * n for t, n in clips), 8, generator=torch.Generator().manual_seed(seed))
