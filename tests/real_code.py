"""Import of published model files from the folder in STA_REAL_CODE, on a machine without flash-attn and timm.

The folder holds one subfolder a release, with the files as published:

    internvideo2_chat/    model_config.py, modeling_*.py, of InternVideo2-Chat on the Hub
    internvideo2/         internvideo2.py, internvideo2_clip_vision.py, pos_embed.py, flash_attention_class.py,
                          of OpenGVLab/InternVideo, InternVideo2/multi_modality/models/backbones/internvideo2
    internvideo2_single/  internvideo2.py, internvideo2_pretrain.py, internvideo2_distill.py, pos_embed.py,
                          flash_attention_class.py, of InternVideo2/single_modality/models there
    internvideo2_5/       configuration_*.py, conversation.py, modeling_*.py, of InternVideo2.5-Chat on the Hub
    staveq2/              custom_vit_stacked.py, of the authors' InternVideo2 variant
    llava_next/           the package `llava` of LLaVA-VL/LLaVA-NeXT
    videorope/            see test_videorope_backbone.py

They need transformers below 4.50. Run with `STA_REAL_CODE=FOLDER pytest -m real_code`.
"""

import importlib
import importlib.machinery
import os
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from standins.internvideo2 import DropoutAddRMSNorm, DropPath, Mlp


class FlashAttention(torch.nn.Module):
    """The published wrapper's result, computed by torch: qkv is (B, S, 3, H, D)."""

    def __init__(self, attention_dropout=0.0):
        super().__init__()

    def forward(self, qkv, key_padding_mask=None, need_weights=False, causal=False):
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2), None


class FusedMLP(Mlp):
    """The fused MLP's result, computed by torch."""

    def __init__(self, in_features, hidden_features, heuristic=0):
        super().__init__(in_features, hidden_features)


def _module(name, **content):
    module = ModuleType(name)
    module.__dict__.update(content, __path__=[], __spec__=importlib.machinery.ModuleSpec(name, None))
    return module


TIMM = {
    "timm": {},
    "timm.models": {},
    "timm.models.layers": {
        "DropPath": DropPath,
        "to_2tuple": lambda x: x if isinstance(x, tuple) else (x, x),
        "trunc_normal_": torch.nn.init.trunc_normal_,
        "drop_path": lambda x, drop_prob, training: DropPath(drop_prob).train(training)(x),
    },
    "timm.models.registry": {"register_model": lambda function: function},
}
FLASH = {
    "flash_attn": {},
    "flash_attn.modules": {},
    "flash_attn.modules.mlp": {"FusedMLP": FusedMLP},
    "flash_attn.ops": {},
    "flash_attn.ops.rms_norm": {"DropoutAddRMSNorm": DropoutAddRMSNorm},
    "flash_attn.flash_attn_interface": {"flash_attn_varlen_qkvpacked_func": None},
    "flash_attn.bert_padding": {"unpad_input": None, "pad_input": None},
}


def load(folder, file, *, flash=False):
    """A published file as a module; skips when STA_REAL_CODE does not hold it."""
    root = Path(os.environ["STA_REAL_CODE"])
    if not (root / folder / f"{file}.py").exists():
        pytest.skip(f"STA_REAL_CODE holds no {folder}/{file}.py")
    package = f"real_{folder}"
    if package not in sys.modules:
        sys.modules[package] = _module(package)
        sys.modules[package].__path__ = [str(root / folder)]
    stubs = {**TIMM, **(FLASH if flash else {})}
    missing = {name: _module(name, **content) for name, content in stubs.items() if name not in sys.modules}
    with mock.patch.dict(sys.modules, missing):
        module = importlib.import_module(f"{package}.{file}")
    if flash:
        module.FlashAttention = FlashAttention
    return module


def load_package(folder, name):
    """A module of a published package, by the names that its files call each other; skips when STA_REAL_CODE does not hold it."""
    root = Path(os.environ["STA_REAL_CODE"]) / folder
    if not (root / name.partition(".")[0]).exists():
        pytest.skip(f"STA_REAL_CODE holds no {folder}/{name.partition('.')[0]}")
    with mock.patch.object(sys, "path", [str(root), *sys.path]):
        return importlib.import_module(name)
