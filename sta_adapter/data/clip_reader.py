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
        return self.pixel_limits({}) != (None, None)

    def read(self, parts: Sequence[Part], index: int = 0) -> list[Visual]:
        """Decode parts of type image and video; `index` is the sample's, for the shuffling, of each clip in its own way."""
        visuals: list[Visual] = []
        chance = np.random.default_rng((self.seed, index))
        for part in parts:
            try:
                visuals.append(self._visual(part, chance))
            except Exception as error:
                if isinstance(error, STAError) or (isinstance(error, OSError) and error.filename is not None):
                    raise  # it names the file
                raise DataError(
                    f"{part[part['type']]!r} can't be read as {part['type']}: {reason_of(error)}"
                ) from error
            held = sum(visual.pixels.size for visual in visuals) // 3
            if held > KEPT_PIXELS:
                raise DataError(
                    f"the sample's clips and pictures have {held} pixels so far, more than the {KEPT_PIXELS} that are held at "
                    "once; take fewer or smaller ones (nframes, max_frames, max_pixels)."
                )
        return visuals

    def _visual(self, part: Part, chance: np.random.Generator) -> Visual:
        is_image = part["type"] == "image"
        limits = (part.get("min_pixels"), part.get("max_pixels")) if is_image else self.pixel_limits(part)
        resized = limits != (None, None)
        if is_image:
            return Visual("image", self.fit(read_image(part["image"]), *limits), resized=resized)
        frames, _, metadata = self._clip(part, (lambda frames: self.fit(frames, *limits)) if resized else None)
        if self.frame_order == "reversed":
            frames = frames[::-1].copy()
        elif self.frame_order == "shuffled":
            frames = frames[chance.permutation(len(frames))]
        times = metadata.for_transformers()
        if pad := -len(frames) % self.temporal_patch:
            frames = np.concatenate([frames, frames[-1:].repeat(pad, axis=0)])
            times["frames_indices"] = times["frames_indices"] + times["frames_indices"][-1:] * pad
        return Visual("video", frames, times, resized)

    def _clip(self, part: Part, resize: Callable[[NDArray[np.uint8]], NDArray[np.uint8]] | None) -> Clip:
        settings = self._own_settings(part)
        by_time = settings.nframes is None
        threads = None if get_worker_info() is None else 1  # workers are processes enough
        read: Callable[..., Clip] = partial(read_clip, backend=settings.backend, threads=threads)
        if "folder_fps" in part:
            read = partial(read_folder, rate=part["folder_fps"])
        return read(
            part["video"],
            fps=settings.fps if by_time else None,
            num_frames=settings.nframes,
            min_frames=min(settings.min_frames, settings.max_frames),
            max_frames=settings.max_frames,
            start=part.get("video_start"),
            end=part.get("video_end"),
            resize=resize,
            segments=self.segments and not by_time,
        )

    def settings_of(self, parts: Iterable[Part]) -> tuple[FrameSettings, bool]:
        """The settings in force for clips, those of the reader where clips set their own, each otherwise; and whether they do so."""
        found = {self._own_settings(part) for part in parts if part["type"] == "video"}
        differ = len(found) > 1
        return self.settings if differ or not found else found.pop(), differ

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

    def fit(self, frames: NDArray[np.uint8], low: int | None, high: int | None) -> NDArray[np.uint8]:
        """Frames (T, H, W, 3) of an area between two limits in pixels; None is no limit."""
        if low is None and high is None:
            return frames
        return fit_frames(frames, factor=self.factor, min_pixels=low or 1, max_pixels=high or math.inf)

    def pixel_limits(self, part: Part) -> tuple[int | None, int | None]:
        """Limits of a frame's area: the part's own, to which those of the settings give way, if a token's size is known."""
        area, tokens = self.factor**2, (self.settings.min_tokens, self.settings.max_tokens)
        low, high = (limit * area if limit and area > 1 else None for limit in tokens)
        low, high = part.get("min_pixels", low), part.get("max_pixels", high)
        if low is None or high is None:
            return low, high
        if "min_pixels" in part and "max_pixels" not in part:
            return low, max(low, high)
        return min(low, high), high
