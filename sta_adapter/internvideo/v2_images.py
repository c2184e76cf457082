"""Pixels for InternVideo2-Chat: frames and pictures brought to the encoder's size, and the HD variant's tiles."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from sta_adapter.data.clip_batches import put_together
from sta_adapter.errors import DataError
from sta_adapter.internvideo.visuals import MEAN, STD, Frames, Picture


class InternVideo2ImageProcessor:
    """Makes clips (n, T, 3, size, size): one of a clip, and with tiles the parts of its picture and then the whole.

    Attributes:
        image_size: side of a frame in pixels.
        tiles: columns and rows that the HD variant cuts frames into; None for one clip of the middle of the picture.
    """

    model_input_names = ("pixel_values_videos", "pixel_values")
    do_center_crop = True  # as transformers calls it: clips lack the sides of the picture, or are parts of it

    def __init__(self, image_size: int = 224, tiles: tuple[int, int] | None = None) -> None:
        self.image_size = image_size
        self.tiles = None if tiles is None else (int(tiles[0]), int(tiles[1]))

    def to_dict(self) -> dict[str, object]:
        """The settings, as they are saved."""
        return {"image_processor_type": type(self).__name__, **vars(self)}

    def clip(self, frames: Frames) -> Tensor:
        """Clips (n, T, 3, size, size) of one; a DataError if it is none."""
        pixels = _frames(frames).float()
        if self.tiles is None:
            return self._normalised(self._middle(pixels / 255))[None]
        columns, rows = self.tiles
        size = self.image_size
        large = F.interpolate(pixels, (rows * size, columns * size), mode="bicubic", align_corners=False)
        large = self._normalised(large / 255)
        whole = F.interpolate(large, (size, size), mode="bicubic", align_corners=False)
        parts = rearrange(large, "t c (rows h) (columns w) -> (rows columns) t c h w", rows=rows, columns=columns)
        return torch.cat([parts, whole[None]])

    def picture(self, image: Picture) -> Tensor:
        """(n, 3, size, size) of a picture."""
        return self.clip([image])[:, 0]

    def preprocess(self, images: Sequence[Picture] = (), videos: Sequence[Frames] = ()) -> dict[str, Tensor]:
        """`pixel_values` (n, 3, size, size) of all pictures, and `pixel_values_videos` (n, T, 3, size, size) of all clips.

        Clips of fewer frames than the longest are filled up with frames of NaN.
        """
        found: dict[str, Tensor] = {}
        if videos:
            found["pixel_values_videos"] = put_together("pixel_values_videos", [self.clip(clip) for clip in videos])
        if images:
            found["pixel_values"] = torch.cat([self.picture(picture) for picture in images])
        return found

    @property
    def per_clip(self) -> int:
        """Clips that are made of one."""
        return 1 if self.tiles is None else self.tiles[0] * self.tiles[1] + 1

    def _middle(self, pixels: Tensor) -> Tensor:
        """The shorter side scaled to the encoder's size, and the middle of the longer one."""
        height, width = pixels.shape[2:]
        size, short = self.image_size, min(pixels.shape[2:])
        shape = [size if side == short else int(size * side / short) for side in (height, width)]
        pixels = F.interpolate(pixels, shape, mode="bicubic", antialias=True, align_corners=False)
        top, left = (round((side - size) / 2) for side in shape)
        return pixels[..., top : top + size, left : left + size]

    def _normalised(self, pixels: Tensor) -> Tensor:
        return (pixels - pixels.new_tensor(MEAN)[:, None, None]) / pixels.new_tensor(STD)[:, None, None]


def _frames(given: Frames) -> Tensor:
    """(T, 3, H, W)."""
    if isinstance(given, (list, tuple)):
        if not given:
            raise DataError("a clip has no frame; expected at least one.")
        pictures = [np.asarray(one.convert("RGB")) if hasattr(one, "convert") else np.asarray(one) for one in given]
        if len({picture.shape for picture in pictures}) > 1:
            raise DataError(f"frames of a clip have the shapes {sorted({p.shape for p in pictures})}; expected one.")
        given = np.stack(pictures)
    frames = given if isinstance(given, Tensor) else torch.from_numpy(np.ascontiguousarray(given))
    if frames.dim() == 4 and frames.shape[1] != 3 and frames.shape[-1] == 3:
        frames = frames.permute(0, 3, 1, 2)
    if frames.dim() != 4 or frames.shape[1] != 3 or frames.dtype != torch.uint8 or not frames.numel():
        raise DataError(
            f"frames have the shape {tuple(frames.shape)} and dtype {frames.dtype}; expected uint8 (frames, height, width, 3) or "
            "(frames, 3, height, width), at least one."
        )
    return frames
