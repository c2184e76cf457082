"""InternVideo2.5-Chat from its published files, or from a folder that `save_pretrained` wrote."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from sta_adapter.errors import CheckpointError
from sta_adapter.internvideo.v2_5_config import InternVideo2_5Config, from_published, read_config
from sta_adapter.internvideo.v2_5_model import InternVideo2_5ForConditionalGeneration
from sta_adapter.internvideo.v2_5_prompt import END, IMAGE_TOKEN
from sta_adapter.internvideo.weights import (
    TOKENIZER_FILES,
    WEIGHT_FILES,
    Unallocated,
    Weights,
    added_tokens,
    dtype_of_weights,
    fetch_folder,
    iterate_weights,
    load_published,
    load_saved,
    refuse_quantization,
    weight_files,
)

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

    from sta_adapter.internvideo.chat_processor import ChatProcessor

RENAMED = {
    r"^language_model\.output\.": "language_model.lm_head.",
    r"\.tok_embeddings\.": ".embed_tokens.",
    r"\.attention\.wo\.": ".self_attn.o_proj.",
    r"\.feed_forward\.w1\.": ".mlp.gate_proj.",
    r"\.feed_forward\.w2\.": ".mlp.down_proj.",
    r"\.feed_forward\.w3\.": ".mlp.up_proj.",
    r"\.attention_norm\.": ".input_layernorm.",
    r"\.ffn_norm\.": ".post_attention_layernorm.",
}
"""InternLM2's names, and a Llama's."""


def load_model(
    name: str | os.PathLike[str],
    config: Mapping[str, object],
    *,
    revision: str | None = None,
    dtype: torch.dtype | str = "auto",
    device: str = "cpu",
    quantization_config: BitsAndBytesConfig | None = None,
) -> nn.Module:
    """See `sta_adapter.internvideo.Builder`."""
    folder = fetch_folder(name, revision, (*WEIGHT_FILES, *TOKENIZER_FILES))
    if config.get("model_type") == InternVideo2_5Config.model_type:
        return load_saved(InternVideo2_5ForConditionalGeneration, folder, name, dtype, device, quantization_config)
    if quantization_config is not None:
        refuse_quantization(name)
    made, known = from_published(config), added_tokens(folder)
    made.image_token_id = known.get(IMAGE_TOKEN)
    with Unallocated():
        model = InternVideo2_5ForConditionalGeneration(made)
    weights = convert(iterate_weights(weight_files(folder)), made.text_config)
    loaded = load_published(model, weights, folder, name, dtype_of_weights(dtype, config), device)
    ends = [model.generation_config.eos_token_id, known.get(END)]
    flat = [end for found in ends if found is not None for end in (found if isinstance(found, list) else [found])]
    model.generation_config.eos_token_id = sorted(set(flat)) or None
    return loaded


def load_processor(
    name: str | os.PathLike[str], config: Mapping[str, object], revision: str | None = None
) -> ChatProcessor:
    """See `sta_adapter.internvideo.Builder`."""
    from sta_adapter.internvideo.v2_5_processor import InternVideo2_5Processor

    return InternVideo2_5Processor.from_pretrained(fetch_folder(name, revision, TOKENIZER_FILES), config=config)


def empty_model(config: Mapping[str, object]) -> nn.Module:
    """See `sta_adapter.internvideo.Builder`."""
    return InternVideo2_5ForConditionalGeneration(read_config(config))


def convert(weights: Weights, config: LlamaConfig) -> Iterator[tuple[str, Tensor]]:
    """Published names and tensors to those of the model.

    InternLM2 keeps, for each head of keys, its group of query heads, then the keys, then the values, in one projection.
    """
    keys = int(config.num_key_value_heads or config.num_attention_heads)
    group, head = config.num_attention_heads // keys, config.hidden_size // config.num_attention_heads
    for name, tensor in weights:
        if "rotary_emb" in name:
            continue
        found = name
        for pattern, replacement in RENAMED.items():
            found = re.sub(pattern, replacement, found)
        if ".attention.wqkv." not in found:
            yield found, tensor
            continue
        rows = (keys, group + 2, head)
        if tensor.shape[0] != rows[0] * rows[1] * rows[2]:
            raise CheckpointError(
                f"{name} has {tensor.shape[0]} rows; expected {rows[0] * rows[1] * rows[2]} for {config.num_attention_heads} "
                f"heads, {rows[0]} of keys, of size {head}. Either config.json or the weights are of another model."
            )
        parts = tensor.unflatten(0, rows)
        for letter, part in zip("qkv", (parts[:, :group], parts[:, group], parts[:, group + 1]), strict=True):
            yield found.replace(".attention.wqkv.", f".self_attn.{letter}_proj."), part.reshape(-1, *tensor.shape[1:])
