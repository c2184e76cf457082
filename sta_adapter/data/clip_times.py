"""Seconds between the temporal steps of clips, for models whose positions follow them (Qwen2.5-VL and its kin).

Processors compute them for whole files, or assume two frames a second.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache

import numpy as np
import torch

from sta_adapter.video.reader import ClipTimes

__all__ = ["step_seconds", "told_seconds"]

logger = logging.getLogger(__name__)

NAMES = ("second_per_grid_ts", "video_second_per_grid")
"""What processors call the seconds from one temporal step of a clip to the next."""


def step_seconds(metadata: ClipTimes, frames: int) -> float:
    """Seconds from one temporal step of so many frames to the next, on average; 1 where there is but one frame."""
    times = np.array(metadata["frames_indices"]) / metadata["fps"]
    begins = times[::frames]
    if len(begins) > 1:
        return float(begins[-1] - begins[0]) / (len(begins) - 1)
    return float(times[-1] - times[0]) / (len(times) - 1) * frames if times[-1] > times[0] else 1.0


def told_seconds(encoded: Mapping[str, torch.Tensor], steps: list[float]) -> dict[str, torch.Tensor]:
    """The tensors of a processor that tell seconds of temporal steps, with the right ones: `steps`, one a clip."""
    names = [name for name in NAMES if name in encoded]
    if names and any(step != round(step) for step in steps):
        _say_if_rounded()
    return {name: torch.tensor(steps, dtype=torch.float32) for name in names}


@cache
def _say_if_rounded() -> None:
    """Once: models of transformers 4 cut the seconds of a step down to a whole number."""
    import transformers

    if int(transformers.__version__.split(".")[0]) < 5:
        logger.warning(
            "transformers %s rounds the seconds of a temporal step down to whole ones in Qwen2.5-VL's positions, so that "
            "steps of less than a second fall together, unless the model numbers text as it was trained: the commands do so, "
            "in Python sta_adapter.text_positions.use_positions(model) does. Or use transformers 5.",
            transformers.__version__,
        )
