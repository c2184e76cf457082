"""The attention weights over frames, written out: what every kernel computes, and which frames a causal one sees."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor


def attention_weights(q: Tensor, k: Tensor, *, causal: bool = False, window: int | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) of arXiv 2510.26027, section 3, in float32 or wider.

    Args:
        q: queries (P, T, H, D): P positions of T frames, in H heads of size D.
        k: keys (P, S, H, D); with `causal`, the queries are those of the last T of the S frames.
        causal: a frame sees none after it.
        window: with `causal`, how many frames each one sees, itself the last of them; None for all.

    Returns:
        (P, H, T, S); the last axis sums to 1.
    """
    wide = torch.promote_types(torch.float32, q.dtype)  # scores in 16 bits overflow, or are too coarse for a softmax
    q, k = (x.to(wide).transpose(1, 2) for x in (q, k))
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(~visible_keys(q.shape[2], k.shape[2], window, q.device), float("-inf"))
    return cast("Tensor", scores.softmax(dim=-1))


def visible_keys(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Booleans (queries, keys): True where a query, one of the last tokens of the keys, sees a key."""
    ones = torch.ones(queries, keys, dtype=torch.bool, device=device)
    last = keys - queries
    visible = ones.tril(last)
    return visible if window is None else visible.triu(last - window + 1)
