"""Text and decoded clips through a model's processor: with arrays, never paths, and without any sampling of its own."""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Mapping
from functools import cache

import numpy as np
import torch

from sta_adapter.compatibility import processors
from sta_adapter.compatibility.processors import Processor
from sta_adapter.compatibility.releases import transformers_release
from sta_adapter.data.clip_batches import PER_TOKEN, put_together, row_lengths, split_unequal, takes_one_kind
from sta_adapter.data.message import Visual
from sta_adapter.errors import DataError
from sta_adapter.video.reader import ClipTimes
from sta_adapter.video.resize import resize_frames

logger = logging.getLogger(__name__)
Encoded = dict[str, torch.Tensor]
NAMES = ("second_per_grid_ts", "video_second_per_grid")
"""What processors call the seconds from one temporal step of a clip to the next."""


def process(processor: Processor, text: str, visuals: list[Visual]) -> Encoded:
    """The tensors of a text with its clips and images; several calls where the processor takes them only one by one."""
    pieces = [_process_once(processor, words, group) for words, group in split_unequal(processor, text, visuals)]
    return pieces[0] if len(pieces) == 1 else join(pieces)


def join(pieces: list[Encoded]) -> Encoded:
    """Put pieces together: what has one value a token along the sequence (0 where a piece has none), the rest along clips."""
    joined: Encoded = {}
    if sum("batch_num_images" in piece for piece in pieces) > 1:
        raise DataError(
            "this model reads several pictures of a sample otherwise than each by itself, and here they stand in several turns "
            "or between clips of unequal lengths. Put them into one turn, in front of the clips."
        )
    for key in dict.fromkeys(key for piece in pieces for key in piece):
        if key in PER_TOKEN:
            joined[key] = torch.cat([piece.get(key, torch.zeros_like(piece["input_ids"])) for piece in pieces])
        else:
            parts = [piece[key] for piece in pieces if key in piece]
            joined[key] = put_together(key, parts) if len(parts) > 1 else parts[0]  # pixels are large: spares a copy
    return joined


def require_placeholders(processor: Processor, text: str, visuals: list[Visual]) -> None:
    """Refuse a text that has not one placeholder for each clip and image."""
    for kind in ("image", "video"):
        expected = sum(visual.kind == kind for visual in visuals)
        token = processors.placeholder(processor, kind, required=expected > 0)
        if token is not None and text.count(token) != expected:
            raise DataError(
                f"the rendered text has {text.count(token)} times {token}, expected {expected}, one for each {kind}. "
                "Either the chat template has no place for it, or the sample's text contains the token itself."
            )


def _process_once(processor: Processor, text: str, visuals: list[Visual]) -> Encoded:
    clips = [visual for visual in visuals if visual.kind == "video"]
    pictures = [visual for visual in visuals if visual.kind == "image"]
    if clips and pictures and takes_one_kind(processor):
        raise DataError("this model takes either pictures or clips in one sample, not both; leave one of them out.")
    part = processors.visual_part(processor)
    sizes = processors.Sizes.of(part)
    sampled = bool(clips) and processors.takes_clips(processor)
    if sampled and not processors.keeps_clips(processor):
        raise DataError(
            f"clips can't be put through {type(part).__name__} as this release of transformers has it: it doesn't take frames "
            "that are chosen already together with their times. Use transformers 4.57 or newer for this model."
        )
    if any(visual.resized for visual in visuals) and not sizes.packs:
        raise DataError(
            "this model's processor brings all frames to one size, and cuts pictures by its own; leave out min_pixels and max_pixels."
        )
    clips, settings = sized(processor, clips)
    if sampled and hasattr(part, "do_sample_frames"):  # since 4.53; none samples before
        settings["do_sample_frames"] = False
        if all(clip.metadata for clip in clips):
            settings["video_metadata"] = [clip.metadata for clip in clips]
    out = processor(
        text=[text],
        images=[picture.pixels[0] for picture in pictures] or None,
        videos=[clip.pixels.transpose(0, 3, 1, 2) for clip in clips] or None,
        add_special_tokens=False,
        return_tensors="pt",
        **({"videos_kwargs": settings} if settings and clips else {}),
    )
    # transformers 4.49 to 4.51 leave the seconds a list
    encoded = {
        key: torch.as_tensor(value) for key, value in out.items() if isinstance(value, torch.Tensor) or key in NAMES
    }
    encoded.pop("attention_mask", None)
    encoded.update({key: encoded[key][0] for key in PER_TOKEN if key in encoded})
    _check_frames(sizes.frames, encoded, clips)
    _check_sizes(part, "clip", encoded.get("video_grid_thw"), clips)
    _check_sizes(getattr(processor, "image_processor", None), "picture", encoded.get("image_grid_thw"), pictures)
    steps = [step_seconds(clip.metadata, sizes.frames) for clip in clips if clip.metadata is not None]
    if len(steps) == len(clips):
        encoded.update(told_seconds(encoded, steps))
    return {**encoded, **row_lengths(processor, encoded, visuals)}


