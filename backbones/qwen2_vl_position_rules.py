"""Where the tokens of a clip stand in Qwen2-VL's language model, and where the text goes on: by its own rule, and by VideoRoPE's."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch
from torch import Tensor


class PositionRule(Protocol):
    """Where the tokens of a clip stand, and where the text goes on."""

    dtype: torch.dtype

    def clip(self, start: float, frames: int, rows: int, columns: int) -> tuple[Tensor, float]:
        """Positions (3, frames * rows * columns) of a clip on temporal, row and column axis, and the next free one.

        Args:
            start: the first free position.
            frames: temporal steps.
            rows: rows of merged tokens.
            columns: columns of merged tokens.
        """


@dataclasses.dataclass(frozen=True)
class OriginalPositions:
    """Qwen2-VL's own rule, as in transformers 4: the text after a clip goes on behind its largest position."""

    dtype = torch.long

    def clip(self, start: float, frames: int, rows: int, columns: int) -> tuple[Tensor, float]:
        """See `PositionRule`."""
        axes = [torch.arange(size) + start for size in (frames, rows, columns)]
        return torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1), start + max(frames, rows, columns)


@dataclasses.dataclass(frozen=True)
class VideoRopePositions:
    """Frames `scale_factor` apart on the temporal axis, rows and columns around their frame's position."""

    scale_factor: float
    dtype = torch.float32

    def clip(self, start: float, frames: int, rows: int, columns: int) -> tuple[Tensor, float]:
        """See `PositionRule`; the text goes on behind the last frame."""
        frame = torch.arange(frames, dtype=self.dtype) * self.scale_factor + start
        row = frame[:, None] + torch.arange(rows) - (rows - 1) // 2
        column = frame[:, None] + torch.arange(columns) - (columns - 1) // 2
        shape = (frames, rows, columns)
        axes = [frame[:, None, None], row[:, :, None], column[:, None, :]]
        return torch.stack([axis.expand(shape) for axis in axes]).flatten(1), frame[-1].item() + 1
