"""Qwen2-VL: clips packed one after the other, described by `grid_thw`."""

from __future__ import annotations

import torch
from torch import nn

from sta_adapter.attention.layout import ClipLayout
from sta_adapter.backbones.qwen2_vl_text_positions import TEXT_POSITIONS
from sta_adapter.errors import LayoutError
from sta_adapter.injection.backbone import Backbone, EncoderCall, LoRARecipe, VLLMTower, black, number_of

QWEN_LORA = LoRARecipe(
    target_modules=(
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        *("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"),
    ),
    rank_pattern={"attn.qkv": 32},
    alpha_pattern={"attn.qkv": 32},
)


def grid_rows(call: EncoderCall) -> list[list[int]]:
    """The rows of `grid_thw` (clips, 3), a tensor or lists (vLLM): frames, rows and columns of patches."""
    given = call.arguments.get("grid_thw")
    grid = torch.tensor(given) if isinstance(given, list) else call.tensor("grid_thw")
    if grid.dim() != 2 or grid.shape[1] != 3:
        raise LayoutError(f"grid_thw has the shape {tuple(grid.shape)}; expected (clips, 3): frames, rows, columns.")
    return grid.tolist()


def grid_layout(call: EncoderCall) -> ClipLayout:
    """Layout from `grid_thw` (clips, 3): t frames of h * w patches each, clip after clip."""
    return ClipLayout([(t, h * w) for t, h, w in grid_rows(call)])


def merged_positions(rows: int, columns: int, merge: int, window: int = 0) -> torch.Tensor:
    """Index (rows, columns) of each patch in a frame, whose merge x merge neighbours, and windows of these, lie together."""
    units = torch.arange(rows * columns).view(rows // merge, columns // merge, merge, merge)
    if window:
        bands = torch.split(torch.arange(rows * columns // merge**2).view(rows // merge, columns // merge), window)
        order = torch.cat([part.flatten() for band in bands for part in torch.split(band, window, dim=1)])
        units = units.flatten(0, 1)[torch.argsort(order)].view(units.shape)
    return units.transpose(1, 2).reshape(rows, columns)


def grid_positions(call: EncoderCall, layout: ClipLayout) -> list[torch.Tensor | None]:
    """Positions of each clip of `grid_thw`."""
    merge = number_of(call.encoder.config, "spatial_merge_size")
    return [merged_positions(h, w, merge) for _, h, w in grid_rows(call)]


def config_heads(encoder: nn.Module) -> int:
    """Attention heads, from the encoder's configuration."""
    return number_of(encoder.config, "num_heads")


def grid_dummy(encoder: nn.Module) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    """A black clip of two frames, 2x2 patches after merging one by one."""
    merge = number_of(encoder.config, "spatial_merge_size")
    size = number_of(encoder.config, "in_channels", "in_chans", default=3)
    size *= number_of(encoder.config, "temporal_patch_size") * number_of(encoder.config, "patch_size") ** 2
    pixels = black(encoder, 2 * merge * merge, size)
    return (pixels,), {"grid_thw": torch.tensor([[2, merge, merge]], device=pixels.device)}


def tower_heads(encoder: nn.Module) -> int:
    """Attention heads of vLLM's towers, which keep no configuration."""
    return number_of(encoder, "num_heads")


def tower_dummy(encoder: nn.Module) -> tuple[tuple[torch.Tensor], dict[str, list[list[int]]]]:
    """The clip of `grid_dummy` for vLLM's towers."""
    merge, weight = number_of(encoder, "spatial_merge_size"), encoder.get_parameter("patch_embed.proj.weight")
    pixels = torch.zeros(2 * merge * merge, weight[0].numel(), device=weight.device, dtype=weight.dtype)
    return (pixels,), {"grid_thw": [[2, merge, merge]]}


def vllm_tower(encoder_class: str, text_positions: str | None = None, **architectures: str) -> VLLMTower:
    """VLLM's tower, with a row of its grid for each clip; `architectures` are names with the file of vLLM's that has the class."""
    return VLLMTower(
        {name: f"vllm.model_executor.models.{file}:{name}" for name, file in architectures.items()},
        {
            **{"encoder_classes": (encoder_class,), "layout": grid_layout, "clip_source": None},
            **{"heads": tower_heads, "dummy_inputs": tower_dummy, "positions": None},
        },
        text_positions=text_positions,
    )


BACKBONE = Backbone(
    name="qwen2_vl",
    encoder_classes=("Qwen2VisionTransformerPretrainedModel",),
    layout=grid_layout,
    separate_frames=True,
    heads=config_heads,
    lora=QWEN_LORA,
    dummy_inputs=grid_dummy,
    positions=grid_positions,
    text_positions=TEXT_POSITIONS,
    published_names={"norm": "norm3", "to_qkv": "temp_attn.qkv", "to_out": "temp_attn.proj"},
    published_prefix="visual.",
    published_token_order=True,
    vllm=vllm_tower("Qwen2VisionTransformer", "original", Qwen2VLForConditionalGeneration="qwen2_vl"),
)
