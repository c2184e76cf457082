"""The tiny base that comes with the package: a real Qwen2-VL of 344,544 parameters that tells what is in a frame."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["TINY_ADAPTER", "TINY_BASE", "TINY_BASE_FRAMES", "is_tiny_base", "model_and_adapter", "usual_frames"]

TINY_BASE = Path(__file__).parent / "demo" / "tiny_qwen2_vl"
"""Its folder."""

TINY_ADAPTER = Path(__file__).parent / "demo" / "tiny_adapter"
"""Folder of an adapter for it, which tells ten movements apart."""

TINY_BASE_FRAMES: dict[str, Any] = {"nframes": 8, "min_tokens": None, "max_tokens": None}
"""The `FrameSettings` that it was made for."""


def is_tiny_base(model: str | os.PathLike[str]) -> bool:
    """Whether this is its folder."""
    return Path(model).is_dir() and Path(model).samefile(TINY_BASE)


def model_and_adapter(
    model: str | os.PathLike[str] | None, adapter: str | os.PathLike[str] | None
) -> tuple[str | os.PathLike[str], str | os.PathLike[str] | None]:
    """What is shown where a user names no model: the tiny base, and its adapter if none is named either."""
    if model is not None:
        return model, adapter
    return TINY_BASE, TINY_ADAPTER if adapter is None else adapter


def usual_frames(model: str | os.PathLike[str], given: Mapping[str, object] | None = None) -> dict[str, Any]:
    """Fields of `FrameSettings`: those that are given, over those that a model was made for, known of the tiny base alone."""
    usual = TINY_BASE_FRAMES if is_tiny_base(model) else {}
    given = given or {}
    return {**{name: value for name, value in usual.items() if name != "nframes" or "fps" not in given}, **given}
