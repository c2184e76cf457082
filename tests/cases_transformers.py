"""Tiny models of the real classes in transformers, beyond Qwen2-VL; those that a release lacks are skipped."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from cases import Arguments, Case, Clip, grid_of, merged_tokens, qwen2_vl_arguments, token_types
from qwen2_vl_prompts import transformers_version
from torch import Tensor, nn

SIDE = 4  # rows and columns of patches of a frame that has no grid of its own
FRAME = (3, 4 * SIDE, 4 * SIDE)
TEXT = {
    "vocab_size": 160,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
MROPE = {"rope_scaling": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}}
IDS = {"image_token_id": 150, "video_token_id": 151, "vision_start_token_id": 152, "vision_end_token_id": 153}
GRID_VISION = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "in_channels": 3,
    "out_hidden_size": 32,
}
QWEN2_5_VISION = {**GRID_VISION, "window_size": 24, "fullatt_block_indexes": [1], "tokens_per_second": 2}
QWEN3_VISION = {**GRID_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
GLM_VISION = {**GRID_VISION, "image_size": 16}
ROW_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_channels": 3,
    "image_size": 4 * SIDE,
    "patch_size": 4,
}
MOE = {
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [0],
}
LINEAR = {  # a layer of linear attention, then one of attention
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "rope_parameters": {
        "rope_type": "default",
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
    },
}
QWEN3_5_VISION = {key: value for key, value in QWEN3_VISION.items() if key != "deepstack_visual_indexes"}
QWEN4 = {
    **LINEAR,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "hc_lowrank": 8,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 64,
    "indexer_compress_ratio": 2,
}
GLM_MOE = {
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
GLM5 = {
    **{key: value for key, value in GLM_MOE.items() if key != "first_k_dense_replace"},
    "num_key_value_heads": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "mlp_layer_types": ["dense", "sparse"],
    "linear_head_dim": 8,
    "linear_num_heads": 2,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "v_head_dim": 16,
    "qk_nope_head_dim": 16,
    "index_topk": 64,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "index_kpool": 2,
    "hc_mult": 2,
}


def transformers_class(name: str) -> Any:
    """A public class of transformers, or of its model's file when it is not public."""
    import transformers

    if "." not in name:
        return getattr(transformers, name)
    package, name = name.rsplit(".", 1)
    return getattr(importlib.import_module(f"transformers.models.{package}"), name)


def tower(name: str, config: str, **settings: Any) -> Any:
    """A function that makes a bare tower."""
    return lambda: transformers_class(name)._from_config(transformers_class(config)(**settings))


def full(name: str, config: str, **settings: Any) -> Any:
    """A function that makes a full model; its configurations are copied, as some releases change what they get."""
    return lambda: transformers_class(name)(transformers_class(config)(**copy.deepcopy(settings)))


def frame_rows(clips: Sequence[Clip]) -> Arguments:
    """Frames of all clips as one batch of pictures."""
    return {"pixel_values": torch.cat([clip.pixels(*FRAME) for clip in clips])}


def padded_rows(clips: Sequence[Clip]) -> Arguments:
    """Frames as rows of patches, two of which are padding."""
    frames = sum(clip.frames for clip in clips)
    mask = torch.ones(frames, 18, dtype=torch.long)
    mask[:, 16:] = 0
    pixels = torch.cat([clip.pixels(18, 48) for clip in clips])
    siglip2 = importlib.import_module("transformers.models.siglip2.modeling_siglip2")
    name = "attention_mask" if hasattr(siglip2, "Siglip2VisionTransformer") else "pixel_attention_mask"
    return {"pixel_values": pixels, name: mask, "spatial_shapes": torch.tensor([[4, 4]] * frames)}


def row_tokens(prefix: int) -> Any:
    """A function that takes rows (F, prefix + N, C) apart, clip by clip; padding is left out."""

    def features(output: Any, clips: Sequence[Clip]) -> list[Tensor]:
        tokens = output if isinstance(output, Tensor) else output.last_hidden_state
        tokens = tokens[:, prefix : prefix + SIDE * SIDE]
        return list(tokens.split([clip.frames for clip in clips]))

    return features


