"""Pixels for InternVideo2.5-Chat: frames and pictures brought to one size, pictures cut into tiles.

The same numbers as the published preprocessing: Pillow's bicubic resizing, and the colours of ImageNet.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sta_adapter.errors import DataError, MissingExtraError
from sta_adapter.internvideo.visuals import MEAN, STD, Frames, Picture

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(eq=False)
class InternVideo2_5ImageProcessor:
    """Makes rows (3, size, size) of frames and pictures."""

    model_input_names = ("pixel_values", "clip_lengths")

    image_size: int = 448  # side of a row in pixels
    min_tiles: int = 1  # tiles that a picture is cut into at least
    max_tiles: int = 6  # and at most, but for the whole picture that comes with several
    use_thumbnail: bool = True  # whether it does
    merged_frames: int = 4  # rows whose tokens are merged; clips and pictures are filled up to a multiple of it
    frame_segments: bool = True  # whether N frames of a file are the middles of N segments, as in training

    def to_dict(self) -> dict[str, object]:
        """The settings, as they are saved."""
        return {"image_processor_type": type(self).__name__, **vars(self)}

    def preprocess(
        self, images: Sequence[Picture] | None = None, videos: Sequence[Frames] | None = None
    ) -> dict[str, Tensor]:
        """Rows of all pictures, then of all clips, with `clip_lengths` as the model takes them."""
        rows = [(self.picture(image), False) for image in images or ()] + [(self.clip(c), True) for c in videos or ()]
        if not rows:
            raise DataError("neither pictures nor clips were given.")
        lengths = [length for made, whole in rows for length in ([len(made)] if whole else [1] * len(made))]
        return {"pixel_values": torch.cat([made for made, _ in rows]), "clip_lengths": torch.tensor(lengths)}

    def clip(self, frames: Frames) -> Tensor:
        """Rows (F, 3, size, size) of a clip, filled up with its last frame; a DataError if it is none."""
        pictures = [_picture(frame) for frame in frames]
        if not pictures:
            raise DataError("a clip has no frame; expected at least one.")
        return self._rows([_resized(picture, self.image_size, self.image_size) for picture in pictures])

    def picture(self, image: Picture) -> Tensor:
        """Rows (F, 3, size, size) of a picture: its tiles, then the whole of it, filled up with the last of them."""
        picture = _picture(image)
        columns, rows = self.grid(*picture.size)
        size = self.image_size
        large = _resized(picture, columns * size, rows * size)
        corners = [(column * size, row * size) for row in range(rows) for column in range(columns)]
        tiles = [large.crop((left, top, left + size, top + size)) for left, top in corners]
        if self.use_thumbnail and len(tiles) > 1:
            tiles.append(_resized(picture, size, size))
        return self._rows(tiles)

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Columns and rows of tiles for a picture: those nearest to its shape; of several, the more the larger it is."""
        most = range(1, self.max_tiles + 1)
        sides = ((c, r) for n in most for c in range(1, n + 1) for r in range(1, n + 1))
        known = {(c, r) for c, r in sides if self.min_tiles <= c * r <= self.max_tiles}
        best, least = (1, 1), float("inf")
        for columns, rows in sorted(known, key=lambda pair: pair[0] * pair[1]):
            difference = abs(width / height - columns / rows)
            large = width * height > 0.5 * self.image_size**2 * columns * rows
            if difference < least or (difference == least and large):
                best, least = (columns, rows), difference
        return best

    def _rows(self, pictures: list[Image]) -> Tensor:
        pictures = [*pictures, *pictures[-1:] * (-len(pictures) % self.merged_frames)]
        stacked = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
        pixels = stacked.permute(0, 3, 1, 2).to(torch.float32).div_(255)
        return pixels.sub_(torch.tensor(MEAN).view(3, 1, 1)).div_(torch.tensor(STD).view(3, 1, 1)).contiguous()


def _picture(image: Picture) -> Image:
    """Pillow's picture, in RGB."""
    if importlib.util.find_spec("PIL") is None:
        raise MissingExtraError("pictures and frames are resized by Pillow: pip install 'sta-adapter[train]'")
    from PIL import Image as pillow

    if isinstance(image, pillow.Image):
        return image.convert("RGB")
    pixels = np.asarray(image)
    if pixels.ndim == 3 and pixels.shape[0] == 3 and pixels.shape[2] != 3:
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or 0 in pixels.shape:
        raise DataError(
            f"a frame or picture is of shape {pixels.shape} and type {pixels.dtype}; expected (height, width, 3) or (3, height, "
            "width) in uint8. A clip is (frames, height, width, 3): tiles of frames are not taken."
        )
    return pillow.fromarray(np.ascontiguousarray(pixels))


def _resized(picture: Image, width: int, height: int) -> Image:
    from PIL.Image import Resampling

    return picture.resize((width, height), Resampling.BICUBIC)
