"""InternVL 2.5, 3 and 3.5 in transformers: a tower with a class token, layer scale, and frames as its batch.

The processor puts the frames of videos and the tiles of pictures into one `pixel_values`, so that the full model
can't tell one from the other: several rows without told clips are an error there. The tower by itself takes all its
rows as one clip.
"""

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import Any

from torch import nn

from sta_adapter.attention.layout import ClipLengths
from sta_adapter.backbones.frames import (
    EACH_ROW,
    attention_heads,
    pixel_dummy,
    pixel_layout,
    pixel_positions,
    unknown_clips,
)
from sta_adapter.injection.backbone import Backbone, ClipSource, LoRARecipe, VLLMTower


def feature_clips(model: nn.Module, arguments: Mapping[str, object]) -> ClipLengths | None:
    """Clips of `get_image_features(pixel_values)`: one row is a picture, more must be told."""
    pixels = arguments["pixel_values"]
    rows = len(pixels) if isinstance(pixels, Sized) else 1
    if rows > 1:
        raise unknown_clips(f"the {rows} rows of {type(model).__name__}'s pixel_values")
    return (1,)


def generate_clips(model: nn.Module, arguments: Mapping[str, object]) -> ClipLengths | None:
    """Clips of `generate`, which takes `clip_lengths` as the forward does; untold, it is there that they are asked for."""
    return None


def vllm_clips(model: nn.Module, arguments: Mapping[str, Any]) -> ClipLengths | None:
    """Clips of vLLM's `_process_vision_input(image_input)`, which says whether its rows are frames or tiles."""
    given = arguments["image_input"]
    if given["type"] == "pixel_values_videos":
        return tuple(int(n) for n in given["num_patches"])
    return EACH_ROW if given["type"] == "pixel_values" else None


INTERNVL_LORA = LoRARecipe(
    target_modules=(
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        *("attention.projection_layer", "mlp.fc1", "mlp.fc2"),
    ),
    rank_pattern={r"attention\.[qkv]_proj": 32},
    alpha_pattern={r"attention\.[qkv]_proj": 32},
)

BACKBONE = Backbone(
    name="internvl",
    encoder_classes=("InternVLVisionModel",),
    layout=pixel_layout(must_be_told=False),
    separate_frames=True,
    heads=attention_heads,
    blocks="encoder.layer",
    norm="layernorm_after",
    clip_source=ClipSource(
        model_classes=("InternVLModel", "InternVLForConditionalGeneration"),
        methods={"get_image_features": feature_clips, "generate": generate_clips},
    ),
    lora=INTERNVL_LORA,
    dummy_inputs=pixel_dummy,
    positions=pixel_positions,
    vllm=VLLMTower(
        {"InternVLForConditionalGeneration": "vllm.model_executor.models.interns1:InternS1ForConditionalGeneration"},
        {
            "encoder_classes": ("InternS1VisionModel",),
            "layout": pixel_layout(),
            "clip_source": ClipSource(("InternS1ForConditionalGeneration",), {"_process_vision_input": vllm_clips}),
        },
        splits_clips=True,
    ),
)
