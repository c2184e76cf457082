"""Samples on disk to batches for a model.

Clips are read, checked, decoded, resized and encoded by one class each; `VideoDataset` and `Collator` put them together.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sta_adapter.data.bad_sample import BadSample
    from sta_adapter.data.collator import Collator
    from sta_adapter.data.conversation import Sample
    from sta_adapter.data.dataset import VideoDataset
    from sta_adapter.data.samples import read_samples
    from sta_adapter.video.frame_settings import FrameSettings
    from sta_adapter.video.resize import fit_frames

__all__ = ["BadSample", "Collator", "FrameSettings", "Sample", "VideoDataset", "fit_frames", "read_samples"]

_PLACES = {
    "BadSample": "sta_adapter.data.bad_sample",
    "Collator": "sta_adapter.data.collator",
    "Sample": "sta_adapter.data.conversation",
    "VideoDataset": "sta_adapter.data.dataset",
    "read_samples": "sta_adapter.data.samples",
    "FrameSettings": "sta_adapter.video.frame_settings",
    "fit_frames": "sta_adapter.video.resize",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for, so that commands start without torch."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    """What is there, for completion."""
    return sorted({*globals(), *__all__})