def frame_grids(clips: Sequence[Clip]) -> Arguments:
    """Packed patches, each frame with a grid of its own."""
    arguments = qwen2_vl_arguments(clips)
    rows = [[1, h, w] for t, h, w in map(grid_of, clips) for _ in range(t)]
    return {**arguments, "grid_thw": torch.tensor(rows)}


def deepstack_tokens(output: Any, clips: Sequence[Clip]) -> list[Tensor]:
    """Merged tokens with the deepstack features beside them."""
    merged, deep = output if isinstance(output, tuple) else (output.pooler_output, output.deepstack_features)
    return merged_tokens(torch.cat([merged, *deep], dim=-1), clips)


def video_llama_arguments(clips: Sequence[Clip]) -> Arguments:
    """Packed patches of one temporal step, their grid and how many are merged."""
    parts = [clip.pixels(h * w, 48).flatten(0, 1) for clip in clips for _, h, w in [grid_of(clip)]]
    grid = torch.tensor([grid_of(clip) for clip in clips])
    return {"pixel_values": torch.cat(parts), "grid_thw": grid, "merge_sizes": torch.tensor([2] * len(clips))}


def video_llama_tokens(output: Any, clips: Sequence[Clip]) -> list[Tensor]:
    """The merged tokens."""
    return merged_tokens(output.last_hidden_state, clips)


def prompt(tokens: list[int], pixels: Tensor, name: str = "pixel_values_videos", **more: Any) -> Arguments:
    """Text with placeholders, and what stands for them."""
    ids = torch.tensor([tokens])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), name: pixels, **more}


def grid_prompt(frames: int, *, apart: bool = False) -> Arguments:
    """One clip of 4x4 patches; `apart`: each frame between its own marks, as Qwen3-VL wants it."""
    clip = [152, *[151] * 4, 153] * frames if apart else [152, *[151] * 4 * frames, 153]
    tokens = [*clip, 5, 6]
    pixels = Clip(frames).pixels(16, 96).flatten(0, 1)
    more = token_types(tokens, video=151, image=150)
    return prompt(tokens, pixels, video_grid_thw=torch.tensor([[frames, 4, 4]]), **more)


def qwen3_prompt(frames: int) -> Arguments:
    """One clip, frame by frame."""
    return grid_prompt(frames, apart=True)


def exaone_prompt(frames: int) -> Arguments:
    """One clip in a text of which each token stands behind the last: no kinds of tokens are asked for."""
    return {name: value for name, value in grid_prompt(frames).items() if name != "mm_token_type_ids"}


def glm_prompt(frames: int, **more: Any) -> Arguments:
    """One clip between video marks; its placeholders are those of pictures."""
    tokens = [154, *[152, *[150] * 4, 153] * frames, 155, 5, 6]
    types = token_types([151 if t == 150 else t for t in tokens], video=151, image=150)
    pixels = Clip(frames).pixels(16, 96).flatten(0, 1)
    return prompt(tokens, pixels, video_grid_thw=torch.tensor([[frames, 4, 4]]), **types)


def video_llama_prompt(frames: int) -> Arguments:
    """One clip of 4x4 patches, merged two by two."""
    pixels = Clip(frames).pixels(16, 48).flatten(0, 1)
    more = {"video_grid_thw": torch.tensor([[frames, 4, 4]]), "video_merge_sizes": torch.tensor([2])}
    return prompt([5, *[151] * 4 * frames, 5, 6], pixels, **more)


def llava_prompt(frames: int) -> Arguments:
    """One clip: four tokens a frame after pooling, and a newline."""
    return prompt([5, *[151] * (4 * frames + 1), 5, 6], Clip(frames).pixels(*FRAME)[None])


def llava_video_prompt(frames: int) -> Arguments:
    """One video and the text, as LLaVA-NeXT's code takes them."""
    return {"inputs": torch.tensor([[5, 6]]), "images": [Clip(frames).pixels(*FRAME)], "modalities": ["video"]}


def picture_prompt(rows: int) -> Arguments:
    """So many pictures, or frames: the model can't know."""
    return prompt([5, *[150] * 4 * rows, 5, 6], Clip(rows).pixels(*FRAME), "pixel_values")


