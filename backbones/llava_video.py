"""LLaVA-Video and LLaVA-OneVision as LLaVA-NeXT's own code runs them: its copy of SigLIP, frames as the batch.

The model lays all pictures and videos of a batch one after the other and calls the tower once. Which rows are a clip
is read from `prepare_inputs_labels_for_multimodal(images=[...], modalities=[...])`: the rows of a "video" are one,
all others are pictures or tiles of them, which is how the model itself takes them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import cast

import torch
from torch import nn

from sta_adapter.attention.layout import EACH_ROW, ClipLengths
from sta_adapter.backbones.siglip import BACKBONE as SIGLIP
from sta_adapter.injection.backbone import ClipSource


def multimodal_clips(model: nn.Module, arguments: Mapping[str, object]) -> ClipLengths | None:
    """Clips of `images`: a list or tensor of (rows, 3, H, W) or (3, H, W), or one batch (rows, 3, H, W) of pictures."""
    images, modalities = arguments.get("images"), arguments.get("modalities", ["image"])
    if not isinstance(images, Iterable):
        return None
    if isinstance(images, torch.Tensor) and images.dim() == 4:
        return EACH_ROW
    one = isinstance(modalities, str) or not isinstance(modalities, Iterable)
    kinds = [modalities] if one else list(cast("Iterable[object]", modalities))
    lengths: list[int] = []
    for index, item in enumerate(images):
        rows = item.shape[0] if item.dim() == 4 else 1
        lengths += [rows] if kinds[index : index + 1] == ["video"] else [1] * rows
    return tuple(lengths)


BACKBONE = dataclasses.replace(
    SIGLIP,
    name="llava_video",
    encoder_classes=("SigLipVisionTransformer",),
    priority=1,
    clip_source=ClipSource(
        model_classes=("LlavaMetaForCausalLM",),
        methods={"prepare_inputs_labels_for_multimodal": multimodal_clips},
    ),
)
