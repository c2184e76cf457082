"""A small stand-in for LLaVA-NeXT's own LLaVA-Video: its names and its way of calling the tower; our own code."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

try:
    from transformers.models.siglip.modeling_siglip import SiglipVisionTransformer as Tower
except ImportError:
    from transformers.models.siglip.modeling_siglip import SiglipVisionModel as Tower


class SigLipVisionTransformer(Tower):
    """The tower, spelled as there."""

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs):
        """Before transformers 5, only the module around the tower has this."""
        if hasattr(Tower, "gradient_checkpointing_enable"):
            return super().gradient_checkpointing_enable(gradient_checkpointing_kwargs)
        for module in self.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = True
                module._gradient_checkpointing_func = partial(checkpoint, **gradient_checkpointing_kwargs)


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
    """A tower, and a language model that reads its features in front of the text."""

    def __init__(self, config) -> None:
        super().__init__()
        from transformers import Qwen2Config, Qwen2ForCausalLM

        self.vision_tower = SigLipVisionTransformer(config)
        sizes = {"vocab_size": 64, "hidden_size": config.hidden_size, "intermediate_size": 48, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0}
        self.model = Qwen2ForCausalLM(Qwen2Config(**sizes, **heads))

    def forward(self, input_ids: Tensor, images=None, modalities=["image"]) -> Tensor:
        return self.prepare_inputs_labels_for_multimodal(input_ids, None, None, None, None, images, modalities)

    @torch.no_grad()
    def generate(self, inputs: Tensor, images=None, modalities=["image"], **options):
        features = self(inputs, images, modalities).flatten(0, 1)[None]
        embeddings = torch.cat([features, self.model.get_input_embeddings()(inputs)], dim=1)
        mask = torch.ones(embeddings.shape[:2], dtype=torch.long, device=embeddings.device)
        return self.model.generate(inputs_embeds=embeddings, attention_mask=mask, **options)
