"""Qwen3-VL, Qwen3.5, Qwen4-Exp, their mixtures of experts, and Qwen3-Omni's tower: Qwen2-VL's packed clips.

The features that some blocks hand to the language model (deepstack) are block outputs, so they carry STA's update.
"""

from __future__ import annotations

import dataclasses

from sta_adapter.backbones.qwen2_vl import (
    QWEN_LORA,
    config_heads,
    grid_dummy,
    grid_layout,
    grid_positions,
    vllm_tower,
)
from sta_adapter.injection.backbone import Backbone

# From Qwen3.5 on, most layers of the language model have linear attention, with projections of other names.
LINEAR_ATTENTION = ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z", "linear_attn.out_proj")
QWEN3_LORA = dataclasses.replace(
    QWEN_LORA,
    target_modules=(
        *({"mlp.fc1": "mlp.linear_fc1", "mlp.fc2": "mlp.linear_fc2"}.get(n, n) for n in QWEN_LORA.target_modules),
        *LINEAR_ATTENTION,
    ),
)

BACKBONE = Backbone(
    name="qwen3_vl",
    encoder_classes=(
        *("Qwen3VLVisionModel", "Qwen3VLMoeVisionModel", "Qwen3OmniMoeVisionEncoder"),
        *("Qwen3_5VisionModel", "Qwen3_5MoeVisionModel", "Qwen4ExpVisionModel"),
    ),
    layout=grid_layout,
    separate_frames=True,
    heads=config_heads,
    lora=QWEN3_LORA,
    dummy_inputs=grid_dummy,
    positions=grid_positions,
    vllm=vllm_tower(
        "Qwen3_VisionTransformer",
        Qwen3VLForConditionalGeneration="qwen3_vl",
        Qwen3VLMoeForConditionalGeneration="qwen3_vl_moe",
        Qwen3_5ForConditionalGeneration="qwen3_5",
        Qwen3_5MoeForConditionalGeneration="qwen3_5",
    ),
)
