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


class InternVisionConfig(PretrainedConfig):
    """InternViT's settings, under their published names."""

    model_type = "intern_vit"

    def __init__(
        self,
        num_channels: int = 3,
        patch_size: int = 14,
        image_size: int = 224,
        qkv_bias: bool = False,
        hidden_size: int = 3200,
        num_attention_heads: int = 25,
        intermediate_size: int = 12800,
        qk_normalization: bool = True,
        num_hidden_layers: int = 48,
        hidden_act: str = "gelu",
        norm_type: str = "rms_norm",
        layer_norm_eps: float = 1e-6,
        dropout: float = 0.0,
        drop_path_rate: float = 0.0,
        attention_dropout: float = 0.0,
        initializer_range: float = 0.02,
        initializer_factor: float = 0.1,
        **more: Any,
    ) -> None:
        self.num_channels = num_channels
        self.patch_size = patch_size
        self.image_size = image_size
        self.qkv_bias = qkv_bias
        self.hidden_size = hidden_size
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.qk_normalization = qk_normalization
        self.num_hidden_layers = num_hidden_layers
        self.hidden_act = hidden_act
        self.norm_type = norm_type
        self.layer_norm_eps = layer_norm_eps
        self.dropout = dropout
        self.drop_path_rate = drop_path_rate
        self.attention_dropout = attention_dropout
        self.initializer_range = initializer_range
        self.initializer_factor = initializer_factor
        super().__init__(**more)


class InternVideo2_5Config(PretrainedConfig):
    """InternViT, HiCo's token merging, and a Llama.

    Attributes:
        vision_config: of the encoder.
        text_config: of the language model.
        image_token_id: id of the token that stands for a visual one; None until a tokenizer has told it.
        local_num_frames: rows (frames, or tiles of a picture) whose tokens are merged together.
        num_tome_tokens: tokens that such a group is merged to.
        downsample_ratio: by which rows and columns of patches become fewer before that.
        select_layer: whose output of the encoder is taken.
        ps_version: "v2"; in "v1" that step turns the picture over its diagonal.
        template: name of the conversation's form.
        min_dynamic_patch: tiles that a picture is cut into at least.
        max_dynamic_patch: and at most.
        use_thumbnail: whether a picture in several tiles comes whole as well.
    """

    model_type = "internvideo2_5_chat"
    sub_configs: ClassVar[dict[str, type[PretrainedConfig]]] = {
        "vision_config": InternVisionConfig,
        "text_config": LlamaConfig,
    }

    def __init__(
        self,
        vision_config: InternVisionConfig | Mapping[str, object] | None = None,
        text_config: LlamaConfig | Mapping[str, object] | None = None,
        image_token_id: int | None = None,
        local_num_frames: int = 4,
        num_tome_tokens: int = 64,
        downsample_ratio: float = 0.5,
        select_layer: int = -1,
        ps_version: str = "v2",
        template: str = "internvl2_5",
        min_dynamic_patch: int = 1,
        max_dynamic_patch: int = 6,
        use_thumbnail: bool = True,
        **more: Any,
    ) -> None:
        self.vision_config = _made(InternVisionConfig, vision_config)
        self.text_config = _made(LlamaConfig, text_config)
        self.image_token_id = image_token_id
        self.local_num_frames = local_num_frames
        self.num_tome_tokens = num_tome_tokens
        self.downsample_ratio = downsample_ratio
        self.select_layer = select_layer
        self.ps_version = ps_version
        self.template = template
        self.min_dynamic_patch = min_dynamic_patch
        self.max_dynamic_patch = max_dynamic_patch
        self.use_thumbnail = use_thumbnail
        more.setdefault("tie_word_embeddings", False)
        super().__init__(**more)


def _made(kind: type[Config], given: Config | Mapping[str, Any] | None) -> Config:
    return given if isinstance(given, kind) else kind(**(given or {}))


def from_published(config: Mapping[str, object]) -> InternVideo2_5Config:
    """The configuration for the contents of a published `config.json`.

    Raises:
        CheckpointError: it describes another vision encoder, language model or conversation than the published one.
    """
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
        vision_config={**_plain(vision), "image_size": size},
        text_config=TEXT[known["llm_config.architectures"][0]](language),
        ps_version=str(config.get("ps_version", "v1")),
        use_thumbnail=bool(config.get("use_thumbnail", False)),
        architectures=["InternVideo2_5ForConditionalGeneration"],
        **kept,
    )


def _plain(config: Mapping[str, object]) -> dict[str, object]:
    """A part's own settings, without what transformers writes into every configuration."""
    names = InternVisionConfig.__init__.__code__.co_varnames
    return {name: value for name, value in config.items() if name in names and name not in ("self", "more")}


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
