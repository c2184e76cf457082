"""Tiny random models for the examples' `--tiny` mode, and where their real counterparts come from.

Models that transformers has are of the real class. Those whose code lies on the Hub are the stand-ins of `tests/`, which
have the same module names and arithmetic; so `--tiny` needs a clone of the repository, and runs on every transformers.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from sta_adapter.demo import TINY_BASE
from sta_adapter.internvideo.v2_encoder import EncoderConfig, InternVideo2Encoder
from sta_adapter.loading import load_processor


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


def internvideo2_encoder(frames: int = 4) -> nn.Module:
    """InternVideo2's encoder for pictures of 8 x 8 pixels."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 4,
        "mlp_ratio": 2,
        "img_size": 8,
        "patch_size": 4,
    }
    return InternVideo2Encoder(EncoderConfig(**sizes, num_frames=frames, init_values=0.5))


def internvideo2_chat() -> tuple[nn.Module, Any]:
    """A stand-in of InternVideo2-Chat, called as the published one is, and a tokenizer."""
    standin: Any = _standin("internvideo2").InternVideo2_VideoChat2

    class InternVideo2Chat(standin):
        def forward(
            self, input_ids: torch.Tensor, attention_mask: torch.Tensor, video: torch.Tensor, video_idx: torch.Tensor
        ) -> Any:
            """Video (B, T, channels, H, W), whose features take the places where `video_idx` (B, L) is true."""
            embeddings = self.lm.get_input_embeddings()(input_ids).clone()
            seen = self.vision_encoder(video.transpose(1, 2), use_image=video.shape[1] == 1)
            places = int(video_idx[0].sum())  # the Q-Former's number of tokens, whatever the clip's size
            seen = F.adaptive_avg_pool1d(self.project_up(seen).mT, places).mT
            embeddings[video_idx] = seen.flatten(0, 1)
            return self.lm(inputs_embeds=embeddings, attention_mask=attention_mask)

    tokenizer = load_processor(TINY_BASE).tokenizer
    torch.manual_seed(0)
    model = InternVideo2Chat(init_values=0.5)
    model.lm = _with_vocabulary(model.lm)
    return model.eval(), tokenizer


def internvl_chat() -> tuple[nn.Module, Any]:
    """A stand-in of InternVideo2.5-Chat and a tokenizer that has its image tokens."""
    tokenizer = load_processor(TINY_BASE).tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["<IMG_CONTEXT>", "<img>", "</img>"]})
    torch.manual_seed(0)
    model = _standin("internvl_chat").InternVLChatModel()
    model.language_model = _with_vocabulary(model.language_model)
    return model.eval(), tokenizer


def _with_vocabulary(model: Any, size: int = 512) -> Any:
    model.config.vocab_size = size
    return type(model)(model.config)


def _standin(name: str) -> Any:
    tests = Path(__file__).resolve().parents[1] / "tests"
    if str(tests) not in sys.path:
        sys.path.append(str(tests))
    return importlib.import_module(f"standins.{name}")
