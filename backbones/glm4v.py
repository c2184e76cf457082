"""GLM-4.1V, 4.5V, 4.6V and GLM-5's Flash models: a tower that gets each frame of a video as a grid of its own.

The full model turns a video's (t, h, w) into t rows (1, h, w) before it calls the tower, so that a clip looks like as
many pictures. The clips are read where they are still known, from the model's `get_video_features` and
`get_image_features`. A tower that is called by itself with several rows of one frame must be told.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from itertools import accumulate

import torch
from torch import nn

from sta_adapter.attention.layout import AllRows, ClipLayout, ClipLengths
from sta_adapter.backbones.frames import unknown_clips
from sta_adapter.backbones.qwen2_5_vl import GATED_LORA
from sta_adapter.backbones.qwen2_vl import config_heads, grid_dummy, grid_rows, merged_positions, vllm_tower
from sta_adapter.errors import LayoutError
from sta_adapter.injection.backbone import Backbone, ClipSource, EncoderCall, number_of


def frame_grid_layout(call: EncoderCall) -> ClipLayout:
    """Layout from `grid_thw` (rows, 3) and the frames of each clip, which may be several rows."""
    rows = grid_rows(call)
    frames = [(h, w) for t, h, w in rows for _ in range(t)]
    if call.clip_lengths is None:
        if sum(t == 1 for t, _, _ in rows) > 1:
            raise unknown_clips(f"the {len(rows)} rows {rows} of {type(call.encoder).__name__}'s grid_thw")
        return ClipLayout([(t, h * w) for t, h, w in rows])
    lengths = [n if isinstance(n, int) else n[0] for n in call.clip_lengths]
    if isinstance(call.clip_lengths, AllRows):
        lengths = [len(frames)]
    if sum(lengths) != len(frames):
        raise LayoutError(
            f"the encoder got {len(frames)} frames, but the clips {lengths} have {sum(lengths)}. "
            "Tell the frames of each clip with handle.clips([...]); one frame here is one temporal step of grid_thw."
        )
    clips = [frames[end - length : end] for length, end in zip(lengths, accumulate(lengths), strict=True)]
    for clip in clips:
        if len(set(clip)) > 1:
            raise LayoutError(f"the frames of a clip have {clip} rows and columns; expected the same in each frame.")
    return ClipLayout([(len(clip), clip[0][0] * clip[0][1]) for clip in clips])


def frame_positions(call: EncoderCall, layout: ClipLayout) -> list[torch.Tensor | None]:
    """Positions of each clip, from the grid of its first frame."""
    merge = number_of(call.encoder.config, "spatial_merge_size")
    frames = [(h, w) for t, h, w in grid_rows(call) for _ in range(t)]
    starts = accumulate((t for t, _ in layout.clips[:-1]), initial=0)
    return [merged_positions(*frames[start], merge) for start in starts]


def grid_frames(name: str) -> Callable[[nn.Module, Mapping[str, object]], ClipLengths | None]:
    """A function that reads the frames of each clip from the argument `name`, a grid (clips, 3)."""

    def lengths(model: nn.Module, arguments: Mapping[str, object]) -> ClipLengths | None:
        grid = arguments.get(name)
        return tuple(grid[:, 0].tolist()) if isinstance(grid, torch.Tensor) and len(grid) else None

    return lengths


def frame_dummy(encoder: nn.Module) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    """A black clip of one frame."""
    (pixels,), arguments = grid_dummy(encoder)
    grid = arguments["grid_thw"].clone()
    grid[:, 0] = 1
    return (pixels[: len(pixels) // 2],), {"grid_thw": grid}


# The language model's MLP has one layer for gate and up; GLM-5's attention compresses q, k and v.
GLM_LORA = dataclasses.replace(
    GATED_LORA,
    target_modules=(
        *GATED_LORA.target_modules,
        *("mlp.gate_up_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
    ),
)

BACKBONE = Backbone(
    name="glm4v",
    encoder_classes=("Glm4vVisionModel", "Glm4vMoeVisionModel", "Glm5NextVisionModel"),
    layout=frame_grid_layout,
    separate_frames=True,
    heads=config_heads,
    qkv_bias=False,
    clip_source=ClipSource(
        model_classes=("Glm4vModel", "Glm4vMoeModel", "Glm46VModel", "Glm5NextModel"),
        methods={
            "get_video_features": grid_frames("video_grid_thw"),
            "get_image_features": grid_frames("image_grid_thw"),
        },
    ),
    lora=GLM_LORA,
    dummy_inputs=frame_dummy,
    positions=frame_positions,
    vllm=vllm_tower(
        "Glm4vVisionTransformer",
        Glm4vForConditionalGeneration="glm4_1v",
        Glm4vMoeForConditionalGeneration="glm4_1v",
    ),
)
