"""Looking at temporal attention: which frame looks at which, per block, head and position."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor

from sta_adapter.errors import LayoutError
from sta_adapter.handle import STAHandle
from sta_adapter.layout import ClipLayout
from sta_adapter.modules import TemporalAttention, rotate

if TYPE_CHECKING:
    import numpy as np


def temporal_attention(handle: STAHandle, inputs: Mapping[str, Any], *, clip: int = 0) -> dict[int, np.ndarray]:
    """Attention weights over the frames of one clip, in every block with STA.

    Args:
        handle: of the injected model; it runs once, in its present mode, without gradients.
        inputs: keyword arguments of `handle.model`, as its processor makes them.
        clip: which of the clips in `inputs`, counted from 0 in the order in which the encoder gets them.

    Returns:
        By block index, float32 arrays (heads, positions, T, T): weight of each key frame (last axis) for each query
        frame; the last axis sums to 1.

    Raises:
        LayoutError: `inputs` have no such clip.
    """
    captured: dict[int, tuple[Tensor, ClipLayout]] = {}
    layouts: dict[int, ClipLayout] = {}
    hooks = []
    for index, module in handle.blocks.items():
        hooks.append(module.register_forward_pre_hook(lambda m, args, i=index: layouts.__setitem__(i, args[1])))
        hooks.append(
            module.to_qkv.register_forward_hook(
                lambda m, args, out, i=index: captured.__setitem__(i, (out.detach(), layouts[i]))
            )
        )
    try:
        with torch.no_grad():
            handle.model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return {index: _weights(handle.blocks[index], *captured[index], clip) for index in captured}


def _weights(module: TemporalAttention, qkv: Tensor, layout: ClipLayout, clip: int) -> np.ndarray:
    """(heads, positions, T, T) of one clip from the projection (..., 3 * heads * head_dim) of all tokens."""
    if not 0 <= clip < len(layout.clips):
        raise LayoutError(f"clip {clip} was asked for; the inputs hold {len(layout.clips)}, counted from 0.")
    frames, positions = layout.clips[clip]
    start = sum(t * n for t, n in layout.clips[:clip])
    part = qkv.reshape(layout.num_tokens, -1)[start : start + frames * positions].float()
    q, k, _ = rearrange(part, "(t n) (k h d) -> k n t h d", t=frames, k=3, h=module.num_heads)
    if module.config.rope_theta is not None:
        cos, sin = (x[:frames] for x in layout.rotary_tables(module.head_dim, module.config.rope_theta, q))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    scores = torch.einsum("n t h d, n s h d -> h n t s", q, k) * module.head_dim**-0.5
    if module.config.causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
    return scores.softmax(-1).cpu().numpy()
