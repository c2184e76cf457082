"""DINOv3's vision transformers: DINOv2's rows in blocks that turn q and k by the patches' positions."""

from __future__ import annotations

import dataclasses

from sta_adapter.backbones.dinov2 import BACKBONE as DINOV2
from sta_adapter.compatibility.releases import numbers, version

BACKBONE = dataclasses.replace(
    DINOV2,
    name="dinov3",
    encoder_classes=("DINOv3ViTModel", "DINOv3ViTBackbone"),
    blocks="model.layer" if numbers(version("transformers")) >= (5, 4) else "layer",
)
