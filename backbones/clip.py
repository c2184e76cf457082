"""CLIP's image tower: frames come as the batch, and whoever calls must tell the clips."""

from __future__ import annotations

from sta_adapter.backbones.frames import attention_heads, picture_dummy, pixel_layout, pixel_positions
from sta_adapter.backbones.siglip import SIGLIP_LORA, holds_blocks
from sta_adapter.injection.backbone import Backbone

BACKBONE = Backbone(
    name="clip",
    encoder_classes=("CLIPVisionTransformer", "CLIPVisionModel"),
    accepts=holds_blocks,
    layout=pixel_layout(prefix=1),
    separate_frames=True,
    heads=attention_heads,
    blocks="encoder.layers",
    norm="layer_norm2",
    lora=SIGLIP_LORA,
    dummy_inputs=picture_dummy,
    positions=pixel_positions,
)
