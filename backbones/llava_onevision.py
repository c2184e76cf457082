"""LLaVA-OneVision, and LLaVA-Video weights in its classes: a SigLIP tower with the frames of all clips as its batch.

The full model takes videos as (clips, frames, 3, H, W) and flattens them before it calls the tower, so the clips are
read from its own calls: `get_video_features` and `get_image_features`, or `forward` in releases without them. Every
row of its `pixel_values` is a picture or a tile of one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sta_adapter.attention.layout import EACH_ROW, ClipLengths
from sta_adapter.backbones.llava_onevision_unequal import REPEAT, packed_videos, repeated_videos
from sta_adapter.backbones.siglip import BACKBONE as SIGLIP
from sta_adapter.backbones.siglip import holds_blocks
from sta_adapter.data.clip_batches import missing_frames
from sta_adapter.errors import LayoutError
from sta_adapter.injection.backbone import ClipSource, VLLMTower

FULL = "LlavaOnevisionForConditionalGeneration"
MODELS = ("LlavaOnevisionModel", FULL)


def is_within_llava(model: nn.Module, encoder: nn.Module) -> bool:
    """Whether the tower belongs to a LLaVA-OneVision."""
    return holds_blocks(model, encoder) and any(
        cls.__name__ in MODELS for module in model.modules() for cls in type(module).__mro__
    )


def video_clips(model: nn.Module, arguments: Mapping[str, object]) -> ClipLengths | None:
    """Clips of videos (clips, frames, 3, H, W)."""
    videos = arguments.get("pixel_values_videos", arguments.get("pixel_values"))
    if not isinstance(videos, torch.Tensor) or videos.dim() != 5:
        return None
    return tuple((~missing_frames(videos)).sum(1).tolist())


def picture_clips(model: nn.Module, arguments: Mapping[str, object]) -> ClipLengths | None:
    """Pictures: each tile is a clip of one frame."""
    return EACH_ROW


def vllm_video_clips(model: nn.Module, arguments: Mapping[str, Any]) -> ClipLengths | None:
    """Clips of vLLM's `_process_video_pixels(inputs)`, a list of clips or a tensor (clips, frames, 3, H, W)."""
    return tuple(len(clip) for clip in arguments["inputs"]["pixel_values_videos"])


def no_clips(model: nn.Module, arguments: Mapping[str, object]) -> ClipLengths | None:
    """Of a method that runs no encoder."""
    return None


def forward_clips(model: nn.Module, arguments: Mapping[str, object]) -> ClipLengths | None:
    """Clips of a whole forward, where the model has no methods for pictures and videos."""
    pictures, videos = arguments.get("pixel_values"), arguments.get("pixel_values_videos")
    parts = (model, getattr(model, "model", None))  # transformers 4.52: the inner model alone has it
    if any(hasattr(part, "get_video_features") for part in parts) or (pictures is None and videos is None):
        return None
    if pictures is not None and videos is not None:
        raise LayoutError(
            "this release of transformers encodes pictures and videos in one forward, and STA can't tell them apart. "
            "Use transformers 4.50 or newer, or pictures and videos in calls of their own."
        )
    if isinstance(videos, torch.Tensor) and missing_frames(videos).any():
        raise LayoutError(
            "this release of transformers takes no clips of unequal lengths in one forward. Use transformers 4.57 or newer, "
            "one nframes for all clips, or one sample at a time."
        )
    return EACH_ROW if videos is None else video_clips(model, {"pixel_values_videos": videos})


BACKBONE = dataclasses.replace(
    SIGLIP,
    name="llava_onevision",
    accepts=is_within_llava,
    priority=1,
    clip_source=ClipSource(
        model_classes=MODELS,
        methods={
            "forward": forward_clips,
            "get_video_features": video_clips,
            "get_image_features": picture_clips,
            REPEAT: no_clips,
        },
        runs={"get_video_features": packed_videos, REPEAT: repeated_videos},
    ),
    vllm=VLLMTower(
        {FULL: f"vllm.model_executor.models.llava_onevision:{FULL}"},
        {
            "clip_source": ClipSource(
                (FULL,), {"_process_video_pixels": vllm_video_clips, "_process_image_pixels": picture_clips}
            )
        },
        splits_clips=True,
    ),
)
