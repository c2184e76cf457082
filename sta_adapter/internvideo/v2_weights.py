"""Published weights of InternVideo2-Chat by the names of our model; LoRA that they hold is merged."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import Tensor

from sta_adapter.errors import CheckpointError
from sta_adapter.internvideo.v2_config import LORA_TARGETS
from sta_adapter.internvideo.weights import Weights

__all__ = ["model_weights"]

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


def model_weights(weights: Weights, lora_scale: float | None) -> Iterator[tuple[str, Tensor]]:
    """Weights by our model's names; LoRA's product, where there is one, is merged with its scale.

    Raises:
        CheckpointError: LoRA is expected and missing for a layer, or the other way round.
    """
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
