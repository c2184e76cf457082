"""InternVideo2-Chat from its published files, or from a folder that `save_pretrained` wrote; LoRA in published weights is merged."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sta_adapter.errors import CheckpointError
from sta_adapter.internvideo.v2_config import LORA_TARGETS, MODEL_TYPE, read_config
from sta_adapter.internvideo.v2_model import InternVideo2Chat
from sta_adapter.internvideo.weights import (
    TOKENIZER_FILES,
    WEIGHT_FILES,
    Unallocated,
    Weights,
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

OTHER_FILES = ("*/config.json", "bert/*", "bert-base-uncased/*")
"""A language model's configuration and the Q-Former's tokenizer, where a folder has them."""
NAMES = (
    (re.compile(r"^qformer\.bert\."), "qformer."),
    (re.compile(r"^qformer\.embeddings\.LayerNorm\."), "qformer.embeddings.layernorm."),
    (re.compile(r"^(qformer\..*)\.self\."), r"\1.attention."),
    (re.compile(r"^lm\.base_model\.model\."), "lm."),
    (re.compile(r"\.base_layer\."), "."),
    (re.compile(r"^(vision_encoder\..*\.ls[12])\.gamma$"), r"\1"),
)
"""Published names and ours."""
UNUSED = re.compile(r"^project_down\.|^qformer\.(cls|pooler)\.|position_ids$|rotary_emb\.inv_freq$")
"""Weights that no answer depends on: of a loss that the chat model's training has switched off, of heads, and of buffers."""
LORA = re.compile(r"^(.*)\.lora_(A|B)\.default\.weight$")


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
    folder = fetch_folder(name, revision, (*WEIGHT_FILES, *TOKENIZER_FILES, *OTHER_FILES))
    if quantization_config is not None:
        if config.get("model_type") != MODEL_TYPE:
            refuse_quantization(name)
        return load_saved(InternVideo2Chat, folder, name, dtype, device, quantization_config)
    made = read_config(config, folder)
    with Unallocated():
        model = InternVideo2Chat(made)
    weights = model_weights(iterate_weights(weight_files(folder)), made.lora_scale)
    made.lora_scale = None  # it is merged then
    return load_published(model, weights, folder, name, dtype_of_weights(dtype, config), device)


def load_processor(
    name: str | os.PathLike[str], config: Mapping[str, object], revision: str | None = None
) -> ChatProcessor:
    """See `sta_adapter.internvideo.Builder`."""
    from sta_adapter.internvideo.v2_processor import InternVideo2ChatProcessor

    folder = fetch_folder(name, revision, (*TOKENIZER_FILES, *OTHER_FILES))
    return InternVideo2ChatProcessor.of_folder(folder, read_config(config, folder), str(name))


def empty_model(config: Mapping[str, object]) -> nn.Module:
    """See `sta_adapter.internvideo.Builder`."""
    return InternVideo2Chat(read_config(config))


def model_weights(weights: Weights, lora_scale: float | None) -> Iterator[tuple[str, Tensor]]:
    """Weights by our model's names; LoRA's product, where there is one, is merged with its scale."""
    waiting: dict[str, dict[str, Tensor]] = {}
    for published, tensor in weights:
        name = published
        for pattern, ours in NAMES:
            name = pattern.sub(ours, name)
        if UNUSED.search(name):
            continue
        lora = LORA.match(name)
        layer = lora[1] if lora else name.removesuffix(".weight")
        if lora_scale is None or not (lora or (layer.startswith("lm.") and layer.endswith(LORA_TARGETS))):
            yield name, tensor
            continue
        parts = waiting.setdefault(layer, {})
        parts[lora[2] if lora else "weight"] = tensor
        if len(parts) == 3:
            yield f"{layer}.weight", _merged(layer, lora_scale, **waiting.pop(layer))
    if waiting:
        layer, parts = next(iter(waiting.items()))
        raise CheckpointError(
            f"{len(waiting)} layers of the language model, first {layer!r}, have {', '.join(sorted(parts))} of A, B (LoRA) and "
            "weight; config.json says that LoRA was trained (use_lora), so all three are expected. Either that or the weights "
            "are of another release; download both again."
        )


def _merged(layer: str, scale: float, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
    if (A.shape[-1], B.shape[0]) != (weight.shape[1], weight.shape[0]) or A.shape[0] != B.shape[1]:
        raise CheckpointError(
            f"LoRA of {layer!r} has the shapes {tuple(A.shape)} and {tuple(B.shape)}, which don't fit its weight "
            f"{tuple(weight.shape)}; download the checkpoint again."
        )
    return (weight.float() + scale * (B.float() @ A.float())).to(weight.dtype)
