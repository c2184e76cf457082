"""Whether a run's settings go with its data and with what is measured; whether they go with each other says `TrainingConfig`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sta_adapter.data.dataset import VideoDataset
from sta_adapter.data.stream import StreamDataset
from sta_adapter.errors import ConfigError, DataError
from sta_adapter.training.config import DEFAULTS, OF_SAMPLES, TrainingConfig
from sta_adapter.video.frame_settings import FrameSettings


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
            "what is measured on is a StreamDataset, which has no end; expected a VideoDataset, or the name of the file or shards."
        )
    if isinstance(dataset, StreamDataset) and not all(stage.max_steps for stage in stages):
        raise ConfigError(
            "the data are tar shards, of which nobody knows how many samples they hold: say how many steps to train, with "
            "max_steps (--max-steps 1000)."
        )
    if eval_fn is not None and eval_dataset is not None:
        raise ConfigError("eval_data has no effect beside eval_fn, which is measured instead; leave one of them out.")
    for stage in stages:
        _check_evaluation(stage, evaluated=eval_fn is not None or eval_dataset is not None)
    if not isinstance(dataset, StreamDataset) and config.shuffle_buffer != DEFAULTS["shuffle_buffer"]:
        raise ConfigError("shuffle_buffer is of tar shards, and has no effect on a file of samples; leave it out.")
    if config.sta and isinstance(dataset, VideoDataset) and not any(s.visuals for s in dataset.samples):
        raise DataError(
            f"none of the {len(dataset)} samples has a clip or a picture, so that STA, which is in the vision encoder, would learn nothing: "
            "give each its 'video', or train LoRA alone (sta: false)."
        )
    made_with = {name: getattr(dataset.encoder, name) for name in OF_SAMPLES}
    if isinstance(dataset, StreamDataset):
        made_with["shuffle_buffer"] = dataset.shuffle
    for name, found in made_with.items():
        asked, default = getattr(config, name), FrameSettings() if name == "frames" else DEFAULTS[name]
        if asked not in (default, found):
            raise ConfigError(
                f"{name} is {asked!r}, but the data set was made with {found!r}, which holds; make it with that, or leave "
                f"{name} out."
            )


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
