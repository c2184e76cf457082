"""InternVideo2's encoder by itself, from any of the checkpoints that hold it: stage 1, stage 2 (video-text), CLIP-style, classifiers."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Size

from sta_adapter.errors import CheckpointError
from sta_adapter.internvideo.v2_encoder import SIZES, EncoderConfig, InternVideo2Encoder
from sta_adapter.internvideo.weights import Weights, fill, iterate_weights, weight_files

HEADS = {int(size["embed_dim"]): int(size["num_heads"]) for size in SIZES.values()}
"""By the width of the tokens."""
TOWER = "vision_encoder."
OTHERS = re.compile(
    r"^(clip_pos_embed|clip_img_pos_embed|clip_projector|clip_decoder|final_clip_decoder|mae_pos_embed|mae_decoder|mae_|head|fc_norm|fc_dropout)"
)
"""What comes after the blocks: decoders of the pretraining's teachers, attention pooling, a classifier."""


def load_encoder(
    source: str | os.PathLike[str],
    *,
    num_heads: int | None = None,
    img_size: int = 224,
    dtype: torch.dtype = torch.float32,
) -> InternVideo2Encoder:
    """The encoder with its weights; its other sizes are read off them.

    What stands beside it in a checkpoint, as the text encoder of stage 2, and what comes after its blocks is left out.

    Args:
        source: a file (`.pt`, `.pth`, `.bin`, `.safetensors`) or a folder with one.
        num_heads: attention heads; None for those of the 1B or 6B.
        img_size: of the pictures that it was trained on, in pixels.
        dtype: of its weights.

    Raises:
        CheckpointError: the file can't be read, holds no InternVideo2 encoder, or one whose heads aren't known.
    """
    weights = dict(_named(iterate_weights(weight_files(Path(source)))))
    config = _config({name: tensor.shape for name, tensor in weights.items()}, num_heads, img_size, source)
    with torch.device("meta"):
        model = InternVideo2Encoder(config)
    fill(model, weights.items(), source=source, dtype=dtype)
    return model.eval()


def _named(weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
    """The encoder's weights by our names; where a checkpoint has other parts, its encoder is the one with their prefix."""
    held = [(re.sub(r"^(module\.|model\.)+", "", name), tensor) for name, tensor in weights]
    several = any(name.startswith(TOWER) for name, _ in held)
    for name, tensor in held:
        if several and not name.startswith(TOWER):
            continue
        ours = re.sub(r"\.(ls[12])\.gamma$", r".\1", name.removeprefix(TOWER))
        if not OTHERS.match(ours):
            yield ours, tensor


def _config(
    shapes: dict[str, Size], num_heads: int | None, img_size: int, source: str | os.PathLike[str]
) -> EncoderConfig:
    needed = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight")
    missing = [name for name in needed if name not in shapes]
    if missing:
        raise CheckpointError(
            f"{source} holds no InternVideo2 encoder: {missing[0]} is missing among {len(shapes)} weights, first "
            f"{next(iter(shapes), 'none')!r}. Give a checkpoint of stage 1, stage 2 or the CLIP-style model."
        )
    width = shapes["cls_token"][-1]
    heads = HEADS.get(width) if num_heads is None else num_heads
    if heads is None:
        raise CheckpointError(
            f"the encoder in {source} is {width} wide; heads are known for {', '.join(map(str, HEADS))} (1B, 6B). Give num_heads."
        )
    kernel = shapes["patch_embed.proj.weight"][2:]
    cells = (img_size // kernel[1]) ** 2
    frames, rest = divmod(shapes["pos_embed"][1] - 1, max(1, cells))
    if rest or not frames:
        raise CheckpointError(
            f"the encoder in {source} has {shapes['pos_embed'][1] - 1} positions, which are no whole number of frames of {cells}, of "
            f"pictures of {img_size} pixels. Give the img_size that it was trained with."
        )
    return EncoderConfig(
        embed_dim=width,
        depth=1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")),
        num_heads=heads,
        mlp_ratio=shapes["blocks.0.mlp.fc1.weight"][0] / width,
        img_size=img_size,
        patch_size=kernel[1],
        num_frames=frames * kernel[0],
        tubelet_size=kernel[0],
        sep_image_video_pos_embed="img_pos_embed" in shapes,
    )
