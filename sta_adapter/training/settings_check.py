"""Whether a run's settings go with its data and with what is measured; whether they go with each other says `TrainingConfig`."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

from sta_adapter.config import STAConfig
from sta_adapter.data.clip_reader import ClipReader
from sta_adapter.data.dataset import VideoDataset
from sta_adapter.data.message import Part
from sta_adapter.data.stream import StreamDataset
from sta_adapter.errors import ConfigError, DataError
from sta_adapter.training.config import DEFAULTS, OF_SAMPLES, TrainingConfig
from sta_adapter.video.frame_settings import FrameSettings

logger = logging.getLogger(__name__)


def check_settings(
    config: TrainingConfig,
    stages: Sequence[TrainingConfig],
    dataset: VideoDataset | StreamDataset,
    eval_dataset: VideoDataset | StreamDataset | None,
    eval_fn: Callable[..., object] | None,
) -> None:
    """Refuse at once, and not when stage one has been trained, what can't be or has no effect in any stage.

    STA that would be trained on texts alone is a DataError.
    """
    if isinstance(eval_dataset, StreamDataset):
        raise ConfigError(
            "eval_data is a StreamDataset, which has no end; expected a VideoDataset, or the name of the file or shards."
        )
    if isinstance(dataset, StreamDataset) and not all(stage.max_steps for stage in stages):
        raise ConfigError(
            "the data are tar shards, whose number of samples is not known: set the number of steps, "
            "max_steps (--max-steps 1000)."
        )
    if eval_fn is not None and eval_dataset is not None:
        raise ConfigError("eval_data has no effect together with eval_fn; leave one of them out.")
    for stage in stages:
        _check_evaluation(stage, evaluated=eval_fn is not None or eval_dataset is not None)
    if not isinstance(dataset, StreamDataset) and config.shuffle_buffer != DEFAULTS["shuffle_buffer"]:
        raise ConfigError("shuffle_buffer applies to tar shards and has no effect on a file of samples; leave it out.")
    if config.sta and isinstance(dataset, VideoDataset) and not any(s.visuals for s in dataset.samples):
        raise DataError(
            f"none of the {len(dataset)} samples has a clip or a picture, so STA, which is in the vision encoder, would learn nothing: "
            "give each its 'video', or train LoRA alone (sta: false)."
        )
    made_with = {name: getattr(dataset.encoder, name) for name in OF_SAMPLES}
    if isinstance(dataset, StreamDataset):
        made_with["shuffle_buffer"] = dataset.shuffle
    for name, found in made_with.items():
        asked, default = getattr(config, name), FrameSettings() if name == "frames" else DEFAULTS[name]
        if asked not in (default, found):
            raise ConfigError(
                f"{name} is {asked!r}, but the data set was made with {found!r}; make it with the same value, or leave "
                f"{name} out."
            )


def check_single_frames(dataset: VideoDataset | StreamDataset, sta: STAConfig) -> None:
    """Tell of samples whose clips are all of a single step, over which STA has nothing to attend.

    Raises:
        DataError: STA passes such by, so that nothing of it would be trained.
    """
    parts = [part for sample in dataset.samples for part in sample.visuals] if isinstance(dataset, VideoDataset) else []
    if not parts or any(_most_steps(dataset.encoder.reader, part) > 1 for part in parts):
        return
    merged = dataset.encoder.reader.temporal_patch
    found = f"each of {len(parts)} clips and pictures is a single step in time" + (
        f" (of {merged} frames, which the model merges)" if merged > 1 else ""
    )
    found += ", over which STA has nothing to attend"
    if not sta.single_frames:
        raise DataError(f"{found}, and with single_frames: false nothing of it would be trained; take more frames.")
    logger.warning("%s. Take more frames (frames.nframes, frames.max_frames), and frames as one video.", found)


def check_sizes(reader: ClipReader) -> None:
    """Refuse limits of a frame's tokens where a token's size isn't known, and the processor brings all frames to one."""
    if reader.factor > 1:
        return
    for name in ("min_tokens", "max_tokens"):
        asked = getattr(reader.settings, name)
        if asked not in (None, getattr(FrameSettings(), name)):
            raise ConfigError(
                f"frames.{name} is {asked}, and has no effect with this model, whose processor resizes all frames to one size; leave it out."
            )


def _most_steps(reader: ClipReader, part: Part) -> int:
    """Temporal steps that a clip or picture has at most."""
    settings, _ = reader.settings_of([part])
    frames = 1 if part["type"] == "image" else settings.nframes or settings.max_frames
    return math.ceil(frames / reader.temporal_patch)


def _check_evaluation(stage: TrainingConfig, *, evaluated: bool) -> None:
    if stage.early_stopping is not None and not evaluated:
        raise ConfigError("early_stopping counts evaluations, and there are none: pass eval_data (--eval-data FILE).")
    if stage.early_stopping is not None and not stage.keep_best:
        raise ConfigError("early_stopping has no effect with keep_best: false; leave one of them out.")
    if not evaluated:
        if stage.eval_steps is not None:
            raise ConfigError(
                f"eval_steps is {stage.eval_steps}, but there is nothing to evaluate: give samples to measure on "
                "(eval_data, --eval-data) or an eval_fn, or leave it out."
            )
    elif stage.keep_best and stage.save_steps not in (DEFAULTS["save_steps"], stage.eval_steps):
        raise ConfigError(
            f"save_steps {stage.save_steps} has no effect while the best evaluation is kept, as there is a checkpoint for "
            "each evaluation: leave it out (eval_steps says when), or set keep_best: false."
        )
