"""Samples on disk to batches for a model.

Clips are read, checked, decoded, resized and encoded by one class each; `VideoDataset` and `Collator` put them together.
"""

from sta_adapter.data.bad_sample import BadSample
from sta_adapter.data.collator import Collator
from sta_adapter.data.conversation import Sample
from sta_adapter.data.dataset import VideoDataset
from sta_adapter.data.samples import read_samples
from sta_adapter.video.frame_settings import FrameSettings
from sta_adapter.video.resize import fit_frames

__all__ = ["BadSample", "Collator", "FrameSettings", "Sample", "VideoDataset", "fit_frames", "read_samples"]
