"""Clips as the encoder takes them, and a training loop for it and the head."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sta_adapter.training.contexts import full_precision
from sta_adapter.video import read_clip

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load_pixels(path: str, frames: int, size: int) -> Tensor:
    """So many frames of a clip, evenly spaced, the shorter side scaled to `size` and the middle cut out.

    Returns:
        (frames, 3, size, size), normalised. The last frame of a shorter clip is repeated.
    """
    clip = torch.from_numpy(read_clip(path, num_frames=frames).frames).permute(0, 3, 1, 2) / 255
    height, width = clip.shape[2:]
    scale = size / min(height, width)
    shape = (max(size, round(height * scale)), max(size, round(width * scale)))
    clip = F.interpolate(clip, shape, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    clip = clip[..., top : top + size, left : left + size]
    clip = (clip - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    return torch.cat([clip, clip[-1:].expand(frames - len(clip), -1, -1, -1)])


def run_stage(
    model: nn.Module,
    loader: DataLoader[Any],
    loss: Callable[[dict[str, Tensor]], Tensor],
    *,
    epochs: float,
    learning_rate: float = 1e-4,
    weight_decay: float = 0.0,
    accumulate: int = 32,
) -> list[float]:
    """Train what requires a gradient: AdamW, cosine, 2 % warm-up, as published; bf16 on CUDA. A bad clip is an error.

    Args:
        model: only moved and trained, not called.
        loader: gives batches of tensors.
        loss: of a batch.
        epochs: how often to go through the loader.
        learning_rate: at its highest.
        weight_decay: of matrices.
        accumulate: batches of one step.

    Returns:
        The loss of each step.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    batches, steps = math.ceil(epochs * len(loader)), math.ceil(epochs * len(loader) / accumulate)
    losses = [0.0] * steps
    with full_precision(model):
        groups = [{"params": [p for p in trained if p.dim() > 1], "weight_decay": weight_decay}]
        groups += [{"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=learning_rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _cosine(steps))
        for number, batch in enumerate(_cycled(loader, batches)):
            inputs = {name: value.to(device) for name, value in batch.items()}
            first = number - number % accumulate  # of this step
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                value = loss(inputs) / min(accumulate, batches - first)
            value.backward()
            losses[number // accumulate] += value.item()
            if (number + 1) % accumulate == 0 or number + 1 == batches:
                nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
    model.eval()
    return losses


def _cycled(loader: DataLoader[Any], batches: int) -> Any:
    while batches > 0:
        for batch in loader:
            if batches <= 0:
                return
            batches -= 1
            yield batch


def _cosine(steps: int, warmup: float = 0.02) -> Callable[[int], float]:
    rising = max(1, math.ceil(warmup * steps))

    def factor(step: int) -> float:
        return (step + 1) / rising if step < rising else 0.5 * (1 + math.cos(math.pi * (step - rising) / steps))

    return factor
