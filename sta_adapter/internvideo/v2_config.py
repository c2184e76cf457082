"""Configuration of InternVideo2-Chat, made from the published one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import InstructBlipQFormerConfig, MistralConfig, PretrainedConfig

from sta_adapter.errors import CheckpointError
from sta_adapter.internvideo.v2_encoder import EncoderConfig
from sta_adapter.internvideo.weights import read_json

MODEL_TYPE = "internvideo2_chat"

MISTRAL = {
    **{"vocab_size": 32768, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    **{"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5},
    **{"rope_theta": 1e6, "sliding_window": None, "bos_token_id": 1, "eos_token_id": 2},
}
"""Mistral-7B-Instruct-v0.3, which the published configuration names as `pretrained_llm_path`."""

BERT = {
    **{"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "vocab_size": 30523,  # that of bert-base-uncased and one token more
}
"""bert-base, whose sizes the published Q-Former takes."""
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")


class InternVideo2ChatConfig(PretrainedConfig):
    """Sizes of the chat model.

    Args:
        vision_config: fields of `EncoderConfig`.
        qformer_config: of the Q-Former, as transformers' InstructBLIP has it.
        text_config: of Mistral.
        num_query_token: queries of the Q-Former's pretraining.
        extra_num_query_token: queries added in the chat model's training; as many tokens as both are a clip's.
        image_token_id: stands for each of a picture's tokens in `input_ids`; never looked up among the embeddings.
        video_token_id: likewise, a clip's.
        lora_scale: by how much LoRA weights that the checkpoint holds beside the language model's are scaled when they
            are merged; None when it holds none.
    """

    model_type = MODEL_TYPE

    def __init__(
        self,
        vision_config: Mapping[str, object] | None = None,
        qformer_config: Mapping[str, object] | None = None,
        text_config: Mapping[str, object] | MistralConfig | None = None,
        num_query_token: int = 32,
        extra_num_query_token: int = 64,
        image_token_id: int | None = None,
        video_token_id: int | None = None,
        lora_scale: float | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(text_config, MistralConfig):
            text_config = MistralConfig(**_without_type(text_config or MISTRAL))
        self.text_config = text_config
        self.vision_config: dict[str, Any] = dict(vision_config or dataclasses.asdict(EncoderConfig()))
        self.qformer_config: dict[str, object] = dict(qformer_config or BERT)
        self.num_query_token = num_query_token
        self.extra_num_query_token = extra_num_query_token
        vocabulary = text_config.vocab_size
        self.image_token_id = vocabulary if image_token_id is None else image_token_id
        self.video_token_id = vocabulary + 1 if video_token_id is None else video_token_id
        self.lora_scale = lora_scale
        super().__init__(**{"tie_word_embeddings": False, **kwargs})

    @property
    def num_visual_tokens(self) -> int:
        """Tokens of a clip or picture, whatever its frames."""
        return self.num_query_token + self.extra_num_query_token

    def encoder(self) -> EncoderConfig:
        """The video encoder's."""
        return EncoderConfig(**self.vision_config)

    def qformer(self) -> InstructBlipQFormerConfig:
        """The Q-Former's."""
        fixed = {"encoder_hidden_size": self.vision_config["embed_dim"], "cross_attention_frequency": 2}
        return InstructBlipQFormerConfig(**{**self.qformer_config, **fixed})


def read_config(config: Mapping[str, object], folder: Path | None = None) -> InternVideo2ChatConfig:
    """The configuration that a `config.json`, ours or a published one, describes.

    In `folder`, where it lies, a language model's `config.json` is looked for when `pretrained_llm_path` names a folder.

    Raises:
        CheckpointError: it isn't InternVideo2-Chat's, or of a variant that isn't known.
    """
    if config.get("model_type") == MODEL_TYPE:
        return InternVideo2ChatConfig(**_without_type(config))
    settings = config.get("model_config")
    parts = ("vision_encoder", "bridge", "llm")
    if not isinstance(settings, Mapping) or not all(isinstance(settings.get(part), Mapping) for part in parts):
        raise CheckpointError(
            f"config.json is no InternVideo2-Chat's; expected 'model_config' with {', '.join(parts)}. Download it again."
        )
    vision, bridge, llm = (settings[part] for part in parts)
    if not vision.get("vit_add_ln", True) or bridge.get("name") != "qformer":
        raise CheckpointError(
            f"the bridge is {bridge.get('name')!r} with vit_add_ln {vision.get('vit_add_ln')!r}; expected 'qformer' behind a layer "
            "norm, as InternVideo2-Chat-8B and its HD variant have it."
        )
    text = _language_model(llm, folder)
    qformer: dict[str, object] = {**BERT, **bridge.get("qformer_config", {})}
    for rate in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        qformer[rate] = bridge.get(f"qformer_{rate}", 0.1)
    return InternVideo2ChatConfig(
        vision_config=dataclasses.asdict(EncoderConfig.of_published(vision)),
        qformer_config=qformer,
        text_config=text,
        num_query_token=bridge.get("num_query_token", 32),
        extra_num_query_token=bridge.get("extra_num_query_token", 64),
        lora_scale=llm["lora_alpha"] / llm["lora_r"] if llm.get("use_lora") else None,
    )


def _language_model(llm: Mapping[str, object], folder: Path | None) -> dict[str, object]:
    if llm.get("name") != "mistral_7b":
        raise CheckpointError(
            f"the language model is {llm.get('name')!r}; expected 'mistral_7b', as InternVideo2-Chat-8B and its HD variant have it."
        )
    named = llm.get("pretrained_llm_path")
    if named:  # else the folder itself would be meant, whose config.json is the chat model's
        for place in (*([folder / str(named)] if folder else []), Path(str(named))):
            if (place / "config.json").is_file():
                return read_json(place / "config.json")
    return dict(MISTRAL)


def _without_type(config: Mapping[str, object]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "model_type"}
