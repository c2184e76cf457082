"""Steps of training: which clips, at what rate, from what loss."""

from __future__ import annotations

import math

import torch
from reader import IGNORED
from torch import Tensor
from torch.nn import functional

CLIP_NORM, WEIGHT_DECAY, WARMUP = 1.0, 0.01, 50


def picked(count: int, size: int, seed: int, step: int) -> list[int]:
    """The indices of a step, the same whenever it is run: without return within each pass over the data."""
    chosen: list[int] = []
    at = step * size
    while len(chosen) < size:
        epoch, place = divmod(at + len(chosen), count)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(1000 * seed + epoch))
        chosen += order[place : place + size - len(chosen)].tolist()
    return chosen


def schedule(step: int, steps: int) -> float:
    """Warm-up, then a cosine to zero."""
    return min(1.0, (step + 1) / min(WARMUP, max(1, steps // 4))) * 0.5 * (1 + math.cos(math.pi * step / steps))


def loss_of(logits: Tensor, answer: Tensor) -> Tensor:
    """Cross-entropy of the answer's words."""
    return functional.cross_entropy(logits.float().flatten(0, 1), answer.flatten(), ignore_index=IGNORED)


def update(loss: Tensor, optimizer: torch.optim.Optimizer) -> float:
    """One step down the gradient, of a length that is bounded; the loss."""
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], CLIP_NORM)
    optimizer.step()
    return loss.item()