def llava_settings() -> dict[str, Any]:
    """Settings of a tiny LLaVA-OneVision, by all names that the tested releases have for them."""
    text = {**TEXT, "model_type": "qwen2"}
    vision = {**ROW_VISION, "model_type": "siglip_vision_model", "vision_use_head": False}
    ids = {"image_token_id": 150, "video_token_id": 151, "image_token_index": 150, "video_token_index": 151}
    rest = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    return {"text_config": text, "vision_config": vision, **ids, **rest, "image_grid_pinpoints": [[16, 16], [16, 32]]}


def internvl_settings() -> dict[str, Any]:
    """Settings of a tiny InternVL."""
    vision = {**ROW_VISION, "image_size": [16, 16], "patch_size": [4, 4], "layer_scale_init_value": 0.5}
    text = {**TEXT, "model_type": "qwen2"}
    return {"text_config": text, "vision_config": vision, "image_token_id": 150, "downsample_ratio": 0.5}


GLM_IDS = {
    **IDS,
    "video_token_id": 151,
    "image_start_token_id": 152,
    "image_end_token_id": 153,
    "video_start_token_id": 154,
    "video_end_token_id": 155,
}


def make_llava_video() -> nn.Module:
    """The stand-in for LLaVA-NeXT's own code, which is no package."""
    from standins.llava_next import LlavaQwenForCausalLM

    config = transformers_class("SiglipVisionConfig")(**ROW_VISION)
    config._attn_implementation = "sdpa"
    return LlavaQwenForCausalLM(config)


def _grid_case(id: str, backbone: str, make: Any, needs: str, features: Any = merged_tokens, **more: Any) -> Case:
    return Case(id, backbone, make, qwen2_vl_arguments, features, needs=needs, **more)


def _glm_case(id: str, make: Any, needs: str, **more: Any) -> Case:
    return Case(id, "glm4v", make, frame_grids, merged_tokens, needs=needs, tell_clips=True, **more)


def _row_case(id: str, backbone: str, make: Any, prefix: int, needs: str = "", **more: Any) -> Case:
    features = row_tokens(prefix)
    return Case(id, backbone, make, frame_rows, features, needs=needs, tell_clips=True, **more)


def _qwen_text(**more: Any) -> dict[str, Any]:
    return {**TEXT, **MROPE, **more}


