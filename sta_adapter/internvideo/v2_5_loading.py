"""InternVideo2.5-Chat from its published files, or from a folder that `save_pretrained` wrote."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig

from sta_adapter.errors import CheckpointError
from sta_adapter.injection.saved_sta import warn_of_sta
from sta_adapter.internvideo.v2_5_config import InternVideo2_5Config, from_published
from sta_adapter.internvideo.v2_5_model import InternVideo2_5ForConditionalGeneration
from sta_adapter.internvideo.v2_5_prompt import END, IMAGE_TOKEN
from sta_adapter.internvideo.weights import (
    DTYPE,
    TOKENIZER_FILES,
    WEIGHT_FILES,
    Weights,
    added_tokens,
    dtype_of_weights,
    fetch_folder,
    fill,
    iterate_weights,
    leave_out_sta,
    load_saved,
    refuse_quantization,
    weight_files,
)

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

    from sta_adapter.internvideo.chat_processor import ChatProcessor

__all__ = ["empty_model", "load_model", "load_processor"]

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
    own = config.get("model_type") == InternVideo2_5Config.model_type
    if own:
        options: dict[str, object] = {DTYPE: dtype}
        if quantization_config is not None:
            options |= {"quantization_config": quantization_config, "device_map": {"": device}}
        model = load_saved(InternVideo2_5ForConditionalGeneration, folder, name, options)
        return model if quantization_config is not None else model.to(device)
    if quantization_config is not None:
        refuse_quantization(name)
    published, left = _published(folder, config, dtype, device)
    warn_of_sta(name, left)
    published.config._name_or_path = os.fspath(name)
    found: nn.Module = published
    return found.to(device)


def load_processor(
    name: str | os.PathLike[str], config: Mapping[str, object], revision: str | None = None
) -> ChatProcessor:
    """See `sta_adapter.internvideo.Builder`."""
    from sta_adapter.internvideo.v2_5_processor import InternVideo2_5Processor

    return InternVideo2_5Processor.from_pretrained(fetch_folder(name, revision, TOKENIZER_FILES), config=config)


def empty_model(config: Mapping[str, object]) -> nn.Module:
    """See `sta_adapter.internvideo.Builder`."""
    return InternVideo2_5ForConditionalGeneration(configuration(config))


def configuration(config: Mapping[str, object]) -> InternVideo2_5Config:
    """The configuration for the contents of a `config.json`, published or our own."""
    if config.get("model_type") == InternVideo2_5Config.model_type:
        return InternVideo2_5Config.from_dict(dict(config))
    return from_published(config)


def _published(
    folder: Path, config: Mapping[str, object], dtype: torch.dtype | str, device: str
) -> tuple[InternVideo2_5ForConditionalGeneration, list[str]]:
    """The model, and names of STA's weights, which it is loaded without."""
    left: list[str] = []
    made, known = from_published(config), added_tokens(folder)
    made.image_token_id = known.get(IMAGE_TOKEN)

    with torch.device("meta"):
        model = InternVideo2_5ForConditionalGeneration(made)
    make_rotary(model, made.text_config)
    weights = leave_out_sta(convert(iterate_weights(weight_files(folder)), made.text_config), left)
    fill(model, weights, source=folder, dtype=dtype_of_weights(dtype, config), device=device)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    ends = [model.generation_config.eos_token_id, known.get(END)]
    flat = [end for found in ends if found is not None for end in (found if isinstance(found, list) else [found])]
    model.generation_config.eos_token_id = sorted(set(flat)) or None
    model.eval()
    return model, left


def make_rotary(model: nn.Module, config: LlamaConfig) -> None:
    """Rotary frequencies, which no checkpoint holds, in the place of those on the meta device."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if "RotaryEmbedding" in type(child).__name__:
                setattr(parent, name, type(child)(config=config))


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
