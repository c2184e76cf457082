"""Tiny random models of transformers' families with their processors, as `load_model` and `load_processor` take them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from cases_transformers import (
    GLM5,
    GLM_MOE,
    GLM_VISION,
    LINEAR,
    MOE,
    MROPE,
    QWEN2_5_VISION,
    QWEN3_5_VISION,
    QWEN3_VISION,
    QWEN4,
    ROW_VISION,
    TEXT,
)
from qwen2_vl_prompts import transformers_version
from tiny_qwen import CHATML, make_tokenizer

GRID = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
SMALL = {"min_pixels": 64, "max_pixels": 4096}
EDGES = {"size": {"shortest_edge": 64, "longest_edge": 4096 * 64}}
SQUARE = {"height": 16, "width": 16}
WORDS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "start_image_token": "<|vision_start|>",
    "end_image_token": "<|vision_end|>",
    "context_image_token": "<|image_pad|>",
}
EARLY_WORDS = "model_specific_special_tokens"  # what transformers 5.0 and 5.1 call them
GLM_WORDS = ["<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"]
BARE = CHATML.replace("'<|vision_start|><|' + part['type'] + '_pad|><|vision_end|>'", "'<|' + part['type'] + '_pad|>'")
GLM_TEMPLATE = CHATML.replace("'<|vision_start|><|'", "'<|begin_of_' + part['type'] + '|><|'").replace(
    "'_pad|><|vision_end|>'", "'_pad|><|end_of_' + part['type'] + '|>'"
)


class Family(NamedTuple):
    """Names of the classes of one family, the settings of its processor and of its model."""

    model: str
    config: str
    processor: str
    image_processor: str
    video_processor: str
    image_settings: dict[str, Any]
    video_settings: dict[str, Any]
    settings: dict[str, Any]
    template: str = CHATML
    processor_settings: dict[str, Any] | None = None


def _text(**more: Any) -> dict[str, Any]:
    return {**TEXT, **more}


_ROPE = _text(**MROPE)
_GLM_ROPE = {**MROPE["rope_scaling"], "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}
FAMILIES = {
    "qwen2_5_vl": Family(
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        "Qwen2_5_VLProcessor",
        "Qwen2VLImageProcessor",
        "Qwen2VLVideoProcessor",
        {**GRID, **SMALL},
        {**GRID, **SMALL},
        {"text_config": _ROPE, "vision_config": QWEN2_5_VISION},
    ),
    "qwen3_vl": Family(
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLConfig",
        "Qwen3VLProcessor",
        "Qwen2VLImageProcessor",
        "Qwen3VLVideoProcessor",
        {**GRID, **SMALL},
        {**GRID, **EDGES},
        {"text_config": _ROPE, "vision_config": QWEN3_VISION},
    ),
    "qwen3_vl_moe": Family(
        "Qwen3VLMoeForConditionalGeneration",
        "Qwen3VLMoeConfig",
        "Qwen3VLProcessor",
        "Qwen2VLImageProcessor",
        "Qwen3VLVideoProcessor",
        {**GRID, **SMALL},
        {**GRID, **EDGES},
        {"text_config": _text(**MROPE, **MOE), "vision_config": QWEN3_VISION},
    ),
    "qwen3_5": Family(
        "Qwen3_5ForConditionalGeneration",
        "Qwen3_5Config",
        "Qwen3VLProcessor",
        "Qwen2VLImageProcessor",
        "Qwen3VLVideoProcessor",
        {**GRID, **SMALL},
        {**GRID, **EDGES},
        {"text_config": _text(**LINEAR), "vision_config": QWEN3_5_VISION},
    ),
    "qwen4_exp": Family(
        "Qwen4ExpForConditionalGeneration",
        "Qwen4ExpConfig",
        "Qwen3VLProcessor",
        "Qwen2VLImageProcessor",
        "Qwen3VLVideoProcessor",
        {**GRID, **SMALL},
        {**GRID, **EDGES},
        {"text_config": _text(**QWEN4), "vision_config": QWEN3_5_VISION},
    ),
    "exaone4_5": Family(
        "Exaone4_5_ForConditionalGeneration",
        "Exaone4_5_Config",
        "Exaone4_5_Processor",
        "Qwen2VLImageProcessor",
        "Qwen2VLVideoProcessor",
        {**GRID, **SMALL},
        {**GRID, **SMALL},
        {"text_config": _text(model_type="exaone4"), "vision_config": {**QWEN2_5_VISION, "num_key_value_heads": 2}},
    ),
    "glm46v": Family(
        "Glm46VForConditionalGeneration",
        "Glm46VConfig",
        "Glm46VProcessor",
        "Glm46VImageProcessor",
        "Glm46VVideoProcessor",
        {**GRID, **EDGES},
        {**GRID, **EDGES},
        {
            "text_config": _text(model_type="glm4v_text", **MROPE),
            "vision_config": {**GLM_VISION, "model_type": "glm4v_vision"},
        },
        template=GLM_TEMPLATE,
    ),
    "glm5_next": Family(
        "Glm5NextForConditionalGeneration",
        "Glm5NextConfig",
        "Glm5NextProcessor",
        "Glm5NextImageProcessor",
        "Glm5NextVideoProcessor",
        {**GRID, **EDGES},
        {**GRID, **EDGES},
        {"text_config": _text(**GLM5), "vision_config": {**GLM_VISION, "projection_intermediate_size": 48}},
        template=GLM_TEMPLATE,
    ),
    "glm4v": Family(
        "Glm4vForConditionalGeneration",
        "Glm4vConfig",
        "Glm4vProcessor",
        "Glm4vImageProcessor",
        "Glm4vVideoProcessor",
        {**GRID, **EDGES},
        {**GRID, **EDGES},
        {"text_config": _ROPE, "vision_config": GLM_VISION},
        template=GLM_TEMPLATE,
    ),
    "glm4v_moe": Family(
        "Glm4vMoeForConditionalGeneration",
        "Glm4vMoeConfig",
        "Glm4vProcessor",
        "Glm4vImageProcessor",
        "Glm4vVideoProcessor",
        {**GRID, **EDGES},
        {**GRID, **EDGES},
        {
            "text_config": _text(**GLM_MOE, rope_scaling=_GLM_ROPE, partial_rotary_factor=0.5),
            "vision_config": GLM_VISION,
        },
        template=GLM_TEMPLATE,
    ),
    "video_llama_3": Family(
        "VideoLlama3ForConditionalGeneration",
        "VideoLlama3Config",
        "VideoLlama3Processor",
        "VideoLlama3ImageProcessor",
        "VideoLlama3VideoProcessor",
        {**SMALL, "patch_size": 4, "temporal_patch_size": 1, "merge_size": 1},
        {**SMALL, "patch_size": 4, "temporal_patch_size": 1, "merge_size": 2},
        {
            "text_config": _text(model_type="qwen2"),
            "vision_config": {**ROW_VISION, "model_type": "video_llama_3_vision"},
        },
        template=BARE,
    ),
    "internvl": Family(
        "InternVLForConditionalGeneration",
        "InternVLConfig",
        "InternVLProcessor",
        "GotOcr2ImageProcessor",
        "InternVLVideoProcessor",
        {"size": SQUARE, "max_patches": 4},
        {"size": SQUARE},
        {
            "text_config": _text(model_type="qwen2"),
            "vision_config": {**ROW_VISION, "image_size": [16, 16], "patch_size": [4, 4]},
            "downsample_ratio": 0.5,
        },
        template=BARE,
        processor_settings={"image_seq_length": 4},
    ),
    "llava_onevision": Family(
        "LlavaOnevisionForConditionalGeneration",
        "LlavaOnevisionConfig",
        "LlavaOnevisionProcessor",
        "LlavaOnevisionImageProcessor",
        "LlavaOnevisionVideoProcessor",
        {"size": SQUARE, "image_grid_pinpoints": [[16, 16], [16, 32], [32, 16], [32, 32]]},
        {"size": SQUARE},
        {
            "text_config": _text(model_type="qwen2"),
            "vision_config": {**ROW_VISION, "model_type": "siglip_vision_model", "vision_use_head": False},
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "image_grid_pinpoints": [[16, 16], [16, 32], [32, 16], [32, 32]],
        },
        template=BARE,
        processor_settings={
            "num_image_tokens": 16,
            "vision_feature_select_strategy": "full",
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
        },
    ),
}


def available(name: str) -> bool:
    """Whether this release of transformers has the family, with what reads its clips."""
    family = FAMILIES[name]
    parts = [family.model, family.processor, family.video_processor]
    if name == "qwen2_5_vl" and transformers_version() < (4, 52):
        parts.remove(family.video_processor)  # its image processor read clips as well
    return all(hasattr(transformers, part) for part in parts)


def takes_clips(name: str) -> bool:
    """Whether clips go through the family's processor; those of earlier releases are refused."""
    first = {"qwen2_5_vl": (4, 49), "glm4v": (4, 57), "glm4v_moe": (4, 57)}.get(name, (4, 52))
    return available(name) and transformers_version() >= first


