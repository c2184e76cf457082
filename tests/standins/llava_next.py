"""A small stand-in for LLaVA-NeXT's own LLaVA-Video: its names and its way of calling the tower; our own code."""

from __future__ import annotations

import torch
from torch import Tensor, nn

try:
    from transformers.models.siglip.modeling_siglip import SiglipVisionTransformer as Tower
except ImportError:
    from transformers.models.siglip.modeling_siglip import SiglipVisionModel as Tower


class SigLipVisionTransformer(Tower):
    """The tower, spelled as there."""


class LlavaMetaForCausalLM:
    """Encodes all pictures and videos in one call."""

    def prepare_inputs_labels_for_multimodal(
        self, input_ids, position_ids, attention_mask, past_key_values, labels, images, modalities=["image"]
    ):
        if images is None or input_ids.shape[1] == 1:
            return input_ids
        rows = images
        if isinstance(images, list) or images.ndim == 5:
            rows = torch.cat([item if item.ndim == 4 else item[None] for item in images])
        return self.vision_tower(rows).last_hidden_state


class LlavaQwenForCausalLM(nn.Module, LlavaMetaForCausalLM):
    """A tower, and features in the place of text."""

    def __init__(self, config) -> None:
        super().__init__()
        self.vision_tower = SigLipVisionTransformer(config)

    def forward(self, input_ids: Tensor, images=None, modalities=["image"]) -> Tensor:
        return self.prepare_inputs_labels_for_multimodal(input_ids, None, None, None, None, images, modalities)
