"""LLaVA-OneVision in vLLM: the same tower, and the methods of vLLM's model that tell the clips."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from sta_adapter.attention.layout import ClipLengths
from sta_adapter.backbones.frames import EACH_ROW
from sta_adapter.injection.backbone import ClipSource, VLLMTower

MODEL = "LlavaOnevisionForConditionalGeneration"


def video_clips(model: nn.Module, arguments: Mapping[str, Any]) -> ClipLengths | None:
    """Clips of `_process_video_pixels(inputs)`, a list of clips or a tensor (clips, frames, 3, H, W)."""
    return tuple(len(clip) for clip in arguments["inputs"]["pixel_values_videos"])


def picture_clips(model: nn.Module, arguments: Mapping[str, object]) -> ClipLengths | None:
    """Pictures: each tile is a clip of one frame."""
    return EACH_ROW


VLLM_TOWER = VLLMTower(
    {MODEL: f"vllm.model_executor.models.llava_onevision:{MODEL}"},
    {
        "clip_source": ClipSource(
            (MODEL,), {"_process_video_pixels": video_clips, "_process_image_pixels": picture_clips}
        )
    },
    splits_clips=True,
)
