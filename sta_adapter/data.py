"""Samples on disk to batches for a model.

Public: `FrameSettings`, `VideoDataset`; and from their own modules `Collator`, `Sample`, `BadSample`, `read_samples`. Clips are
decoded by `sta_adapter.video.read_clip` and reach the processor as arrays, so the model sees exactly the frames that were
decoded, on every version of transformers. A sample that can't be used is a `BadSample` in the data set: counted and logged by
the training, or an error if asked for, but never replaced.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from sta_adapter.collator import Collator
from sta_adapter.encoding import Encoded, Visual, encode, encode_prompt, temporal_patch
from sta_adapter.errors import ConfigError, DataError, STAError
from sta_adapter.frames import fit_frames, read_image
from sta_adapter.samples import BadSample, Sample, read_samples
from sta_adapter.video import Clip, read_clip

__all__ = ["BadSample", "Collator", "FrameSettings", "Sample", "VideoDataset", "fit_frames", "read_samples"]

FRAME_ORDERS = ("ordered", "shuffled", "reversed")


@dataclass(frozen=True)
class FrameSettings:
    """How clips are sampled where a sample doesn't say it itself. The defaults are those of the published recipe."""

    fps: float = 1.0  # frames a second
    nframes: int | None = None  # that many frames of every clip instead
    min_frames: int = 4
    max_frames: int = 32
    min_tokens: int | None = 16  # visual tokens a frame; with None for both limits the processor's own size rule holds
    max_tokens: int | None = 256
    backend: str = "auto"  # what decodes; see read_clip


