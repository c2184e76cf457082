"""What both chat models take for a picture and for the frames of a clip, and how they scale colours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image
    from torch import Tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's colours."""
Picture: TypeAlias = "Image | NDArray[np.uint8] | Tensor"
"""Pillow's, or (H, W, 3) or (3, H, W) uint8."""
Frames: TypeAlias = "NDArray[np.uint8] | Tensor | Sequence[Picture]"
"""(T, H, W, 3) or (T, 3, H, W) uint8, or pictures of one size."""
