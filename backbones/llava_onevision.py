"""LLaVA-OneVision, and LLaVA-Video weights in its classes: a SigLIP tower with the frames of all clips as its batch.

The full model takes videos as (clips, frames, 3, H, W) and flattens them before it calls the tower, so the clips are
read from its own calls: `get_video_features` and `get_image_features`, or `forward` in releases without them. Every
row of its `pixel_values` is a picture or a tile of one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from sta_adapter.attention.layout import EACH_ROW, ClipLengths
from sta_adapter.backbones.llava_onevision_vllm import VLLM_TOWER
from sta_adapter.backbones.siglip import BACKBONE as SIGLIP
from sta_adapter.backbones.siglip import holds_blocks
from sta_adapter.compatibility.seams import incompatible
from sta_adapter.data.clip_batches import missing_frames
from sta_adapter.errors import LayoutError
from sta_adapter.injection.backbone import ClipSource

MODELS = ("LlavaOnevisionModel", "LlavaOnevisionForConditionalGeneration")


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


def packed_videos(model: Any, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call `get_video_features`; clips of unequal lengths, filled up with frames of NaN, are encoded as one long clip.

    Its features are taken apart again, with the model's newline behind each clip, as the model has it behind every one.
    """
    name = next((key for key in ("pixel_values_videos", "pixel_values") if key in kwargs), "")
    videos = kwargs[name] if name else args[0] if args else None
    if not isinstance(videos, torch.Tensor) or videos.dim() != 5 or not missing_frames(videos).any():
        return method(*args, **kwargs)
    there = ~missing_frames(videos)
    lengths, packed = there.sum(1).tolist(), videos[there][None]
    args, kwargs = (args, {**kwargs, name: packed}) if name else ((packed, *args[1:]), kwargs)
    output = method(*args, **kwargs, clip_lengths=lengths)
    features = output if isinstance(output, torch.Tensor) else getattr(output, "pooler_output", None)
    frames = sum(lengths)
    if not isinstance(features, torch.Tensor) or features.dim() != 3 or features.shape[1] % frames > 1:
        raise incompatible("transformers", f"{type(model).__name__}'s features of videos are {type(features).__name__}")
    tokens, ended = divmod(features.shape[1], frames)  # newer releases put the last newline there by themselves
    inner = model if hasattr(model, "image_newline") else model.model
    newline = inner.image_newline[None, None].to(features)
    parts = [
        part
        for clip in torch.split(features[:, : frames * tokens], [length * tokens for length in lengths], 1)
        for part in (clip, newline)
    ]
    joined = torch.cat(parts if ended else parts[:-1], 1)
    if output is features:
        return joined
    output.pooler_output = joined
    return output


def picture_clips(model: nn.Module, arguments: Mapping[str, object]) -> ClipLengths | None:
    """Pictures: each tile is a clip of one frame."""
    return EACH_ROW


def forward_clips(model: nn.Module, arguments: Mapping[str, object]) -> ClipLengths | None:
    """Clips of a whole forward, where the model has no methods for pictures and videos."""
    pictures, videos = arguments.get("pixel_values"), arguments.get("pixel_values_videos")
    if hasattr(model, "get_video_features") or (pictures is None and videos is None):
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
        },
        runs={"get_video_features": packed_videos},
    ),
    vllm=VLLM_TOWER,
)
