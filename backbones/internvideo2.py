"""InternVideo2: the bare 1B and 6B ViT, and InternVideo2-Chat's `vision_encoder`; clips are the rows of the batch."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import nn

from sta_adapter.attention.layout import ClipLayout
from sta_adapter.compatibility.calls import takes
from sta_adapter.errors import LayoutError
from sta_adapter.injection.backbone import Backbone, EncoderCall, LoRARecipe, number_of, sizes_of

# language models of the InternVideo family: Mistral, Llama and Qwen2 (q_proj ...) and InternLM2 (wqkv ...)
INTERN_LORA = LoRARecipe(
    target_modules=(
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        *("wqkv", "wo", "w1", "w2", "w3"),
        *("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"),
    ),
    rank_pattern={"attn.qkv": 32},
    alpha_pattern={"attn.qkv": 32},
)


def video_layout(call: EncoderCall) -> ClipLayout:
    """Layout of rows (B, 1 + T * N, C), class token first, made from the video `x` (B, channels, frames, height, width).

    A mask that drops the same positions from every frame leaves a clip of fewer positions; another mask leaves no
    position that could be followed through the frames.
    """
    video, encoder = call.tensor("x"), call.encoder
    kernel = sizes_of(encoder.get_submodule("patch_embed.proj"), "kernel_size")
    if video.dim() != 5 or any(size < least for size, least in zip(video.shape[2:], kernel, strict=True)):
        raise LayoutError(
            f"the video has the shape {tuple(video.shape)}; expected (clips, channels, frames, height, width), "
            f"at least {kernel} in the last three."
        )
    clips = video.shape[0]
    frames, rows, columns = (size // step for size, step in zip(video.shape[2:], kernel, strict=True))
    if call.clip_lengths is not None and tuple(call.clip_lengths) != (frames,) * clips:
        raise LayoutError(
            f"clip lengths {list(call.clip_lengths)} were told, but this encoder sees them itself: "
            f"{clips} clips of {frames} frames. Leave them out."
        )
    positions = _visible(cast("torch.Tensor | None", call.arguments.get("mask")), clips, frames, rows * columns)
    return ClipLayout([(frames, positions)] * clips, prefix=1)


def _visible(mask: torch.Tensor | None, clips: int, frames: int, positions: int) -> int:
    """Positions of each frame that a mask (B, 1 + T * N), True where a token is dropped, leaves."""
    if mask is None or not mask.any():
        return positions
    if mask.shape == (clips, 1 + frames * positions) and not mask[:, 0].any():
        kept = ~mask[:, 1:].reshape(clips, frames, positions)
        counts = kept[:, 0].sum(-1)
        if (kept == kept[:, :1]).all() and (counts == counts[0]).all() and counts[0] > 0:
            return int(counts[0])
    raise LayoutError(
        f"the mask {tuple(mask.shape)} drops other positions in one frame than in the next, or the class token, so a "
        "position can't be followed through the frames. Use a tube mask (the same in every frame), keep all tokens, "
        "or switch STA off with handle.disabled()."
    )


def video_positions(call: EncoderCall, layout: ClipLayout) -> list[torch.Tensor | None]:
    """Positions of each clip, row by row; None where a mask has dropped some."""
    kernel = sizes_of(call.encoder.get_submodule("patch_embed.proj"), "kernel_size")
    _, rows, columns = (size // step for size, step in zip(call.tensor("x").shape[2:], kernel, strict=True))
    grid = torch.arange(rows * columns).view(rows, columns)
    return [grid if positions == grid.numel() else None for _, positions in layout.clips]


def video_dummy(encoder: nn.Module) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    """A black clip of the size that the encoder was made for; some of its classes take no other."""
    kernel = sizes_of(encoder.get_submodule("patch_embed.proj"), "kernel_size")
    grid = sizes_of(encoder.get_submodule("patch_embed"), "grid_size")
    weight = encoder.get_parameter("patch_embed.proj.weight")
    size = [count * step for count, step in zip(grid, kernel, strict=True)]
    video = torch.zeros(1, weight.shape[1], *size, device=weight.device, dtype=weight.dtype)
    if not takes(encoder, "mask"):
        return (video,), {}
    keep_all = torch.zeros(1, 1 + math.prod(grid), device=weight.device, dtype=torch.bool)
    return (video,), {"mask": keep_all}


def block_heads(encoder: nn.Module) -> int:
    """Attention heads, from the first block."""
    return number_of(encoder.get_submodule("blocks.0.attn"), "num_heads")


BACKBONE = Backbone(
    name="internvideo2",
    encoder_classes=(
        *("PretrainVisionTransformer", "PretrainVisionTransformer_clean"),
        *("PretrainInternVideo2", "InternVideo2", "DistInternVideo2", "InternVideo2Encoder"),
    ),
    layout=video_layout,
    heads=block_heads,
    defaults={"rope_theta": None, "head_scale": 1.0, "gamma_init": 1e-5},
    lora=INTERN_LORA,
    dummy_inputs=video_dummy,
    positions=video_positions,
    published_names={"norm": "norm3", "to_qkv": "temporal_attn.qkv", "to_out": "temporal_attn.proj", "gamma": "ls3"},
)
