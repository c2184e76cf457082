"""Qwen2.5-VL, its Omni model and EXAONE 4.5: Qwen2-VL's packed clips in a tower with RMSNorm, a gated MLP and windowed attention.

The tower reorders its tokens so that windows lie together. It does so frame by frame and alike in each frame of a
clip, also where windows don't divide the grid: row n of a frame's tokens is the same position in every frame, and
`(frames, rows * columns)` describes the reordered tokens as well.
"""

from __future__ import annotations

import dataclasses

import torch

from sta_adapter.attention.layout import ClipLayout
from sta_adapter.backbones.qwen2_vl import (
    QWEN_LORA,
    config_heads,
    grid_dummy,
    grid_layout,
    grid_rows,
    merged_positions,
    vllm_tower,
)
from sta_adapter.backbones.qwen2_vl_text_positions import TEXT_POSITIONS
from sta_adapter.injection.backbone import Backbone, EncoderCall, number_of

# The vision MLP has the names of the language model: gate_proj, up_proj and down_proj. Omni keeps q, k and v apart,
# so that its vision attention takes part by attn.proj alone.
GATED_LORA = dataclasses.replace(
    QWEN_LORA,
    target_modules=(
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        *("attn.qkv", "attn.proj"),
    ),
)


def window_positions(call: EncoderCall, layout: ClipLayout) -> list[torch.Tensor | None]:
    """Positions in the order of the windows; an order that the caller has passed itself is not known."""
    if call.arguments.get("window_index") is not None:
        return [None] * len(layout.clips)
    merge, window, patch = (
        number_of(call.encoder.config, name) for name in ("spatial_merge_size", "window_size", "patch_size")
    )
    return [merged_positions(h, w, merge, window // merge // patch) for _, h, w in grid_rows(call)]


BACKBONE = Backbone(
    name="qwen2_5_vl",
    encoder_classes=(
        "Qwen2_5_VisionTransformerPretrainedModel",
        *("Qwen2_5OmniVisionEncoder", "Exaone4_5_VisionModel"),
    ),
    layout=grid_layout,
    separate_frames=True,
    heads=config_heads,
    lora=GATED_LORA,
    dummy_inputs=grid_dummy,
    positions=window_positions,
    text_positions=TEXT_POSITIONS,
    vllm=vllm_tower("Qwen2_5_VisionTransformer", "original", Qwen2_5_VLForConditionalGeneration="qwen2_5_vl"),
)
