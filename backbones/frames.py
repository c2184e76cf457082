"""Shared by encoders that take frames as a batch of images: rows (F, prefix + N, C), one row a frame or a tile of it.

Such an encoder can't see where a clip ends. The rows are one clip, unless `EncoderCall.clip_lengths` says otherwise:
told by `handle.clips([...])`, by a `clip_lengths` keyword, or read from the full model's call by its backbone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from sta_adapter.backbone import EncoderCall
from sta_adapter.errors import LayoutError
from sta_adapter.layout import ClipLayout


def row_clips(
    rows: int, positions: int, lengths: Sequence[int | tuple[int, int]] | None, *, prefix: int = 0
) -> ClipLayout:
    """Layout of rows (rows, prefix + positions, C) that are the frames of one clip after the other.

    Args:
        rows: size of the encoder's batch.
        positions: patch positions of a row.
        lengths: of each clip, its frames, or (frames, tiles of each frame) where a frame takes several rows;
            None for one clip of all rows.
        prefix: class and register tokens in front of a row's patches.

    Raises:
        LayoutError: when the clips don't add up to the rows.
    """
    clips = [(rows, 1)] if lengths is None else [n if isinstance(n, tuple) else (n, 1) for n in lengths]
    total = sum(frames * tiles for frames, tiles in clips)
    if total != rows:
        raise LayoutError(
            f"the encoder got {rows} rows, one a frame, but the clips {list(lengths or ())} have {total}. "
            "Tell the frames of each clip with handle.clips([...]) or clip_lengths=[...]; they must add up."
        )
    return ClipLayout([(frames, tiles * positions) for frames, tiles in clips], prefix=prefix)


def pixel_layout(
    *, patch_size: Callable[[Any], int] = lambda encoder: encoder.config.patch_size, prefix: int = 1
) -> Callable[[EncoderCall], ClipLayout]:
    """A layout function for encoders called with `pixel_values` (F, channels, H, W).

    Args:
        patch_size: from the encoder to the side of its square patches.
        prefix: class and register tokens in front of a row's patches.
    """

    def layout(call: EncoderCall) -> ClipLayout:
        pixels = call.tensor("pixel_values")
        if pixels.dim() != 4:
            raise LayoutError(
                f"pixel_values have the shape {tuple(pixels.shape)}; expected (frames, channels, height, width)."
            )
        rows, _, height, width = pixels.shape
        patch = patch_size(call.encoder)
        return row_clips(rows, (height // patch) * (width // patch), call.clip_lengths, prefix=prefix)

    return layout


def pixel_dummy(encoder: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A clip of two black frames, of the size that the encoder's configuration names."""
    config: Any = encoder.config
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    parameter = next(p for p in encoder.parameters() if p.is_floating_point())
    shape = (2, getattr(config, "num_channels", 3), height, width)
    return (), {"pixel_values": torch.zeros(shape, device=parameter.device, dtype=parameter.dtype)}