def model_takes_clips(name: str) -> bool:
    """Whether the family's model does as well: Qwen3-VL's of transformers 5.3 ends at any clip in a StopIteration."""
    return takes_clips(name) and not (name.startswith("qwen3_vl") and transformers_version() == (5, 3))


def make_processor(name: str, folder: Path) -> Any:
    """The family's processor, with a tokenizer of letters; `folder` is for the tokenizer's files."""
    family = FAMILIES[name]
    tokenizer = make_tokenizer(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [*tokenizer.all_special_tokens, *GLM_WORDS]})
    tokenizer.save_pretrained(folder)
    early = (5,) <= transformers_version() < (5, 2)
    tokenizer = type(tokenizer).from_pretrained(folder, **{EARLY_WORDS if early else "extra_special_tokens": WORDS})
    parts = {"image_processor": getattr(transformers, family.image_processor)(**family.image_settings)}
    if hasattr(transformers, family.video_processor):
        parts["video_processor"] = getattr(transformers, family.video_processor)(**family.video_settings)
    return getattr(transformers, family.processor)(
        tokenizer=tokenizer, chat_template=family.template, **parts, **(family.processor_settings or {})
    )


def make_model(name: str, tokenizer: Any, seed: int = 0) -> Any:
    """The family's model for that tokenizer."""
    family = FAMILIES[name]
    ids = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
        "image_token_index": "<|image_pad|>",
        "video_token_index": "<|video_pad|>",
        "image_start_token_id": "<|begin_of_image|>",
        "image_end_token_id": "<|end_of_image|>",
        "video_start_token_id": "<|begin_of_video|>",
        "video_end_token_id": "<|end_of_video|>",
    }
    settings = copy.deepcopy(family.settings)
    end, pad = (tokenizer.convert_tokens_to_ids(word) for word in ("<|im_end|>", "<|endoftext|>"))
    settings["text_config"].update(vocab_size=len(tokenizer), bos_token_id=pad, eos_token_id=end, pad_token_id=pad)
    if name == "qwen2_5_vl" and transformers_version() < (4, 56):
        settings.update(settings.pop("text_config"))  # flat, as published: 4.49 to 4.51 know no other, and later losses
    config = getattr(transformers, family.config)(
        **settings, **{name: tokenizer.convert_tokens_to_ids(word) for name, word in ids.items()}
    )
    torch.manual_seed(seed)
    model = getattr(transformers, family.model)(config).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = end, pad
    return model


def save_base(name: str, folder: Path) -> Path:
    """Model and processor in a folder."""
    processor = make_processor(name, folder / "words")
    make_model(name, processor.tokenizer).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
