"""Which frames to take: one rule over presentation timestamps, the same for every decoding backend."""

import math
import sys
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np
from numpy.typing import NDArray

from sta_adapter.errors import ConfigError, VideoError

ROUNDING = 1e-3
"""Seconds by which containers round timestamps (Matroska counts milliseconds); no frame is missed or doubled for it."""

MOST_TARGETS = 1_000_000
"""Target times that are looked up at most; more, from an enormous rate or number of frames, are spread as that many."""


def check_number(name: str, value: object, *, above: float, inclusive: bool = False) -> None:
    """Raise a ConfigError for what is no finite number above a bound."""
    bound = f"at least {above:g}" if inclusive else f"above {above:g}"
    if not _is_finite(value) or value < above or (value == above and not inclusive):
        raise ConfigError(f"{name} is {value!r}; expected a finite number {bound}. Change {name} or leave it out.")


def _is_finite(value: object) -> TypeGuard[float]:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond what a float holds
        return False


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or not 1 <= value <= sys.maxsize:
        raise ConfigError(f"{name} is {value!r}; expected a whole number of at least 1. Change {name} or leave it out.")


@dataclass(frozen=True)
class Sampling:
    """What part of a video is wanted, and how densely. See `sta_adapter.video.read_clip` for the fields."""

    fps: float | None = None
    num_frames: int | None = None
    min_frames: int = 4
    max_frames: int = 32
    start: float | None = None
    end: float | None = None
    segments: bool = False

    def __post_init__(self) -> None:
        if self.fps is not None and self.num_frames is not None:
            raise ConfigError(f"fps={self.fps!r} and num_frames={self.num_frames!r} are both given; pass one of them.")
        if self.fps is not None:
            check_number("fps", self.fps, above=0)
        if self.num_frames is not None:
            _check_count("num_frames", self.num_frames)
        _check_count("min_frames", self.min_frames)
        _check_count("max_frames", self.max_frames)
        if self.min_frames > self.max_frames:
            raise ConfigError(
                f"min_frames={self.min_frames} is above max_frames={self.max_frames}; raise max_frames or lower "
                "min_frames, or pass num_frames for an exact number."
            )
        if self.start is not None:
            check_number("start", self.start, above=0, inclusive=True)
        if self.end is not None:
            check_number("end", self.end, above=0)
        if self.end is not None and self.end <= self.first:
            raise ConfigError(
                f"start={self.first:g} and end={self.end:g} leave no time between them; give end > start."
            )

    @property
    def first(self) -> float:
        """The first second wanted."""
        return 0.0 if self.start is None else float(self.start)

    def plan(self, seconds: float) -> tuple[int, float, int]:
        """How many target times `seconds` of video get, how far apart, and how many distinct frames are due at least."""
        if self.num_frames is not None:
            return self.num_frames, seconds / self.num_frames, self.num_frames
        fps = 1.0 if self.fps is None else float(self.fps)
        natural = seconds * fps - ROUNDING  # 4.0001 seconds at one frame a second are four frames, not five
        if natural > self.max_frames:
            return self.max_frames, seconds / self.max_frames, self.min_frames
        count = max(1, math.ceil(natural))
        if count < self.min_frames:
            return self.min_frames, seconds / self.min_frames, self.min_frames
        return count, min(1.0 / fps, seconds), self.min_frames  # one over a tiny rate is infinite


def choose_frames(times: NDArray[np.float64], duration: float, sampling: Sampling) -> NDArray[np.int64]:
    """Pick frames by time: for each target time the frame shown then, that is the last one that began by it.

    Target times are `start`, `start + step`, ... below `end`; only frames that begin within [start, end) are taken.
    A frame is never taken twice: where targets meet in one frame (a video slower than the sampling, a still picture
    held for long) it counts once, and frames farthest in time from those taken are added until the least number is
    reached or the range has no more.

    Args:
        times: (F,) seconds at which the frames begin, ascending, the first one at 0.
        duration: Seconds from the first frame's beginning to the last frame's end.
        sampling: What is wanted.

    Returns:
        (T,) ascending indices into `times`.
    """
    start, end = sampling.first, duration if sampling.end is None else min(float(sampling.end), duration)
    inside = np.flatnonzero((times >= start) & (times < end))
    if inside.size == 0:
        nearest = ", ".join(f"{t:g}" for t in times[np.abs(times - start).argsort()[:2]])
        raise VideoError(
            f"no frame begins from {start:g} s (included) to {end if sampling.end is None else sampling.end:g} s "
            f"(excluded); the video lasts {duration:g} s and the frames nearest to the start begin at {nearest} s. "
            "Choose start and end within it."
        )
    count, step, least = sampling.plan(end - start)
    if sampling.segments and sampling.num_frames is not None:
        chosen = _middles(inside, len(times), sampling.num_frames)
    else:
        if count > MOST_TARGETS:
            count, step = MOST_TARGETS, step * (count / MOST_TARGETS)
        gaps = np.diff(times)
        slack = min(ROUNDING, float(np.median(gaps)) / 4) if gaps.size else 0.0
        shown = np.searchsorted(times, start + step * np.arange(count) + slack, side="right") - 1
        chosen = np.unique(shown.clip(inside[0], inside[-1]))
    missing = min(least, inside.size) - chosen.size
    return np.sort(np.append(chosen, _farthest(times, inside, chosen, missing))).astype(np.int64)


def _middles(inside: NDArray[np.int64], total: int, count: int) -> NDArray[np.int64]:
    """The middle frame of each of `count` segments, as InternVL's family chooses them: by the frames' numbers, not their times."""
    first, last = int(inside[0]), min(int(inside[-1]) + 1, total - 1)
    size = (last - first) / count
    numbers = first + size / 2 + np.round(size * np.arange(min(count, MOST_TARGETS)))
    return np.unique(numbers.astype(np.int64).clip(inside[0], inside[-1]))


def _farthest(
    times: NDArray[np.float64], inside: NDArray[np.int64], chosen: NDArray[np.int64], missing: int
) -> list[int]:
    """`missing` more frames of `inside`, each the one that is farthest in time from all taken before it."""
    right = np.searchsorted(chosen, inside).clip(max=chosen.size - 1)
    neighbours = times[chosen[[(right - 1).clip(min=0), right]]]
    distance = np.abs(times[inside] - neighbours).min(axis=0)
    distance[np.isin(inside, chosen)] = -1.0
    more: list[int] = []
    for _ in range(missing):
        place = int(np.argmax(distance))
        more.append(int(inside[place]))
        distance = np.minimum(distance, np.abs(times[inside] - times[inside[place]]))
        distance[place] = -1.0
    return more
