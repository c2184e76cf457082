"""InternVideo2.5-Chat's configuration: as we save it, and made from the published one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import transformers
from transformers import LlamaConfig, PretrainedConfig

from sta_adapter.errors import CheckpointError
from sta_adapter.internvideo.v2_5_prompt import SYSTEM_MESSAGES

NEW_ROPE = int(transformers.__version__.split(".")[0]) >= 5
LANGUAGE = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act"),
    *("num_key_value_heads", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache"),
    *("pad_token_id", "bos_token_id", "eos_token_id"),
)
INTERNLM2 = {"vocab_size": 103168, "bias": True, "pad_token_id": 0, "rope_theta": 10000}
"""Defaults of InternLM2's configuration that differ from Llama's; the rest of `LANGUAGE` has the same ones."""
Config = TypeVar("Config", bound=PretrainedConfig)
VISION = {
    **{"num_channels": 3, "patch_size": 14, "image_size": 224, "hidden_size": 3200, "intermediate_size": 12800},
    **{"num_attention_heads": 25, "num_hidden_layers": 48, "qkv_bias": False, "qk_normalization": True},
    **{"hidden_act": "gelu", "norm_type": "rms_norm", "layer_norm_eps": 1e-6, "initializer_range": 0.02},
    **{"dropout": 0.0, "drop_path_rate": 0.0, "attention_dropout": 0.0, "initializer_factor": 0.1},
}
"""InternViT's settings, under their published names, and their defaults."""
CHAT = {
    "image_token_id": None,  # id of the token that stands for a visual one; None until a tokenizer has told it
    "local_num_frames": 4,  # rows (frames, or tiles of a picture) whose tokens are merged together
    "num_tome_tokens": 64,  # tokens that such a group is merged to
    "downsample_ratio": 0.5,  # by which rows and columns of patches become fewer before that
    "select_layer": -1,  # whose output of the encoder is taken
    "ps_version": "v2",  # in "v1" `downsample_ratio`'s step turns the picture over its diagonal
    "template": "internvl2_5",  # name of the conversation's form
    "min_dynamic_patch": 1,  # tiles that a picture is cut into at least
    "max_dynamic_patch": 6,  # and at most
    "use_thumbnail": True,  # whether a picture in several tiles comes whole as well
    "tie_word_embeddings": False,
}
"""The chat model's, and their defaults."""


class InternVisionConfig(PretrainedConfig):
    """InternViT's configuration: `VISION`."""

    model_type = "intern_vit"

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{**VISION, **settings})


class InternVideo2_5Config(PretrainedConfig):
    """InternViT, HiCo's token merging, and a Llama: `vision_config`, `text_config`, and `CHAT`."""

    model_type = "internvideo2_5_chat"
    sub_configs: ClassVar[dict[str, type[PretrainedConfig]]] = {
        "vision_config": InternVisionConfig,
        "text_config": LlamaConfig,
    }

    def __init__(
        self,
        vision_config: InternVisionConfig | Mapping[str, object] | None = None,
        text_config: LlamaConfig | Mapping[str, object] | None = None,
        **settings: Any,
    ) -> None:
        self.vision_config = _made(InternVisionConfig, vision_config)
        self.text_config = _made(LlamaConfig, text_config)
        super().__init__(**{**CHAT, **settings})


def _made(kind: type[Config], given: Config | Mapping[str, Any] | None) -> Config:
    return given if isinstance(given, kind) else kind(**(given or {}))


def read_config(config: Mapping[str, object]) -> InternVideo2_5Config:
    """The configuration that a `config.json`, ours or a published one, describes."""
    if config.get("model_type") == InternVideo2_5Config.model_type:
        return InternVideo2_5Config.from_dict(dict(config))
    return from_published(config)


def from_published(config: Mapping[str, object]) -> InternVideo2_5Config:
    """The configuration for a published `config.json`; a CheckpointError for parts that the published one doesn't have."""
    vision, language = config.get("vision_config"), config.get("llm_config")
    if not isinstance(vision, Mapping) or not isinstance(language, Mapping):
        raise CheckpointError("config.json has no vision_config and llm_config; expected InternVideo2.5-Chat's own.")
    known = {
        "llm_config.architectures": ((language.get("architectures") or ["none"])[0], tuple(TEXT)),
        "template": (config.get("template"), tuple(SYSTEM_MESSAGES)),
        "vision_config.norm_type": (vision.get("norm_type", "rms_norm"), ("layer_norm", "rms_norm")),
        "ps_version": (config.get("ps_version", "v1"), ("v1", "v2")),
    }
    for name, (found, expected) in known.items():
        if found not in expected:
            raise CheckpointError(f"config.json has {name} {found!r}; expected {' or '.join(map(repr, expected))}.")
    names = ("downsample_ratio", "select_layer", "template", "min_dynamic_patch", "max_dynamic_patch")
    kept: dict[str, Any] = {name: config[name] for name in names if name in config}
    size = config.get("force_image_size") or vision.get("image_size", 224)
    return InternVideo2_5Config(
        vision_config={**{name: vision[name] for name in VISION if name in vision}, "image_size": size},
        text_config=TEXT[known["llm_config.architectures"][0]](language),
        ps_version=str(config.get("ps_version", "v1")),
        use_thumbnail=bool(config.get("use_thumbnail", False)),
        architectures=["InternVideo2_5ForConditionalGeneration"],
        **kept,
    )


def _internlm2(language: Mapping[str, Any]) -> LlamaConfig:
    """InternLM2's settings as a Llama's: the same layers, with one projection in the place of three."""
    found = {**INTERNLM2, **language}
    theta, scaling = float(found["rope_theta"]), found.get("rope_scaling")
    kind = {} if scaling is None else {"rope_type": scaling["type"], "factor": float(scaling["factor"])}
    rope = (
        {"rope_parameters": {"rope_theta": theta, "rope_type": "default", **kind}}
        if NEW_ROPE
        else {"rope_theta": theta, "rope_scaling": kind or None}
    )
    settings = {name: found[name] for name in LANGUAGE if name in found}
    return LlamaConfig(**settings, **rope, attention_bias=bool(found["bias"]), tie_word_embeddings=False)


def _llama(language: Mapping[str, Any]) -> LlamaConfig:
    return LlamaConfig(**{name: value for name, value in language.items() if not name.startswith("_")})


TEXT = {"InternLM2ForCausalLM": _internlm2, "LlamaForCausalLM": _llama}
