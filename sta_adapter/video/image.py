"""`read_image`: a picture as people see it, whatever its file keeps beside the pixels."""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sta_adapter.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_PIXELS = 2**26
"""Area of a picture that is decoded at most: 8192x8192."""

_TRANSPARENT = ("RGBA", "LA", "PA", "RGBa", "La")
_DEEP = ("I", "F")
HEIC = tuple(b"ftyp" + brand for brand in (b"heic", b"heix", b"heim", b"heis", b"mif1"))
"""How such a file begins, behind four bytes."""
_GIT_LFS = b"version https://git-lfs"  # how a pointer begins
_SIXTEEN_BITS = ("PNG", "PPM")  # what Pillow calls "I" is 16 bits wide in these files


def read_image(path: str | os.PathLike[str]) -> NDArray[np.uint8]:
    """A picture as `(1, H, W, 3)` uint8: turned as its EXIF data says, on white where it is transparent.

    16 bits a channel become 8. What is more than one picture (an animation, pages) or of a depth whose white isn't
    known (32 bits, floating point) is an error.

    Raises:
        DataError: no picture, damaged, more than one, too large, or of an unknown range of values.
        OSError: the file is not there, or must not be read.
    """
    from PIL import Image, ImageOps

    name = os.fspath(path)
    try:
        with Image.open(name) as image:
            _check(image, name)
            return np.array(_shown(ImageOps.exif_transpose(image), image.format))[None]
    except (DataError, FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Exception as error:  # whatever Pillow's many readers raise for damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        if is_pointer(name):
            raise DataError(
                f"{name!r} is a pointer of Git LFS in the place of a picture: run `git lfs pull` there."
            ) from error
        if _is_heic(name):
            raise DataError(
                f"{name!r} is a HEIC picture, as phones take them, which Pillow doesn't read. Save it as JPEG or PNG."
            ) from error
        raise DataError(
            f"{name!r} is not an image that can be read ({reason}). If it is a video, name it as one; else save it again."
        ) from error


def is_pointer(name: str | os.PathLike[str]) -> bool:
    """Whether a file is the few words that a data set cloned without Git LFS has in the place of it."""
    with open(name, "rb") as file:
        return file.read(len(_GIT_LFS)) == _GIT_LFS


def _is_heic(name: str) -> bool:
    with open(name, "rb") as file:
        return file.read(12)[4:] in HEIC


def natural_order(file: Path) -> tuple[list[tuple[int, str]], str]:
    """Sorting key by which frame_2 comes before frame_10; names that differ in case alone lie side by side."""
    pieces = re.split(r"(\d+)", file.name.casefold())
    return [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in pieces], file.name


def _check(image: "Image", name: str) -> None:
    """Refuse, before any pixel is decoded, what would be too large or is more than one picture."""
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise DataError(
            f"{name!r} is a picture of {width}x{height} pixels, and at most {MOST_PIXELS} are decoded. Save it smaller."
        )
    count = getattr(image, "n_frames", 1)
    if count > 1 and image.format != "MPO":  # phones keep another view of the same picture behind it
        raise DataError(
            f"{name!r} holds {count} pictures (an animation, or pages), expected one. Save the one you want, or "
            "write the animation as a video and name it as one."
        )


def _shown(image: "Image", kind: str | None) -> "Image":
    """The picture in RGB."""
    from PIL import Image

    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and kind in _SIXTEEN_BITS)
    if sixteen:
        wide = np.asarray(image).astype(np.int64)
        clear = image.info.get("transparency")
        grey = (wide * 255 + 32767) // 65535
        return Image.fromarray(np.where(wide == clear, 255, grey).astype(np.uint8)).convert("RGB")
    if image.mode in _DEEP:
        raise ValueError(
            f"its values have 32 bits, mode {image.mode!r}, whose black and white aren't known; expected 8 or 16 a channel"
        )
    if image.mode not in _TRANSPARENT and "transparency" not in image.info:
        return image.convert("RGB")
    return on_white(image.convert("RGBA"))


def on_white(above: "Image") -> "Image":
    """A picture in RGBA as it looks on white, in RGB."""
    from PIL import Image

    return Image.alpha_composite(Image.new("RGBA", above.size, "white"), above).convert("RGB")
