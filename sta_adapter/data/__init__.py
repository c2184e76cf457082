"""Samples on disk to batches for a model.

Clips are read, checked, decoded, resized and encoded by one class each; `VideoDataset` and `Collator` put them
together.
"""

from typing import TYPE_CHECKING

from sta_adapter._lazy import lazy

if TYPE_CHECKING:
    from sta_adapter.data.bad_sample import BadSample
    from sta_adapter.data.collator import Collator
    from sta_adapter.data.conversation import Sample
    from sta_adapter.data.dataset import VideoDataset
    from sta_adapter.data.samples import read_samples
    from sta_adapter.video.frame_settings import FrameSettings
    from sta_adapter.video.resize import fit_frames

__all__ = ["BadSample", "Collator", "FrameSettings", "Sample", "VideoDataset", "fit_frames", "read_samples"]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "sta_adapter.data.bad_sample": ["BadSample"],
        "sta_adapter.data.collator": ["Collator"],
        "sta_adapter.data.conversation": ["Sample"],
        "sta_adapter.data.dataset": ["VideoDataset"],
        "sta_adapter.data.samples": ["read_samples"],
        "sta_adapter.video.frame_settings": ["FrameSettings"],
        "sta_adapter.video.resize": ["fit_frames"],
    },
)
