"""`read_clip`: frames of a video file, sampled by time."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray

from sta_adapter.errors import VideoError
from sta_adapter.video.decoders import Resize, check_backend, check_threads, decode
from sta_adapter.video.frame_table import FrameTable, read_frame_table
from sta_adapter.video.sampling import Sampling, choose_frames

TICKS = 1_000_000
"""A second, counted as finely as any container's timestamps are worth."""


class ClipTimes(TypedDict):
    """The fields of transformers' `VideoMetadata`; frame i begins `frames_indices[i] / fps` seconds into the file."""

    total_num_frames: int
    fps: float
    width: int
    height: int
    duration: float
    video_backend: str
    frames_indices: list[int]


@dataclass(frozen=True)
class ClipMetadata:
    """Where a clip's frames come from."""

    path: Path
    total_frames: int  # of the file
    fps: float  # of the file, on average
    duration: float  # of the file in seconds
    width: int  # upright
    height: int
    rotation: int  # degrees counter-clockwise by which stored pictures were turned to be upright: 0, 90, 180 or 270
    backend: str
    reason: str  # why that backend: "first choice" or "asked for by name"
    indices: tuple[int, ...]  # of the clip's frames among the file's
    timestamps: tuple[float, ...]  # seconds at which the clip's frames begin

    def for_transformers(self) -> ClipTimes:
        """The fields of transformers' `VideoMetadata`: `VideoMetadata(**clip.metadata.for_transformers())`.

        transformers tells time by `frames_indices` over `fps`. Where the file's own numbers don't give the timestamps
        in that way (a variable frame rate), frames are numbered as in a file of a million a second.
        """
        rate, total, indices = self.fps, self.total_frames, list(self.indices)
        # to the bit, as times are rounded for prompts
        if [index / rate for index in indices] != list(self.timestamps):
            rate, total = float(TICKS), round(self.duration * TICKS)
            indices = [round(seconds * TICKS) for seconds in self.timestamps]
        return {
            "total_num_frames": total,
            "fps": rate,
            "width": self.width,
            "height": self.height,
            "duration": self.duration,
            "video_backend": self.backend,
            "frames_indices": indices,
        }


class Clip(NamedTuple):
    """Frames of a video: `frames, timestamps, metadata = read_clip(path)`."""

    frames: NDArray[np.uint8]
    """(T, H, W, 3), RGB, upright."""
    timestamps: NDArray[np.float64]
    """(T,) seconds from the file's first frame at which these frames begin."""
    metadata: ClipMetadata


def read_clip(
    path: str | os.PathLike[str],
    *,
    fps: float | None = None,
    num_frames: int | None = None,
    min_frames: int = 4,
    max_frames: int = 32,
    start: float | None = None,
    end: float | None = None,
    backend: str = "auto",
    threads: int | None = None,
    resize: Resize | None = None,
    segments: bool = False,
) -> Clip:
    """Read frames of a video file, sampled by time.

    Target times are `start`, `start + 1 / fps`, ... up to `end`; each gets the frame shown then. Only frames that begin
    within [start, end) are taken, and none twice, so a file (or range) with fewer frames than asked for gives fewer:
    a one-frame file gives one. The choice depends on the file's timestamps alone, so every backend returns the same
    frames, bit for bit: decord and torchcodec decline files that they would read differently than PyAV, or that are not
    known to be read alike.

    Of a file that is cut off, what is there can be read with an explicit `end`; reading past it is an error. Damage
    inside a file is an error where the decoder reports it; most decoders paint over small damage silently. Frames of more
    than 8192x4320 pixels, and more frames than about 3 GB, are refused before memory is taken for them.

    Args:
        path: A video file.
        fps: Frames a second, at least `min_frames` and at most `max_frames` in all (then evenly spaced). Default 1.
        num_frames: That many frames evenly spaced, instead of `fps`; `min_frames` and `max_frames` don't matter.
        min_frames: Fewest frames taken with `fps`, where the range has as many.
        max_frames: Most frames taken with `fps`.
        start: First second wanted, counted from the first frame.
        end: Second before which the wanted frames begin; past the file's end means up to it.
        backend: "auto" is PyAV, which takes the least time; or by name "decord", "pyav" or "torchcodec".
        threads: How many threads decode; None leaves it to the decoder. Where several processes read, 1 is the quickest.
        resize: Makes some frames (t, H, W, 3) into those that are kept, so that never all are there in their full size.
        segments: `num_frames` segments give the middle of each, counted in frames, as in InternVL's training; else
            their first.

    Raises:
        VideoError: The file is missing (then also a FileNotFoundError), no video, cut off or damaged where frames are
            wanted, or no frame begins within the range.
        ConfigError: An argument is out of range, or both `fps` and `num_frames` are given.
        BackendError: The backend asked for by name can't read this file.
        MissingExtraError: The backend asked for by name is not installed.
    """
    sampling = Sampling(fps, num_frames, min_frames, max_frames, start, end, segments)
    check_backend(backend)
    check_threads(threads)
    table = read_frame_table(path)
    _check_reach(table, sampling)
    try:
        indices = choose_frames(table.times, table.duration, sampling)
    except VideoError as error:
        raise VideoError(f"{table.path}: {error}") from error
    frames, used, reason = decode(table, indices, backend, int(threads or 0), resize)
    return Clip(frames, table.times[indices], _metadata(table, indices, used, reason))


def _metadata(table: FrameTable, indices: NDArray[np.int64], backend: str, reason: str) -> ClipMetadata:
    return ClipMetadata(
        path=table.path,
        total_frames=len(table.times),
        fps=len(table.times) / table.duration,
        duration=table.duration,
        width=table.width,
        height=table.height,
        rotation=table.rotation,
        backend=backend,
        reason=reason,
        indices=tuple(indices.tolist()),
        timestamps=tuple(table.times[indices].tolist()),
    )


def _check_reach(table: FrameTable, sampling: Sampling) -> None:
    reach = round(table.duration, 3)
    if not table.complete and (sampling.end is None or sampling.end > reach):
        raise VideoError(
            f"{table.path} is cut off or damaged: {len(table.times)} whole frames, up to {reach} s, can be read, and "
            f"frames up to {'the end' if sampling.end is None else f'{sampling.end:g} s'} are asked for. Get the whole "
            f"file, or pass end={reach} or less to read what is there."
        )
