"""The clips and images of a sample, decoded, in the size and order that the processor gets.

No tokenizer and no model is known here, so that it can work in a process of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import get_worker_info

from sta_adapter.compatibility.processors import Processor, Sizes, visual_part
from sta_adapter.data.bad_sample import reason_of
from sta_adapter.data.message import Part, Visual
from sta_adapter.errors import DataError, STAError
from sta_adapter.video import Clip, read_clip, read_folder
from sta_adapter.video.budget import KEPT_PIXELS
from sta_adapter.video.frame_settings import BY_TIME, LIMITS, FrameSettings
from sta_adapter.video.image import read_image
from sta_adapter.video.resize import fit_frames

__all__ = ["ClipReader"]


@dataclass(frozen=True)
class ClipReader:
    """Decodes the visual parts of a sample."""

    settings: FrameSettings  # how clips are sampled
    factor: int = 1  # edge length of a visual token in pixels; 1 where it isn't known
    temporal_patch: int = 1  # how many frames the model merges into one; clips are filled up to a multiple of it
    frame_order: str = "ordered"  # "ordered", "shuffled" or "reversed"
    seed: int = 0  # of the shuffling
    segments: bool = False  # whether a number of frames means the middles of as many segments, see `read_clip`

    @classmethod
    def of(
        cls, processor: Processor | None, settings: FrameSettings, frame_order: str = "ordered", seed: int = 0
    ) -> ClipReader:
        """The reader for a model's processor; None for reading without one."""
        part = None if processor is None else visual_part(processor)
        sizes = Sizes(1, 1, False) if part is None else Sizes.of(part)
        segments = bool(getattr(part, "frame_segments", False))
        return cls(settings, sizes.factor, sizes.frames, frame_order, seed, segments)

    @property
    def sizes_frames(self) -> bool:
        """Whether clips without limits of their own get their final size here, and not from the processor."""
        return any(limit is not None for limit in self._pixel_limits({}))

    def read(self, parts: Sequence[Part], index: int = 0) -> list[Visual]:
        """Decode parts of type image and video; `index` is the sample's, for the shuffling, of each clip in its own way."""
        visuals: list[Visual] = []
        chance = np.random.default_rng((self.seed, index))
        for part in parts:
            visuals.append(self._read(part, chance))
            held = sum(visual.pixels.size for visual in visuals) // 3
            if held > KEPT_PIXELS:
                raise DataError(
                    f"the sample's clips and pictures have {held} pixels so far, more than the {KEPT_PIXELS} that are held at "
                    "once; take fewer or smaller ones (nframes, max_frames, max_pixels)."
                )
        return visuals

    def _read(self, part: Part, chance: np.random.Generator) -> Visual:
        """One of them; an error that doesn't name the file gets its name."""
        try:
            return self._visual(part, chance)
        except Exception as error:
            if isinstance(error, STAError) or (isinstance(error, OSError) and error.filename is not None):
                raise
            raise DataError(f"{part[part['type']]!r} can't be read as {part['type']}: {reason_of(error)}") from error

    def _visual(self, part: Part, chance: np.random.Generator) -> Visual:
        if part["type"] == "image":
            pixels, low, high = read_image(part["image"]), part.get("min_pixels"), part.get("max_pixels")
            if low is not None or high is not None:
                pixels = fit_frames(pixels, factor=self.factor, min_pixels=low or 1, max_pixels=high or math.inf)
            return Visual("image", pixels, resized=low is not None or high is not None)
        low, high = self._pixel_limits(part)
        resized = low is not None or high is not None

        def resize(frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
            return fit_frames(frames, factor=self.factor, min_pixels=low or 1, max_pixels=high or math.inf)

        frames, _, metadata = self._clip(part, resize if resized else None)
        frames = frames[self._order(len(frames), chance)]
        times = metadata.for_transformers()
        if pad := -len(frames) % self.temporal_patch:
            frames = np.concatenate([frames, frames[-1:].repeat(pad, axis=0)])
            times["frames_indices"] = times["frames_indices"] + times["frames_indices"][-1:] * pad
        return Visual("video", frames, times, resized)

    def _clip(self, part: Part, resize: Callable[[NDArray[np.uint8]], NDArray[np.uint8]] | None) -> Clip:
        settings = self._own_settings(part)
        least = min(settings.min_frames, settings.max_frames)
        by_time = settings.nframes is None
        threads = None if get_worker_info() is None else 1  # workers are processes enough
        read: Callable[..., Clip] = partial(read_clip, backend=settings.backend, threads=threads)
        if "folder_fps" in part:
            read = partial(read_folder, rate=part["folder_fps"])
        return read(
            part["video"],
            fps=settings.fps if by_time else None,
            num_frames=settings.nframes,
            min_frames=least,
            max_frames=settings.max_frames,
            start=part.get("video_start"),
            end=part.get("video_end"),
            resize=resize,
            segments=self.segments and not by_time,
        )

    def settings_of(self, parts: Iterable[Part]) -> FrameSettings:
        """The settings in force for clips, where all of them set their own alike; else those of the reader."""
        found = self._settings_of_clips(parts)
        return found.pop() if len(found) == 1 else self.settings

    def differ(self, parts: Iterable[Part]) -> bool:
        """Whether clips set their own, each otherwise."""
        return len(self._settings_of_clips(parts)) > 1

    def _settings_of_clips(self, parts: Iterable[Part]) -> set[FrameSettings]:
        return {self._own_settings(part) for part in parts if part["type"] == "video"}

    def _own_settings(self, part: Part) -> FrameSettings:
        """The settings for one clip: what it sets itself comes first, and the settings' other limit gives way to it."""
        own: dict[str, Any] = {name: part[name] for name in (*BY_TIME, "nframes") if name in part}
        if any(name in part for name in BY_TIME):
            own["nframes"] = None
        area = self.factor**2
        for limit in ("min", "max"):
            pixels = part.get(f"{limit}_pixels")
            if pixels is not None and area > 1:
                own[f"{limit}_tokens"] = max(1, round(pixels / area))
        for least, most in LIMITS:
            low, high = own.get(least), own.get(most)
            other = getattr(self.settings, most if high is None else least)
            if low is not None and high is None and other is not None:
                own[most] = max(low, other)
            if high is not None and low is None and other is not None:
                own[least] = min(high, other)
        return replace(self.settings, **own)

    def _order(self, count: int, chance: np.random.Generator) -> NDArray[np.int64] | slice:
        if self.frame_order == "reversed":
            return np.arange(count)[::-1]
        if self.frame_order == "shuffled":
            return chance.permutation(count)
        return slice(None)  # spares a copy

    def _pixel_limits(self, part: Part) -> tuple[int | None, int | None]:
        """Limits of a frame's area: the part's own, to which those of the settings give way, if a token's size is known."""
        area = self.factor**2
        low, high = self.settings.min_tokens, self.settings.max_tokens
        known = area > 1
        high_pixels = part.get("max_pixels", high * area if known and high else None)
        low_pixels = part.get("min_pixels", low * area if known and low else None)
        if low_pixels is None or high_pixels is None:
            return low_pixels, high_pixels
        if "min_pixels" in part and "max_pixels" not in part:
            return low_pixels, max(low_pixels, high_pixels)
        return min(low_pixels, high_pixels), high_pixels