class VideoDataset(Dataset):
    """Samples of a JSON Lines file, decoded and encoded when asked for.

    Args:
        samples: the file, or samples read before.
        processor: the model's processor.
        frames: how clips are sampled.
        prompts: leave the last answer out, for evaluation.
        frame_order: "ordered"; "shuffled" and "reversed" are controls that take the order of time away.
        seed: of the shuffling, which is the same in every run.
        on_bad_sample: "skip" gives a `BadSample` in place of an unusable one, "error" raises.
        max_length: samples of more tokens are bad samples.
        cache: keep what was encoded in memory, so that later epochs and runs needn't decode.
    """

    def __init__(
        self,
        samples: str | Path | Sequence[Sample],
        processor: Any,
        *,
        frames: FrameSettings | None = None,
        prompts: bool = False,
        frame_order: str = "ordered",
        seed: int = 0,
        on_bad_sample: str = "skip",
        max_length: int | None = None,
        cache: bool = False,
    ) -> None:
        if frame_order not in FRAME_ORDERS:
            raise ConfigError(f"frame_order is {frame_order!r}, expected one of {', '.join(FRAME_ORDERS)}.")
        if on_bad_sample not in ("skip", "error"):
            raise ConfigError(f"on_bad_sample is {on_bad_sample!r}, expected 'skip' or 'error'.")
        self.samples = read_samples(samples) if isinstance(samples, (str, Path)) else list(samples)
        self.processor = processor
        self.frames = frames or FrameSettings()
        self.prompts = prompts
        self.frame_order = frame_order
        self.seed = seed
        self.on_bad_sample = on_bad_sample
        self.max_length = max_length
        self._cache: dict[int, Encoded | BadSample] | None = {} if cache else None
        self._prompts: dict[tuple[str, int], VideoDataset] = {}

    @property
    def cached(self) -> bool:
        """Whether encoded samples are kept in this process's memory."""
        return self._cache is not None

    def __len__(self) -> int:
        """Number of samples, bad ones included."""
        return len(self.samples)

    def __getitem__(self, index: int) -> Encoded | BadSample:
        """Tensors of one sample, see `sta_adapter.encoding.encode`."""
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        item = self._load(index)
        if self._cache is not None:
            self._cache[index] = item
        return item

    def as_prompts(self, frame_order: str = "ordered", seed: int = 0) -> VideoDataset:
        """The same samples without their last answers, for evaluation; made once if this data set keeps what it encodes."""
        if self.prompts and (self.frame_order, self.seed) == (frame_order, seed):
            return self
        made = self._prompts.get((frame_order, seed))
        if made is None:
            made = VideoDataset(
                self.samples,
                self.processor,
                frames=self.frames,
                prompts=True,
                frame_order=frame_order,
                seed=seed,
                on_bad_sample=self.on_bad_sample,
                max_length=self.max_length,
                cache=self.cached,
            )
        if self.cached:
            self._prompts[frame_order, seed] = made
        return made

    def digest(self) -> str:
        """Fingerprint of the samples' words and of their files' names (not of the folders that these lie in)."""
        found = hashlib.sha256()
        for sample in self.samples:
            for message in sample.messages:
                parts = [
                    part["text"] if part["type"] == "text" else Path(part[part["type"]]).name
                    for part in message["content"]
                ]
                found.update(json.dumps([message["role"], *parts]).encode())
        return found.hexdigest()

    def _load(self, index: int) -> Encoded | BadSample:
        sample = self.samples[index]
        try:
            encoded = self._encode(sample, index)
        except (STAError, OSError) as error:
            if self.on_bad_sample == "error":
                raise DataError(f"{sample.source}: {error}") from error
            return BadSample(sample.source, str(error))
        return encoded

    def _encode(self, sample: Sample, index: int) -> Encoded:
        messages = sample.prompt if self.prompts else sample.messages
        visuals = [
            [self._visual(part, index) for part in message["content"] if part["type"] != "text"] for message in messages
        ]
        encoded = (encode_prompt if self.prompts else encode)(self.processor, messages, visuals)
        length = len(encoded["input_ids"])
        if self.max_length is not None and length > self.max_length:
            raise DataError(
                f"{length} tokens, more than max_length {self.max_length}; take fewer frames or fewer tokens a frame."
            )
        return encoded

    def _visual(self, part: dict[str, Any], index: int) -> Visual:
        if part["type"] == "image":
            return Visual("image", read_image(part["image"]))
        frames, _, metadata = self._read(part)
        frames = np.ascontiguousarray(frames[self._order(len(frames), index)])
        low, high = self._pixel_limits(part)
        resized = low is not None or high is not None
        if resized:
            frames = fit_frames(frames, factor=self._factor(), min_pixels=low or 1, max_pixels=high or math.inf)
        times = metadata.for_transformers()
        if pad := -len(frames) % temporal_patch(self.processor):
            frames = np.concatenate([frames, frames[-1:].repeat(pad, axis=0)])
            times["frames_indices"] = times["frames_indices"] + times["frames_indices"][-1:] * pad
        return Visual("video", frames, times, resized)

    def _read(self, part: dict[str, Any]) -> Clip:
        nframes = part.get("nframes", None if "fps" in part else self.frames.nframes)
        rate: dict[str, Any] = {"num_frames": nframes}
        if nframes is None:
            rate = {
                "fps": part.get("fps", self.frames.fps),
                "min_frames": part.get("min_frames", self.frames.min_frames),
                "max_frames": part.get("max_frames", self.frames.max_frames),
            }
        start, end = part.get("video_start"), part.get("video_end")
        return read_clip(part["video"], start=start, end=end, backend=self.frames.backend, **rate)

    def _order(self, count: int, index: int) -> np.ndarray:
        if self.frame_order == "reversed":
            return np.arange(count)[::-1]
        if self.frame_order == "shuffled":
            return np.random.default_rng((self.seed, index)).permutation(count)
        return np.arange(count)

    def _factor(self) -> int:
        """Edge length in pixels of a visual token."""
        part = getattr(self.processor, "video_processor", None) or getattr(self.processor, "image_processor", None)
        return int((getattr(part, "patch_size", 1) or 1) * (getattr(part, "merge_size", 1) or 1))

    def _pixel_limits(self, part: dict[str, Any]) -> tuple[int | None, int | None]:
        """Limits of a frame's area: the part's own, else the settings', if the size of a token is known."""
        area = self._factor() ** 2
        low, high = self.frames.min_tokens, self.frames.max_tokens
        known = area > 1
        high_pixels = part.get("max_pixels", high * area if known and high else None)
        low_pixels = part.get("min_pixels", low * area if known and low else None)
        if low_pixels is not None and high_pixels is not None:
            low_pixels = min(low_pixels, high_pixels)
        return low_pixels, high_pixels
