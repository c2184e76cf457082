"""Temporal attention relative to even spread: of whole frames, and of patches in one byte a value, small enough for a page.

Even spread gives each of the V frames that a frame may look at the weight 1 / V. A weight w is told as w * V: 1 is
even, 2 is twice as much. A byte holds the logarithm of that to the base T, the number of frames, so that 1 is exact and
the rest is within exp(log(T) / 254) - 1 of itself (1.7 % at 64 frames); below 1 / T it is cut off.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

BUDGET = 8 << 20  # bytes of a page's patches
EVEN, HIDDEN = 127, 255  # codes; those of weights go from 0 to 254
FEWEST_CELLS, FEWEST_BLOCKS = 24, 4
SCALES = (1.25, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


@dataclass(frozen=True)
class Pooling:
    """How much of the patches' attention is kept."""

    edge: int  # a cell is the mean of edge x edge patches
    by_head: bool  # each head by itself; else their mean
    blocks: int  # how many blocks fit


def choose_pooling(
    blocks: int, heads: int, picture: tuple[int, int], frames: int, budget: int = BUDGET
) -> Pooling | None:
    """The finest that fits, or None: patches are pooled before blocks are left out, and heads are averaged last."""
    fewest = min(FEWEST_CELLS, picture[0] * picture[1])
    for by_head in (True, False) if heads > 1 else (True,):
        kept = blocks
        while kept >= min(FEWEST_BLOCKS, blocks):
            for edge in range(1, max(picture) + 1):
                cells = -(-picture[0] // edge) * -(-picture[1] // edge)
                if cells < fewest:
                    break
                if kept * (heads if by_head else 1) * cells * frames**2 <= budget:
                    return Pooling(edge, by_head, kept)
            kept //= 2
    return None


def may_see(even: np.ndarray) -> np.ndarray:
    """(T, T) bool, whether the frame of a row may look at that of a column; from `Observation.even`, (T,)."""
    frames = len(even)
    count = np.rint(1 / (1 - even)).astype(int)
    if (count == frames).all():
        return np.ones((frames, frames), bool)
    back = np.arange(frames)[:, None] - np.arange(frames)
    return (back >= 0) & (back < count[:, None])


def pool(weights: Tensor, positions: Tensor, pooling: Pooling) -> Tensor:
    """Weights (heads, N, T, T) of patches as those of cells (heads or 1, rows, columns, T, T), means of their patches."""
    laid = weights[:, positions.to(weights.device)]  # heads, rows, columns, T, T
    if not pooling.by_head:
        laid = laid.mean(0, keepdim=True)
    if pooling.edge == 1:
        return laid
    heads, rows, columns, frames, _ = laid.shape
    flat = laid.permute(0, 3, 4, 1, 2).reshape(heads, frames * frames, rows, columns)
    cells = functional.avg_pool2d(flat, pooling.edge, ceil_mode=True, count_include_pad=False)
    return cells.unflatten(1, (frames, frames)).permute(0, 3, 4, 1, 2)


def encode(weights: Tensor | np.ndarray, sees: np.ndarray) -> np.ndarray:
    """Weights (..., T, T) as codes (..., T, T) uint8; `sees` is of `may_see`."""
    weights, allowed = torch.as_tensor(weights), torch.from_numpy(sees)
    allowed = allowed.to(weights.device)
    frames = max(2, sees.shape[-1])  # with one frame all is even
    relative = weights.float() * allowed.sum(-1, keepdim=True)
    codes = EVEN * (1 + relative.clamp_min(1e-12).log() / math.log(frames))
    codes = codes.round().clamp(0, HIDDEN - 1).to(torch.uint8)
    return torch.where(allowed, codes, HIDDEN).to(torch.uint8).cpu().numpy()


def decode(codes: np.ndarray, frames: int | None = None) -> np.ndarray:
    """The inverse of `encode`: multiples of even spread, float32, NaN where a frame may not look.

    Of codes (..., T, T) uint8, or of any of them where T is given as `frames`.
    """
    base = max(2, codes.shape[-1] if frames is None else frames)
    relative = np.power(np.float32(base), (codes.astype(np.float32) - EVEN) / EVEN)
    return np.where(codes == HIDDEN, np.float32("nan"), relative)


def scale_of(relative: np.ndarray) -> float:
    """Where the colours end: the multiple of even spread that nearly all values stay below, and its inverse at the other end.

    What is above even decides: below it there is no end, and little difference between hardly and not at all.
    """
    seen = relative[np.isfinite(relative)]
    wanted = float(np.quantile(seen, 0.995)) if seen.size else 1.0
    return float(next((scale for scale in SCALES if wanted <= scale), SCALES[-1]))
