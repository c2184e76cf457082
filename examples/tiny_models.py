"""Tiny random models, of the real classes, for the examples' `--tiny` mode."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import nn

from sta_adapter.demo import TINY_BASE
from sta_adapter.internvideo.v2_5_config import InternVideo2_5Config
from sta_adapter.internvideo.v2_5_images import InternVideo2_5ImageProcessor
from sta_adapter.internvideo.v2_5_model import InternVideo2_5ForConditionalGeneration
from sta_adapter.internvideo.v2_5_processor import InternVideo2_5Processor
from sta_adapter.internvideo.v2_config import InternVideo2ChatConfig
from sta_adapter.internvideo.v2_encoder import EncoderConfig, InternVideo2Encoder
from sta_adapter.internvideo.v2_images import InternVideo2ImageProcessor
from sta_adapter.internvideo.v2_model import InternVideo2Chat
from sta_adapter.internvideo.v2_processor import InternVideo2ChatProcessor
from sta_adapter.loading import load_processor

ENCODER = EncoderConfig(
    embed_dim=32, depth=2, num_heads=4, mlp_ratio=2, img_size=8, patch_size=4, num_frames=4, init_values=0.5
)
"""InternVideo2's, for pictures of 8 x 8 pixels."""


def write_qwen2_5_vl(folder: Path) -> Path:
    """A folder with a tiny random Qwen2.5-VL and its processor (needs transformers 4.49 or newer)."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

    base = load_processor(TINY_BASE)
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    words = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    config = Qwen2_5_VLConfig(
        text_config={
            **{"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
            **{"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 2048},
            "rope_scaling": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
            **{"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0},
        },
        vision_config={
            **{"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32},
            **{"patch_size": 8, "temporal_patch_size": 1, "spatial_merge_size": 2, "in_channels": 3},
            **{"window_size": 32, "fullatt_block_indexes": [1], "tokens_per_second": 2},
        },
        **dict(zip(names, base.tokenizer.convert_tokens_to_ids(list(words)), strict=True)),
    )
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    parts = ("image_processor", "video_processor", "tokenizer")  # older releases have no video processor
    processor = Qwen2_5_VLProcessor(
        **{name: getattr(base, name) for name in parts if hasattr(base, name)}, chat_template=base.chat_template
    )
    processor.save_pretrained(folder)
    return folder


def internvideo2_encoder() -> nn.Module:
    """InternVideo2's encoder by itself."""
    torch.manual_seed(0)
    return InternVideo2Encoder(ENCODER)


def write_internvideo2_chat(folder: Path) -> Path:
    """A folder with a tiny random InternVideo2-Chat, as `save_pretrained` writes it, and its processor."""
    text = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024, "rope_theta": 1e4}
    qformer = {"vocab_size": 20, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = InternVideo2ChatConfig(
        vision_config=dataclasses.asdict(ENCODER),
        qformer_config={**qformer, "num_attention_heads": 4},
        text_config={**text, "bos_token_id": 0, "eos_token_id": 2},
        **{"num_query_token": 4, "extra_num_query_token": 4},
    )
    torch.manual_seed(0)
    InternVideo2Chat(config).save_pretrained(folder)
    tokenizer = load_processor(TINY_BASE).tokenizer
    tokenizer.bos_token = "<|im_start|>"
    processor = InternVideo2ChatProcessor(
        tokenizer,
        InternVideo2ImageProcessor(image_size=ENCODER.img_size),
        **{name: getattr(config, name) for name in ("num_visual_tokens", "image_token_id", "video_token_id")},
    )
    processor.save_pretrained(folder)
    return folder


def write_internvideo2_5_chat(folder: Path) -> Path:
    """A folder with a tiny random InternVideo2.5-Chat, as `save_pretrained` writes it, and its processor."""
    tokenizer = load_processor(TINY_BASE).tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["<IMG_CONTEXT>", "<img>", "</img>"]})
    vision = {"image_size": 28, "patch_size": 7, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 4, "qkv_bias": True, "qk_normalization": False, "norm_type": "layer_norm"}
    text = {"vocab_size": 520, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}
    config = InternVideo2_5Config(
        vision_config=vision,
        text_config={**text, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        num_tome_tokens=8,
    )
    torch.manual_seed(0)
    InternVideo2_5ForConditionalGeneration(config).save_pretrained(folder)
    images = InternVideo2_5ImageProcessor(image_size=vision["image_size"], max_tiles=2)
    InternVideo2_5Processor(tokenizer, images, image_seq_length=2).save_pretrained(folder)
    return folder
