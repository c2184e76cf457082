"""VideoLLaMA 3: packed clips of any size, described by `grid_thw`; each clip has its own spatial merging."""

from __future__ import annotations

import torch
from torch import nn

from sta_adapter.attention.layout import ClipLayout
from sta_adapter.backbones.frames import attention_heads
from sta_adapter.backbones.qwen2_vl import grid_layout, grid_rows, merged_positions
from sta_adapter.backbones.siglip import SIGLIP_LORA
from sta_adapter.injection.backbone import Backbone, EncoderCall, black, number_of


def merged_dummy(encoder: nn.Module) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    """A black clip of two frames of 2x2 patches."""
    pixels = black(encoder, 8, number_of(encoder.config, "num_channels") * number_of(encoder.config, "patch_size") ** 2)
    grid = torch.tensor([[2, 2, 2]], device=pixels.device)
    return (), {"pixel_values": pixels, "grid_thw": grid, "merge_sizes": grid.new_tensor([2])}


def clip_positions(call: EncoderCall, layout: ClipLayout) -> list[torch.Tensor | None]:
    """Positions of each clip, merged as its own entry of `merge_sizes` says."""
    merges = call.tensor("merge_sizes").tolist()
    return [merged_positions(h, w, merge) for (_, h, w), merge in zip(grid_rows(call), merges, strict=True)]


BACKBONE = Backbone(
    name="video_llama_3",
    encoder_classes=("VideoLlama3VisionModel",),
    layout=grid_layout,
    separate_frames=True,
    heads=attention_heads,
    blocks="encoder.layers",
    norm="layer_norm2",
    lora=SIGLIP_LORA,
    dummy_inputs=merged_dummy,
    positions=clip_positions,
)
