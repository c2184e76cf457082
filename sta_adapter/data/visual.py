"""A decoded clip or image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sta_adapter.video.reader import ClipTimes

__all__ = ["Visual"]


@dataclass(frozen=True)
class Visual:
    """A decoded clip or image.

    Attributes:
        kind: "video" or "image".
        pixels: `(T, H, W, 3)` uint8, of one frame for an image.
        metadata: when frames begin, as transformers tells it: fps, frames_indices (over fps: seconds),
            total_num_frames, duration.
        resized: whether the pixels have their final size, so that the processor must not resize them.
    """

    kind: str
    pixels: NDArray[np.uint8]
    metadata: ClipTimes | None = None
    resized: bool = False
