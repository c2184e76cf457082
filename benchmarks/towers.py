"""The encoders that are measured: Qwen2-VL's vision tower with random weights, untouched, with STA, and as published."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from common import use_checkout
from torch import nn

use_checkout()

WIDTH, HEADS, FULL_DEPTH = 1280, 16, 32
Clip = tuple[int, int, int]  # frames, rows and columns of patches


def tower(depth: int, device: str, dtype: torch.dtype, width: int = WIDTH, heads: int = HEADS) -> nn.Module:
    """Qwen2-VL's vision tower; `width` and `heads` are the 2B and 7B models' unless given."""
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

    config = Qwen2VLVisionConfig(depth=depth, embed_dim=width, hidden_size=width, num_heads=heads, mlp_ratio=4)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2VisionTransformerPretrainedModel(config)
    return model.to(dtype).eval()


def dtype_of(device: str) -> torch.dtype:
    """What is measured on a device: float32 on the CPU, bfloat16 on a GPU."""
    return torch.bfloat16 if device == "cuda" else torch.float32


def with_sta(model: nn.Module, *, like_published: bool = False, recompute: bool = False, **config: Any) -> nn.Module:
    """A copy of the tower with STA of random weights, by the package or by `as_published`."""
    from as_published import attach_as_published

    from sta_adapter import STAConfig, inject_sta

    model = copy.deepcopy(model)
    torch.manual_seed(1)
    if like_published:
        attach_as_published(model)
    else:
        inject_sta(model, STAConfig(init="normal", **config)).recompute(recompute)
    return model


def with_lora(model: nn.Module) -> None:
    """LoRA of rank 16 on attention and MLP of each block, in place."""
    from peft import LoraConfig, inject_adapter_in_model

    names = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
    inject_adapter_in_model(LoraConfig(r=16, lora_alpha=16, target_modules=names), model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            parameter.data = parameter.data.to(next(model.parameters()).dtype)


def scaled_clips(frames: int, tokens: int) -> list[Clip]:
    """One clip of so many frames and about `tokens` patches; the frame's sides are powers of two."""
    positions = tokens // frames
    rows = 2 ** ((positions.bit_length() - 1) // 2)
    return [(frames, rows, positions // rows)]


def unequal_clips(scale: int) -> list[Clip]:
    """Eight clips that all differ in length or size."""
    sizes = ((4, 2, 2), (8, 2, 2), (8, 1, 2), (16, 2, 1), (2, 4, 3), (12, 1, 1), (32, 1, 2), (6, 3, 2))
    return [(t, 2 * scale * h, 2 * scale * w) for t, h, w in sizes]


def kept_bytes(model: nn.Module, arguments: dict[str, torch.Tensor]) -> int:
    """Bytes of the tensors that a forward keeps for its backward: each storage once, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**arguments)
    return sum(storage.nbytes() for storage in kept.values())


def inputs(clips: Sequence[Clip], model: nn.Module) -> dict[str, torch.Tensor]:
    """Random patches of packed clips, as the tower's keywords."""
    parameter = next(model.parameters())
    config: Any = model.config
    size = config.in_channels * config.temporal_patch_size * config.patch_size**2
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn(sum(t * h * w for t, h, w in clips), size, generator=generator)
    grid = torch.tensor(list(clips))
    return {"hidden_states": pixels.to(parameter), "grid_thw": grid.to(parameter.device)}


def forward(model: nn.Module, arguments: dict[str, torch.Tensor]) -> torch.Tensor:
    """The tower's output without gradients."""
    with torch.no_grad():
        return model(**arguments)[0]


def sta_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters of STA, by either way of attaching it."""
    return [p for name, p in model.named_parameters() if ".sta." in name]
