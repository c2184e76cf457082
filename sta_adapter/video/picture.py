"""A decoded frame as it is shown: in RGB, on white, turned and mirrored as its file says."""

from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from sta_adapter.errors import VideoError
from sta_adapter.video.decoder_parity import has_alpha
from sta_adapter.video.image import on_white

if TYPE_CHECKING:
    from av.sidedata.sidedata import SideData
    from av.video.frame import VideoFrame
    from av.video.reformatter import VideoReformatter

Pixels = NDArray[np.uint8]
Matrix = tuple[int, int, int, int]
"""The upper left 2x2 part of a display matrix, in FFmpeg's 16.16 fixed point."""

BT709, BT601, FULL = 1, 5, 2  # FFmpeg's numbers of matrices, and of the range from 0 to 255

UNTURNED: Matrix = (1 << 16, 0, 0, 1 << 16)
"""Of pictures shown as they are stored."""


def rgb(frame: "VideoFrame", converter: "VideoReformatter") -> Pixels:
    """A frame's pixels (h, w, 3) as they are stored, on white where it is transparent, as pictures are."""
    alpha = has_alpha(frame)
    shown = converter.reformat(frame, format="rgba" if alpha else "rgb24", **_colour(frame))
    picture = np.asarray(shown.to_ndarray(), np.uint8)
    if not alpha:
        return picture
    from PIL import Image

    return np.asarray(on_white(Image.fromarray(picture)))


def _colour(frame: "VideoFrame") -> dict[str, int]:
    """What a frame in YUV says of its colour, for its conversion: PyAV before 17 takes BT.601 in limited range for all of them."""
    shape = frame.format
    if shape.is_rgb or len(shape.components) < 3:
        return {}
    space, wide = int(frame.colorspace), shape.name.startswith("yuvj")
    # it looks at the matrix only where the source's differs from the target's, which RGB has none of
    other = BT601 if space != BT601 else BT709
    return {
        "src_colorspace": space,
        "src_color_range": FULL if wide else int(frame.color_range),
        "dst_colorspace": other,
        "dst_color_range": FULL,
    }


def display_matrix(frame: "VideoFrame") -> Matrix:
    """How the frame is to be turned and mirrored; a VideoError where it is and PyAV doesn't tell how."""
    try:
        data = cast("SideData | None", frame.side_data.get("DISPLAYMATRIX"))
    except ValueError as error:  # PyAV gives up at side data that it doesn't know, such as a camera's EXIF
        if frame.rotation:
            raise VideoError("its pictures are to be turned in a way that PyAV doesn't tell; convert it.") from error
        return UNTURNED
    if data is None:
        return UNTURNED
    a, b, _, c, d = np.frombuffer(bytes(data), dtype=np.int32)[:5].tolist()
    return (a, b, c, d)


def is_transposed(matrix: Matrix) -> bool:
    """Whether rows become columns on the way upright."""
    a, _, c, _ = matrix
    return abs(c) > abs(a)


def upright(picture: Pixels, matrix: Matrix) -> Pixels:
    """Turn (and mirror, if the file says so) a stored picture (h, w, 3) into the one shown (height, width, 3)."""
    a, b, c, d = matrix
    if is_transposed(matrix):
        found: Pixels = picture.swapaxes(0, 1)[:: -1 if b < 0 else 1, :: -1 if c < 0 else 1]
        return found
    return picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
