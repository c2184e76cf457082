"""InternVideo2's video encoder: a ViT whose blocks see all frames of a clip at once (arXiv 2403.15377, section 3.1).

Its modules have the published names, so that published weights fit by name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sta_adapter.errors import CheckpointError, LayoutError
from sta_adapter.internvideo.v2_5_config import InternVisionConfig
from sta_adapter.internvideo.vision_layers import InternVisionEncoderLayer

SIZES: dict[str, dict[str, float]] = {
    "internvideo2-1B": {"embed_dim": 1408, "depth": 40, "num_heads": 16, "mlp_ratio": 48 / 11},
    "internvideo2-6B": {"embed_dim": 3200, "depth": 48, "num_heads": 25, "mlp_ratio": 4},
}
"""Sizes by the name that published configurations give to the encoder."""


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of an encoder; the defaults are those of the 1B with 8 frames of 224 x 224 pixels."""

    embed_dim: int = 1408
    depth: int = 40  # blocks that are there, without those after the layer whose tokens are wanted
    num_heads: int = 16
    mlp_ratio: float = 48 / 11
    img_size: int = 224
    patch_size: int = 14
    num_frames: int = 8
    tubelet_size: int = 1
    sep_image_video_pos_embed: bool = False  # a single frame has positions of its own, else the mean over frames
    init_values: float = 1e-5  # LayerScale at the start of a training from nothing

    @classmethod
    def of_published(cls, settings: Mapping[str, Any]) -> EncoderConfig:
        """From the part `vision_encoder` of a published configuration.

        The published code takes width, depth, heads and picture from the encoder's name, whatever else is written
        there; a configuration of other sizes is told by `embed_dim`, and then names them all.
        """
        name, known = str(settings.get("name")), {field.name for field in fields(cls)}
        if "embed_dim" not in settings:
            if name not in SIZES:
                raise CheckpointError(f"the vision encoder is {name!r}; expected one of {', '.join(SIZES)}.")
            known = {"num_frames", "tubelet_size", "sep_image_video_pos_embed"}
        sizes = {**SIZES.get(name, {}), **{key: settings[key] for key in known & settings.keys()}}
        sizes["depth"] += 1 + settings.get("x_vis_return_idx", -1)
        return cls(**sizes)

    def layers(self) -> InternVisionConfig:
        """The blocks are InternViT's, with its defaults but for these sizes."""
        return InternVisionConfig(
            hidden_size=self.embed_dim,
            num_attention_heads=self.num_heads,
            intermediate_size=int(self.embed_dim * self.mlp_ratio + 1e-6),
            initializer_factor=self.init_values,
        )


class PatchEmbed(nn.Module):
    """Patches of one frame (or of a tube of frames) to tokens."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        kernel = (config.tubelet_size, config.patch_size, config.patch_size)
        side = config.img_size // config.patch_size
        self.grid_size = (config.num_frames // config.tubelet_size, side, side)
        self.proj = nn.Conv3d(3, config.embed_dim, kernel_size=kernel, stride=kernel)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) to (B, C, T, rows, columns)."""
        found: Tensor = self.proj(x.to(self.proj.weight.dtype))
        return found


class InternVideo2Encoder(nn.Module):
    """Clips to tokens: the class token first, then row by row of each frame.

    With `gradient_checkpointing`, training computes blocks again instead of keeping what they computed.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        width = config.embed_dim
        self.config = config
        self.patch_embed = PatchEmbed(config)
        frames, rows, columns = self.patch_embed.grid_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + frames * rows * columns, width) * 0.02)
        if config.sep_image_video_pos_embed:
            self.img_pos_embed = nn.Parameter(torch.randn(1, 1 + rows * columns, width) * 0.02)
        layers = config.layers()
        self.blocks = nn.ModuleList(InternVisionEncoderLayer(layers) for _ in range(config.depth))
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: Callable[..., Tensor] = functools.partial(checkpoint, use_reentrant=False)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, 1 + T * N, C) of clips (B, 3, T, H, W), normalised pixels; T = 1 is a picture. Other shapes are a LayoutError."""
        kernel = self.patch_embed.proj.kernel_size
        if x.dim() != 5 or x.shape[1] != 3 or any(size < step for size, step in zip(x.shape[2:], kernel, strict=True)):
            raise LayoutError(
                f"the video has the shape {tuple(x.shape)}; expected (clips, 3, frames, height, width), at least "
                f"{tuple(kernel)} in the last three."
            )
        patches = self.patch_embed(x)
        tokens: Tensor = rearrange(patches, "b c t h w -> b (t h w) c")
        first = self.cls_token.expand(len(tokens), -1, -1)
        tokens = torch.cat([first, tokens], dim=1) + self.positions(*patches.shape[2:])
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                tokens = self._gradient_checkpointing_func(block.__call__, tokens)
            else:
                tokens = block(tokens)
        return tokens

    def positions(self, frames: int, rows: int, columns: int) -> Tensor:
        """Position embeddings (1, 1 + frames * rows * columns, C), stretched over time and over the picture where need be."""
        table: Tensor = self.pos_embed
        grid = self.patch_embed.grid_size
        if frames == 1:
            if hasattr(self, "img_pos_embed"):
                table = self.img_pos_embed
            else:
                mean = rearrange(table[:, 1:], "b (t n) c -> b t n c", t=grid[0]).mean(1)
                table = torch.cat([table[:, :1], mean], dim=1)
            grid = (1, *grid[1:])
        if grid == (frames, rows, columns):
            return table
        cells = rearrange(table[:, 1:], "1 (t h w) c -> (h w) c t", t=grid[0], h=grid[1])
        if frames != grid[0]:
            cells = F.interpolate(cells, size=frames, mode="linear")
        if (rows, columns) != grid[1:]:
            cells = rearrange(cells, "(h w) c t -> t c h w", h=grid[1])
            cells = F.interpolate(cells, size=(rows, columns), mode="bicubic", align_corners=False)
            cells = rearrange(cells, "t c h w -> (h w) c t")
        return torch.cat([table[:, :1], rearrange(cells, "n c t -> 1 (t n) c")], dim=1)
