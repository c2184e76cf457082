"""The tiny base that comes with the package: a real Qwen2-VL of 344,544 parameters that tells what is in a frame."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

__all__ = ["TINY_BASE", "TINY_BASE_FRAMES", "is_tiny_base"]

TINY_BASE = Path(__file__).parent / "demo" / "tiny_qwen2_vl"
"""Its folder."""

TINY_BASE_FRAMES: dict[str, Any] = {"nframes": 8, "min_tokens": None, "max_tokens": None}
"""The `FrameSettings` that it was made for."""


def is_tiny_base(model: str | os.PathLike[str]) -> bool:
    """Whether this is its folder."""
    return Path(model).is_dir() and Path(model).samefile(TINY_BASE)
