"""`write_clip`: frames into a video file."""

import math
import os
import uuid
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from sta_adapter.errors import ConfigError, VideoError
from sta_adapter.video.frame_table import import_av

ENCODERS: dict[str, dict[str, str]] = {
    "libx264": {"crf": "18", "mbtree": "0"},  # whose macroblock trees read memory that nobody has written
    "libopenh264": {},
    "mpeg4": {"qmin": "2", "qmax": "4"},
}
"""Encoders in order of preference, with settings for good quality."""


def write_clip(path: str | os.PathLike[str], frames: NDArray[np.uint8], fps: float) -> Path:
    """Write frames as a video file: H.264 where PyAV has an encoder for it, else MPEG-4, in 4:2:0 colour.

    The file appears under its name when it is whole, and not before.

    Args:
        path: The file to write; its suffix (.mp4, .mkv, .mov) says the container. The folder must exist.
        frames: (T, H, W, 3), uint8, RGB, H and W even.
        fps: Frames a second.

    Returns:
        The path.

    Raises:
        ConfigError: Frames or `fps` are not as above.
        VideoError: The file can't be written.
    """
    frames, rate, path = _checked_frames(frames), _checked_rate(fps), Path(path)
    av = import_av()
    part = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.part{path.suffix}")
    try:
        _encode(av, part, frames, rate)
        part.replace(path)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise VideoError(
            f"{path} can't be written ({error}). Check that the folder exists, has room and lets you write, and that "
            "the suffix names a container for H.264, such as .mp4."
        ) from error
    finally:
        part.unlink(missing_ok=True)
    return path


def _checked_frames(frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    frames = np.asarray(frames)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or frames.size == 0:
        raise ConfigError(
            f"frames are {frames.dtype} of shape {frames.shape}; expected uint8 (T, H, W, 3) with at least one frame."
        )
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise ConfigError(
            f"frames are {width}x{height} pixels; H.264 as every player reads it needs an even width and height. "
            "Crop or pad them by one pixel."
        )
    return frames


def _checked_rate(fps: float) -> Fraction:
    is_number = isinstance(fps, (int, float, Fraction, np.integer, np.floating)) and not isinstance(fps, bool)
    if not is_number or not math.isfinite(fps) or not 0.001 <= fps <= 1000:
        raise ConfigError(f"fps is {fps!r}; expected a number from 0.001 to 1000.")
    return Fraction(fps).limit_denominator(1001)


def _encode(av: ModuleType, path: Path, frames: NDArray[np.uint8], rate: Fraction) -> None:
    encoder = next(name for name in ENCODERS if name in av.codecs_available)
    with av.open(str(path.absolute()), "w") as container:
        stream = container.add_stream(encoder, rate=rate, options=dict(ENCODERS[encoder]))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1  # the same file on every machine, however many cores it has
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = number, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
