"""Shared by encoders that take frames as a batch of images: rows (F, prefix + N + suffix, C), one row a frame or a tile of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from sta_adapter.attention.layout import EACH_ROW as EACH_ROW
from sta_adapter.attention.layout import AllRows, ClipLayout, ClipLengths, EachRow
from sta_adapter.errors import LayoutError, UnknownClipsError
from sta_adapter.injection.backbone import EncoderCall, black, number_of, sizes_of


def row_clips(
    rows: int,
    positions: int,
    lengths: ClipLengths | None,
    *,
    prefix: int = 0,
    suffix: int = 0,
    must_be_told: bool = True,
) -> ClipLayout:
    """Layout of rows (rows, prefix + positions + suffix, C) that are the frames of one clip after the other.

    Args:
        rows: size of the encoder's batch.
        positions: patch positions of a row.
        lengths: of each clip, its frames, or (frames, tiles of each frame); `EACH_ROW`; `ALL_ROWS`; None when not told.
        prefix: class and register tokens in front of a row's patches.
        suffix: those behind them.
        must_be_told: whether several rows of which nobody has told are an error; else they are one clip.

    Raises:
        LayoutError: when the clips don't add up to the rows, or are not known.
    """
    if must_be_told and rows > 1 and lengths is None:
        raise unknown_clips(f"the encoder's {rows} rows")
    if isinstance(lengths, EachRow):
        lengths = (1,) * rows
    whole = lengths is None or isinstance(lengths, AllRows)
    clips = [(rows, 1)] if whole else [n if isinstance(n, tuple) else (n, 1) for n in lengths or ()]
    total = sum(frames * tiles for frames, tiles in clips)
    if total != rows:
        raise LayoutError(
            f"the encoder got {rows} rows, one a frame, but the clips {list(lengths or ())} have {total}. "
            "Tell the frames of each clip with handle.clips([...]) or clip_lengths=[...]; they must add up."
        )
    return ClipLayout([(frames, tiles * positions) for frames, tiles in clips], prefix=prefix, suffix=suffix, rows=rows)


def unknown_clips(found: str) -> UnknownClipsError:
    """The error for rows of which nobody has told whether they are frames of one clip or pictures."""
    return UnknownClipsError(
        f"where the clips end can't be known: {found} may be frames of one clip or separate pictures. Tell the frames "
        "of each clip: `with handle.clips([8, 1]):` around the call means a clip of 8 frames, then a picture."
    )


def pixel_layout(
    *,
    patch_size: Callable[[nn.Module], int | tuple[int, ...]] = lambda encoder: sizes_of(encoder.config, "patch_size"),
    prefix: int | Callable[[nn.Module], int] = 1,
    suffix: int = 0,
    must_be_told: bool = True,
) -> Callable[[EncoderCall], ClipLayout]:
    """A layout function for encoders called with `pixel_values` (F, channels, H, W).

    Args:
        patch_size: from the encoder to the side of its square patches, or (height, width) of a patch.
        prefix: class and register tokens in front of a row's patches, or a function from the encoder to them.
        suffix: those behind them.
        must_be_told: whether several rows without told clips are an error; else they are one clip.
    """

    def layout(call: EncoderCall) -> ClipLayout:
        pixels = call.tensor("pixel_values")
        if pixels.dim() != 4:
            raise LayoutError(
                f"pixel_values have the shape {tuple(pixels.shape)}; expected (frames, channels, height, width)."
            )
        rows, _, height, width = pixels.shape
        if must_be_told and rows > 1 and call.clip_lengths is None:
            raise unknown_clips(f"the {rows} rows of {type(call.encoder).__name__}'s pixel_values")
        size = patch_size(call.encoder)
        sides = (size,) if isinstance(size, int) else size
        positions = (height // sides[0]) * (width // sides[-1])
        leading = prefix if isinstance(prefix, int) else prefix(call.encoder)
        return row_clips(rows, positions, call.clip_lengths, prefix=leading, suffix=suffix, must_be_told=False)

    return layout


def pixel_positions(call: EncoderCall, layout: ClipLayout) -> list[torch.Tensor | None]:
    """Positions of each clip, row by row; None where a frame takes several rows of the batch, or came without pixels."""
    pixels = call.arguments.get("pixel_values")
    if not isinstance(pixels, torch.Tensor) or pixels.dim() != 4:
        return [None] * len(layout.clips)
    sides = sizes_of(call.encoder.config, "patch_size")
    rows, columns = pixels.shape[2] // sides[0], pixels.shape[3] // sides[-1]
    grid = torch.arange(rows * columns).view(rows, columns)
    return [grid if positions == grid.numel() else None for _, positions in layout.clips]


def attention_heads(encoder: nn.Module) -> int:
    """Attention heads, from the encoder's configuration."""
    return number_of(encoder.config, "num_attention_heads")


def picture_dummy(encoder: nn.Module) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    """One black picture, for encoders that must be told about several rows."""
    return pixel_dummy(encoder, 1)


def pixel_dummy(encoder: nn.Module, frames: int = 2) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    """A clip of black frames, of the size that the encoder's configuration names."""
    sides, channels = sizes_of(encoder.config, "image_size"), number_of(encoder.config, "num_channels", default=3)
    return (), {"pixel_values": black(encoder, frames, channels, sides[0], sides[-1])}
