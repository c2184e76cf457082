"""SigLIP and SigLIP 2, plain image towers: frames come as the batch, and whoever calls must tell the clips."""

from __future__ import annotations

import torch
from torch import nn

from sta_adapter.attention.layout import ClipLayout
from sta_adapter.backbones.frames import (
    attention_heads,
    picture_dummy,
    pixel_layout,
    pixel_positions,
    row_clips,
    unknown_clips,
)
from sta_adapter.errors import LayoutError
from sta_adapter.injection.backbone import Backbone, EncoderCall, LoRARecipe, black, number_of

VISION_QKV = r"encoder\.layers\.\d+\.self_attn\.[qkv]_proj"
SIGLIP_LORA = LoRARecipe(
    target_modules=(
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        *("self_attn.out_proj", "mlp.fc1", "mlp.fc2"),
    ),
    rank_pattern={VISION_QKV: 32},
    alpha_pattern={VISION_QKV: 32},
)
_fixed_layout = pixel_layout(prefix=0)


def holds_blocks(model: nn.Module, encoder: nn.Module) -> bool:
    """Whether this is the tower itself, and not the module of nearly the same name that older versions put around it."""
    return hasattr(encoder, "encoder")


def siglip_layout(call: EncoderCall) -> ClipLayout:
    """Layout from pixels (F, 3, H, W), or from padded patches (F, patches, C) with their `spatial_shapes` (F, 2)."""
    if "spatial_shapes" not in call.arguments:
        return _fixed_layout(call)
    pixels, shapes = call.tensor("pixel_values"), call.tensor("spatial_shapes").tolist()
    lengths = call.clip_lengths
    if lengths is None and len(pixels) > 1:
        raise unknown_clips(f"the {len(pixels)} rows of {type(call.encoder).__name__}'s pixel_values")
    layout = row_clips(*pixels.shape[:2], lengths)
    start = 0
    for frames, tokens in layout.clips:
        stop = start + frames * tokens // pixels.shape[1]
        if any(shape != shapes[start] for shape in shapes[start:stop]):
            raise LayoutError(f"the frames of a clip have the spatial_shapes {shapes[start:stop]}; expected all alike.")
        start = stop
    return layout


def siglip_positions(call: EncoderCall, layout: ClipLayout) -> list[torch.Tensor | None]:
    """Positions of each clip, row by row; of padded patches, those in front are the picture."""
    if "spatial_shapes" not in call.arguments:
        return pixel_positions(call, layout)
    shapes, per_row = call.tensor("spatial_shapes").tolist(), call.tensor("pixel_values").shape[1]
    found: list[torch.Tensor | None] = []
    start = 0
    for frames, positions in layout.clips:
        rows, columns = shapes[start]
        found.append(torch.arange(rows * columns).view(rows, columns) if positions == per_row else None)
        start += frames * positions // per_row
    return found


def siglip_dummy(encoder: nn.Module) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    """One black picture."""
    if not hasattr(encoder.config, "num_patches"):
        return picture_dummy(encoder)
    numbers = number_of(encoder.config, "num_channels") * number_of(encoder.config, "patch_size") ** 2
    pixels = black(encoder, 1, 1, numbers)
    sizes = torch.ones(1, 2, dtype=torch.long, device=pixels.device)
    return (pixels, sizes[:, :1], sizes), {}


BACKBONE = Backbone(
    name="siglip",
    encoder_classes=("SiglipVisionTransformer", "SiglipVisionModel", "Siglip2VisionTransformer", "Siglip2VisionModel"),
    accepts=holds_blocks,
    layout=siglip_layout,
    separate_frames=True,
    heads=attention_heads,
    blocks="encoder.layers",
    norm="layer_norm2",
    lora=SIGLIP_LORA,
    dummy_inputs=siglip_dummy,
    positions=siglip_positions,
)