def _glm_moe_text() -> dict[str, Any]:
    """Half of each head is rotated."""
    rope = {**MROPE["rope_scaling"], "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}
    return {**TEXT, **GLM_MOE, "rope_scaling": rope, "partial_rotary_factor": 0.5}


CASES = [
    _grid_case(
        "qwen2_5_vl-tower",
        "qwen2_5_vl",
        tower(
            "qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel",
            "qwen2_5_vl.configuration_qwen2_5_vl.Qwen2_5_VLVisionConfig",
            **QWEN2_5_VISION,
        ),
        "qwen2_5_vl",
    ),
    _grid_case(
        "qwen2_5_vl",
        "qwen2_5_vl",
        full(
            "Qwen2_5_VLForConditionalGeneration",
            "Qwen2_5_VLConfig",
            **(_qwen_text() if transformers_version() < (4, 52) else {"text_config": _qwen_text()}),
            vision_config=QWEN2_5_VISION,
            **IDS,
        ),
        "qwen2_5_vl",
        generate=grid_prompt,
    ),
    _grid_case(
        "qwen3_vl-tower",
        "qwen3_vl",
        tower("Qwen3VLVisionModel", "qwen3_vl.configuration_qwen3_vl.Qwen3VLVisionConfig", **QWEN3_VISION),
        "qwen3_vl",
        deepstack_tokens,
    ),
    _grid_case(
        "qwen3_vl",
        "qwen3_vl",
        full(
            "Qwen3VLForConditionalGeneration",
            "Qwen3VLConfig",
            text_config=_qwen_text(),
            vision_config=QWEN3_VISION,
            **IDS,
        ),
        "qwen3_vl",
        deepstack_tokens,
        generate=qwen3_prompt,
    ),
    _grid_case(
        "qwen3_vl_moe",
        "qwen3_vl",
        full(
            "Qwen3VLMoeForConditionalGeneration",
            "Qwen3VLMoeConfig",
            text_config=_qwen_text(**MOE),
            vision_config=QWEN3_VISION,
            **IDS,
        ),
        "qwen3_vl_moe",
        deepstack_tokens,
        generate=qwen3_prompt,
    ),
    _grid_case(
        "qwen3_5-tower",
        "qwen3_vl",
        tower(
            "Qwen3_5VisionModel",
            "qwen3_5.configuration_qwen3_5.Qwen3_5VisionConfig",
            **QWEN3_5_VISION,
        ),
        "qwen3_5",
    ),
    _grid_case(
        "qwen3_5_moe-tower",
        "qwen3_vl",
        tower(
            "Qwen3_5MoeVisionModel",
            "qwen3_5_moe.configuration_qwen3_5_moe.Qwen3_5MoeVisionConfig",
            **QWEN3_5_VISION,
        ),
        "qwen3_5_moe",
    ),
    _grid_case(
        "qwen3_5",
        "qwen3_vl",
        full(
            "Qwen3_5ForConditionalGeneration",
            "Qwen3_5Config",
            text_config={**TEXT, **LINEAR},
            vision_config=QWEN3_5_VISION,
            **IDS,
        ),
        "qwen3_5",
        generate=qwen3_prompt,
    ),
    _grid_case(
        "qwen4_exp",
        "qwen3_vl",
        full(
            "Qwen4ExpForConditionalGeneration",
            "Qwen4ExpConfig",
            text_config={**TEXT, **QWEN4},
            vision_config=QWEN3_5_VISION,
            **IDS,
        ),
        "qwen4_exp",
        generate=qwen3_prompt,
    ),
    _grid_case(
        "cosmos3_omni",
        "qwen3_vl",
        full(
            "Cosmos3OmniForConditionalGeneration",
            "Cosmos3OmniConfig",
            text_config={**TEXT, **MROPE, "model_type": "qwen3_vl_text"},
            vision_config={**QWEN3_VISION, "model_type": "qwen3_vl_vision"},
            **IDS,
        ),
        "cosmos3_omni",
        deepstack_tokens,
        generate=qwen3_prompt,
    ),
    _grid_case(
        "exaone4_5",
        "qwen2_5_vl",
        full(
            "Exaone4_5_ForConditionalGeneration",
            "Exaone4_5_Config",
            text_config={**TEXT, "model_type": "exaone4"},
            vision_config={**QWEN2_5_VISION, "num_key_value_heads": 2},
            **IDS,
        ),
        "exaone4_5",
        generate=exaone_prompt,
    ),
    _grid_case(
        "qwen2_5_omni-tower",
        "qwen2_5_vl",
        tower(
            "qwen2_5_omni.modeling_qwen2_5_omni.Qwen2_5OmniVisionEncoder",
            "qwen2_5_omni.configuration_qwen2_5_omni.Qwen2_5OmniVisionEncoderConfig",
            **QWEN2_5_VISION,
        ),
        "qwen2_5_omni",
    ),
    _grid_case(
        "qwen3_omni-tower",
        "qwen3_vl",
        tower(
            "qwen3_omni_moe.modeling_qwen3_omni_moe.Qwen3OmniMoeVisionEncoder",
            "qwen3_omni_moe.configuration_qwen3_omni_moe.Qwen3OmniMoeVisionEncoderConfig",
            **QWEN3_VISION,
        ),
        "qwen3_omni_moe",
        deepstack_tokens,
    ),
    _glm_case(
        "glm4v-tower",
        tower("glm4v.modeling_glm4v.Glm4vVisionModel", "glm4v.configuration_glm4v.Glm4vVisionConfig", **GLM_VISION),
        "glm4v",
    ),
    _glm_case(
        "glm4v",
        full(
            "Glm4vForConditionalGeneration",
            "Glm4vConfig",
            text_config=_qwen_text(),
            vision_config=GLM_VISION,
            **GLM_IDS,
        ),
        "glm4v",
        generate=None if transformers_version() == (4, 55) else glm_prompt,  # it looks for clips under another token
    ),
    _glm_case(
        "glm4v_moe",
        full(
            "Glm4vMoeForConditionalGeneration",
            "Glm4vMoeConfig",
            text_config=_glm_moe_text(),
            vision_config=GLM_VISION,
            **GLM_IDS,
        ),
        "glm4v_moe",
        generate=glm_prompt,
    ),
    _glm_case(
        "glm46v",
        full(
            "Glm46VForConditionalGeneration",
            "Glm46VConfig",
            text_config={**_qwen_text(), "model_type": "glm4v_text"},
            vision_config={**GLM_VISION, "model_type": "glm4v_vision"},
            **GLM_IDS,
        ),
        "glm46v",
        generate=glm_prompt,
    ),
    _glm_case(
        "glm5_next",
        full(
            "Glm5NextForConditionalGeneration",
            "Glm5NextConfig",
            text_config={**TEXT, **GLM5},
            vision_config={**GLM_VISION, "projection_intermediate_size": 48},
            **GLM_IDS,
        ),
        "glm5_next",
        generate=glm_prompt,
    ),
    Case(
        "video_llama_3-tower",
        "video_llama_3",
        tower("VideoLlama3VisionModel", "VideoLlama3VisionConfig", **ROW_VISION),
        video_llama_arguments,
        video_llama_tokens,
        needs="video_llama_3",
    ),
    Case(
        "video_llama_3",
        "video_llama_3",
        full(
            "VideoLlama3ForConditionalGeneration",
            "VideoLlama3Config",
            text_config={**TEXT, "model_type": "qwen2"},
            vision_config={**ROW_VISION, "model_type": "video_llama_3_vision"},
            image_token_id=150,
            video_token_id=151,
        ),
        video_llama_arguments,
        video_llama_tokens,
        needs="video_llama_3",
        generate=video_llama_prompt,
    ),
    _row_case(
        "internvl-tower",
        "internvl",
        tower("InternVLVisionModel", "InternVLVisionConfig", **internvl_settings()["vision_config"]),
        1,
        "internvl",
    ),
    _row_case(
        "internvl",
        "internvl",
        full("InternVLForConditionalGeneration", "InternVLConfig", **internvl_settings()),
        1,
        "internvl",
        generate=picture_prompt,
        tell_model=True,
    ),
    _row_case(
        "llava_onevision",
        "llava_onevision",
        full("LlavaOnevisionForConditionalGeneration", "LlavaOnevisionConfig", **llava_settings()),
        0,
        generate=llava_prompt,
    ),
    _row_case("llava_video", "llava_video", make_llava_video, 0, generate=llava_video_prompt),
    _row_case("siglip", "siglip", tower("SiglipVisionModel", "SiglipVisionConfig", **ROW_VISION), 0),
    Case(
        "siglip2",
        "siglip",
        tower("Siglip2VisionModel", "Siglip2VisionConfig", **ROW_VISION, num_patches=16),
        padded_rows,
        row_tokens(0),
        needs="siglip2",
        tell_clips=True,
    ),
    _row_case("clip", "clip", tower("CLIPVisionModel", "CLIPVisionConfig", **ROW_VISION), 1),
    _row_case("dinov2", "dinov2", tower("Dinov2Model", "Dinov2Config", **ROW_VISION, mlp_ratio=2), 1),
    _row_case(
        "dinov2_with_registers",
        "dinov2",
        tower(
            "Dinov2WithRegistersModel",
            "Dinov2WithRegistersConfig",
            **{**ROW_VISION, "mlp_ratio": 2, "num_register_tokens": 3, "use_swiglu_ffn": True},  # as the giant has
        ),
        4,
        "dinov2_with_registers",
    ),
    # pos_embed_rescale: in training these models stretch positions at random, each forward otherwise
    _row_case(
        "dinov3",
        "dinov3",
        tower("DINOv3ViTModel", "DINOv3ViTConfig", **ROW_VISION, num_register_tokens=2, pos_embed_rescale=None),
        3,
        "dinov3_vit",
    ),
    _row_case(
        "dinov3-gated",
        "dinov3",
        tower(
            "DINOv3ViTModel",
            "DINOv3ViTConfig",
            **ROW_VISION,
            num_register_tokens=2,
            pos_embed_rescale=None,
            use_gated_mlp=True,
        ),
        3,
        "dinov3_vit",
    ),
]


def tiny(case_id: str) -> nn.Module:
    """The model of the case with that id."""
    return next(case for case in CASES if case.id == case_id).make()
