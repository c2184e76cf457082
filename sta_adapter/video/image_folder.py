"""`read_folder`: pictures in the place of a video file."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sta_adapter.errors import VideoError
from sta_adapter.video.budget import check_kept
from sta_adapter.video.decoders import Resize
from sta_adapter.video.frame_table import VideoNotFoundError
from sta_adapter.video.image import natural_order, read_image
from sta_adapter.video.reader import Clip, ClipMetadata
from sta_adapter.video.sampling import Sampling, check_number, choose_frames

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".gif")
PathLike = str | os.PathLike[str]


def read_folder(
    path: PathLike | Sequence[PathLike], rate: float, *, resize: Resize | None = None, **sampling: Any
) -> Clip:
    """Frames of a clip that lies there as pictures, sampled by time as `read_clip` does.

    Args:
        path: The folder; its pictures' names tell their order, numbers by their size (2 before 10). They differ in their
            numbers alone, or have none. Hidden files don't count. Or the pictures themselves, in the order in which they are
            shown, wherever they lie; one may come twice.
        rate: Pictures a second.
        resize: As for `read_clip`.
        sampling: `fps`, `num_frames`, `min_frames`, `max_frames`, `start`, `end` of `read_clip`.

    Raises:
        VideoError: No folder, no picture in it or in the range, several sizes, or names that tell no order.
        ConfigError: `rate` or what says how to sample is out of range.
    """
    check_number("rate", rate, above=0)
    if isinstance(path, (str, os.PathLike)):
        folder = Path(path)
        return _clip(folder, "a folder of pictures", _pictures_of(folder), rate, resize, Sampling(**sampling))
    files = [Path(file) for file in path]
    if not files:
        raise VideoError("there is no picture that a clip could be made of.")
    if missing := next((file for file in files if not file.is_file()), None):
        raise VideoNotFoundError(
            f"{str(missing)!r}, one of {len(files)} pictures of a clip, is not there. Check the path."
        )
    return _clip(files[0], "a list of pictures", files, rate, resize, Sampling(**sampling))


def _pictures_of(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise VideoNotFoundError(
            f"{str(folder)!r} is no folder of pictures. Check the path, or the folder that it starts from."
        )
    files = [file for file in folder.iterdir() if file.suffix.lower() in ENDINGS and not file.name.startswith(".")]
    if not files:
        raise VideoError(f"{str(folder)!r} holds no picture; expected {', '.join(ENDINGS)}.")
    return _in_order(folder, files)


def _clip(
    source: Path, kind: str, files: Sequence[Path], rate: float, resize: Resize | None, sampling: Sampling
) -> Clip:
    times, duration = np.arange(len(files)) / rate, len(files) / rate
    indices = choose_frames(times, duration, sampling)
    frames, sizes = [], set()
    for index in indices:
        picture = read_image(files[index])
        sizes.add((picture.shape[2], picture.shape[1]))
        if len(sizes) > 1:
            told = ", ".join(f"{width}x{height}" for width, height in sorted(sizes))
            raise VideoError(f"{str(source)!r}: {kind} of several sizes: {told}; expected one.")
        frames.append(picture if resize is None else resize(picture))
        check_kept(source, len(indices), frames[0].shape[1] * frames[0].shape[2])
    ((width, height),) = sizes
    found, begins = tuple(indices.tolist()), tuple(times[indices].tolist())
    metadata = ClipMetadata(source, len(files), rate, duration, width, height, 0, "pillow", kind, found, begins)
    return Clip(np.concatenate(frames), times[indices], metadata)


def _in_order(folder: Path, files: list[Path]) -> list[Path]:
    """The pictures as their names tell.

    Several series among them (a film and its optical flow, a picture in two formats), and numbers that can be read in two ways, are errors.
    """
    series: dict[tuple[str, ...], Path] = {}
    for file in sorted(files):
        series.setdefault(tuple(re.split(r"\d+", file.stem.casefold())), file)
    if len(series) > 1 and any(len(words) > 1 for words in series):
        one, other, *_ = (file.name for file in series.values())
        raise VideoError(
            f"{str(folder)!r} holds pictures of several series, such as {one!r} and {other!r}, so their order can't be known; "
            "expected names that differ only in their numbers. Give each series a folder."
        )
    stems: dict[str, Path] = {}
    for file in files:
        if (twin := stems.setdefault(file.stem, file)) is not file:
            raise VideoError(f"{str(folder)!r} holds {twin.name!r} and {file.name!r}; expected each picture once.")
    found = sorted(files, key=natural_order)
    as_decimals = sorted(files, key=lambda file: (_decimals(file.stem), natural_order(file)))
    first, behind = next(
        (pair for pair in zip(found, as_decimals, strict=True) if pair[0] != pair[1]), (folder, folder)
    )
    if first != behind:
        raise VideoError(
            f"{str(folder)!r} holds {first.name!r} and {behind.name!r}, whose order depends on whether "
            "their numbers are whole or decimal; write all of them with the same number of digits behind the point."
        )
    return found


def _decimals(stem: str) -> list[tuple[str, int, str]]:
    """A name's words and numbers, in which a point between digits belongs to a number."""
    pieces = re.split(r"(\d+)(?:\.(\d+))?", stem.casefold())
    return [
        (word, int(whole or 0), (part or "").rstrip("0"))
        for word, whole, part in zip(pieces[::3], [*pieces[1::3], ""], [*pieces[2::3], ""], strict=True)
    ]