def sized(processor: Processor, clips: list[Visual]) -> tuple[list[Visual], dict[str, object]]:
    """Clips of which all or none have their final size, and the settings by which the video processor keeps it."""
    settings: dict[str, object] = {}
    if any(clip.resized for clip in clips):  # the switch holds for all, so that the others get their sizes here as well
        clips = [clip if clip.resized else _resized_by(processor, clip) for clip in clips]
        settings["do_resize"] = False
    return clips, settings | _cap(processor)


def _cap(processor: Processor) -> dict[str, object]:
    """Qwen3-VL's cap of a frame's pixels: off unless its processor says otherwise, whatever transformers' default becomes."""
    own = getattr(getattr(processor, "video_processor", None), "cap_pixels_per_frame", False)  # False: it has no cap
    return {"cap_pixels_per_frame": False} if own is None else {}


def _resized_by(processor: Processor, clip: Visual) -> Visual:
    """A clip in the size that the processor would give to it, which may go by the number of its frames."""
    part = processors.visual_part(processor)
    frames = clip.pixels.transpose(0, 3, 1, 2)
    names = inspect.signature(part.preprocess).parameters
    options = _cap(processor) | ({"images": None} if "images" in names else {})
    options |= {"do_sample_frames": False} if hasattr(part, "do_sample_frames") else {}
    found = part.preprocess(videos=[frames], return_tensors="pt", **options) if "videos" in names else {}
    if "video_grid_thw" not in found:
        raise DataError(
            "a clip of this sample has min_pixels or max_pixels and another has none, and the size that "
            f"{type(part).__name__} would give to it can't be known; give limits to all of them or to none."
        )
    height, width = (int(size) * part.patch_size for size in found["video_grid_thw"][0, 1:])
    return dataclasses.replace(clip, pixels=resize_frames(clip.pixels, height, width), resized=True)


def _check_frames(step: int, encoded: Encoded, clips: list[Visual]) -> None:
    """The model, which merges `step` frames into one, must see the frames that were decoded, no fewer."""
    grid = encoded.get("video_grid_thw")
    if grid is None:
        return
    seen, given = [int(t) * step for t in grid[:, 0]], [len(clip.pixels) for clip in clips]
    if len(seen) == len(given) and any(t not in (n, n + -n % step) for t, n in zip(seen, given, strict=True)):
        raise DataError(f"the processor made {seen} frames of {given} decoded ones; expected it not to sample again.")


def _check_sizes(part: object, name: str, grids: torch.Tensor | None, visuals: list[Visual]) -> None:
    """What has limits of its own must keep its size, whatever limits the processor has."""
    edge = getattr(part, "patch_size", 0)
    for visual, (_, rows, columns) in zip(visuals, () if grids is None else grids.tolist(), strict=False):
        height, width = visual.pixels.shape[1:3]
        if visual.resized and (height, width) != (rows * edge, columns * edge):
            raise DataError(
                f"min_pixels or max_pixels make a {name} {width}x{height}, and the processor, by its own limits, "
                f"{columns * edge}x{rows * edge}; give such as it takes."
            )


def temporal_patch(processor: Processor) -> int:
    """How many frames the model merges into one."""
    return processors.Sizes.of(processors.visual_part(processor)).frames


def step_seconds(metadata: ClipTimes, frames: int) -> float:
    """Seconds from one temporal step of so many frames to the next, on average; 1 where there is but one frame."""
    times = np.array(metadata["frames_indices"]) / metadata["fps"]
    begins = times[::frames]
    if len(begins) > 1:
        return float(begins[-1] - begins[0]) / (len(begins) - 1)
    return float(times[-1] - times[0]) / (len(times) - 1) * frames if times[-1] > times[0] else 1.0


def told_seconds(encoded: Mapping[str, torch.Tensor], steps: list[float]) -> dict[str, torch.Tensor]:
    """The tensors of a processor that tell seconds of temporal steps, with the right ones: `steps`, one a clip."""
    names = [name for name in NAMES if name in encoded]
    if names and any(step != round(step) for step in steps) and (4, 52) <= transformers_release() < (5, 18):
        _say_that_they_are_rounded()
    return {name: torch.tensor(steps, dtype=torch.float32) for name in names}


@cache
def _say_that_they_are_rounded() -> None:
    """Once: models of transformers 4.52 to 5.17 cut the seconds of a step down to a whole number."""
    import transformers

    logger.warning(
        "transformers %s rounds the seconds of a temporal step down to whole ones in Qwen2.5-VL's positions, so that "
        "steps of less than a second fall together, unless the model numbers text as it was trained: the commands do so, "
        "in Python sta_adapter.text_positions.use_positions(model) does. Or use transformers 5.18 or newer.",
        transformers.__version__,
    )
