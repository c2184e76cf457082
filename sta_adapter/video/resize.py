"""Frames in sizes that a vision encoder takes."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from sta_adapter.errors import DataError
from sta_adapter.video.image import MOST_PIXELS


def fit_frames(frames: NDArray[np.uint8], *, factor: int, min_pixels: float, max_pixels: float) -> NDArray[np.uint8]:
    """Resize frames so that both edges are multiples of `factor` and the area is within the limits, about in proportion.

    Args:
        frames: `(T, H, W, 3)` uint8.
        factor: edge length of a visual token.
        min_pixels: least area of a frame.
        max_pixels: largest area of a frame.

    Returns:
        `(T, H', W', 3)` uint8.
    """
    height, width = frames.shape[1:3]
    new_height, new_width = (max(factor, round(edge / factor) * factor) for edge in (height, width))
    area = new_height * new_width
    if area > max_pixels or area < min_pixels:
        fit, bound = (math.floor, max_pixels) if area > max_pixels else (math.ceil, min_pixels)
        scale = math.sqrt(bound / (height * width)) / factor
        new_height, new_width = (max(1, fit(edge * scale)) * factor for edge in (height, width))
    if new_height * new_width > MOST_PIXELS:
        raise DataError(
            f"frames of {width}x{height} would become {new_width}x{new_height}, more than {MOST_PIXELS} pixels; lower min_pixels."
        )
    return resize_frames(frames, new_height, new_width)


def resize_frames(frames: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Frames `(T, H, W, 3)` uint8 in another size."""
    if frames.shape[1:3] == (height, width):
        return frames
    channels_last = torch.from_numpy(frames).permute(0, 3, 1, 2)
    # On uint8 in this memory layout torch is more than ten times as fast as on floats, and does what processors do.
    resized = torch.nn.functional.interpolate(channels_last, (height, width), mode="bicubic", antialias=True)
    return resized.permute(0, 2, 3, 1).contiguous().numpy()
