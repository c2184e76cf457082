"""Two-stage training of STA, and of LoRA baselines without it.

Stage one trains STA alone; stage two trains STA and LoRA on the language model and the vision encoder. Calling `train`
again with the same arguments after a crash goes on from the last checkpoint, and ends with the weights of an
uninterrupted run.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from sta_adapter._lazy import importing
from sta_adapter.adapter.save import replace_files
from sta_adapter.compatibility.processors import Processor
from sta_adapter.config import STAConfig
from sta_adapter.data.dataset import VideoDataset
from sta_adapter.data.samples import mixed_samples, open_samples, require_no_folder, require_usable
from sta_adapter.data.shards import is_shards
from sta_adapter.data.stream import StreamDataset
from sta_adapter.distributed import is_rank_zero, on_rank_zero
from sta_adapter.errors import ConfigError
from sta_adapter.injection.fingerprint import fingerprint_start
from sta_adapter.injection.handle import STAHandle, get_sta
from sta_adapter.injection.inject import inject_sta
from sta_adapter.injection.registry import locate
from sta_adapter.requirements import require_reporters
from sta_adapter.training.checkpoints import SAMPLES_FILE, TRAINED_FILE, last_checkpoint
from sta_adapter.training.config import TrainingConfig
from sta_adapter.training.identity import claim, identity_of
from sta_adapter.training.settings_check import check_settings, check_single_frames, check_sizes
from sta_adapter.training.sole_run import sole_run

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from sta_adapter.training.stage import Stage, StageResult

STAGES = {"1": ("1",), "2": ("2",), "both": ("1", "2")}


@dataclass
class TrainingResult:
    """What a run made.

    Attributes:
        model: the trained model (a PeftModel after stage two), in eval mode.
        handle: its STA; None for a baseline.
        output_dir: where the adapter is.
        stages: for "1" and "2" each a dict: `history` (what was logged), `steps`, `seconds`, `trainable_parameters`,
            `bad_samples`.
        finished_before: the stages that an earlier call had finished, of which this one trained nothing.
    """

    model: nn.Module
    handle: STAHandle | None
    output_dir: Path
    stages: dict[str, StageResult] = field(default_factory=dict)
    finished_before: list[str] = field(default_factory=list)

    @property
    def history(self) -> list[dict[str, object]]:
        """The logs of all stages, one after the other."""
        return [{"stage": stage, **entry} for stage, result in self.stages.items() for entry in result["history"]]

    @property
    def bad_samples(self) -> list[str]:
        """Samples that were skipped, each with the reason."""
        return list(dict.fromkeys(sample for result in self.stages.values() for sample in result["bad_samples"]))


def train(
    model: nn.Module | STAHandle,
    data: str | Path | Sequence[str | Path] | VideoDataset | StreamDataset,
    *,
    output_dir: str | Path,
    stage: str = "both",
    config: TrainingConfig | None = None,
    processor: Processor | None = None,
    eval_data: str | Path | VideoDataset | StreamDataset | None = None,
    eval_fn: Callable[[nn.Module], dict[str, float]] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    overwrite: bool = False,
    progress: bool = True,
) -> TrainingResult:
    """Train STA in one or both stages; see `TrainingConfig` for the settings.

    Args:
        model: a full model, injected or not, or its handle. Only what trains changes.
        data: a file of samples, several of them, or tar shards (see `open_data`), or a data set made from them.
        output_dir: gets the adapter, and a folder `stage1` / `stage2` with checkpoints for each stage.
        stage: "1" (STA alone), "2" (STA and LoRA) or "both"; a baseline (`config.sta=False`) has stage "2" alone.
        config: settings; the published recipe by default.
        processor: the model's processor; needed where `data` or `eval_data` is a file.
        eval_data: what the loss is measured on during training, also from tar shards; not a stream.
        eval_fn: what is measured instead: from the model to names and values; the first is the score, more is better.
        callbacks: `transformers.TrainerCallback`s.
        overwrite: throw away what another run left in `output_dir`.
        progress: show a summary and bars.

    Ctrl-C and SIGTERM end the run after its step, with a checkpoint.

    Raises:
        TrainingStopped: that has happened; the same call goes on.
        DivergenceError: the loss is not finite, or has grown a hundredfold.
        ConfigError: settings that don't fit each other, or an `output_dir` with a run of other settings, or with another one at work.
        DataError: the data can't be read, or nothing in it is usable.
    """
    with importing("training needs more packages ({}): pip install 'sta-adapter[train]'."):
        from sta_adapter.training.contexts import kept_environment
        from sta_adapter.training.lora import require_effect
        from sta_adapter.training.stage import Stage, join_processes
        from sta_adapter.training.watch import Signals
    join_processes()
    config, folder = config or TrainingConfig(), Path(output_dir)
    require_reporters(config.report_to)
    names = stage_names(stage, config)
    dataset = _opened(data, processor, config)
    eval_dataset = None if eval_data is None else _opened(eval_data, processor, config, stream=False)
    signals = Signals(_tell) if progress and is_rank_zero() else Signals()
    of_all = (dataset, eval_dataset, eval_fn, signals, callbacks, progress)
    parts = [Stage(name, config.for_stage(name), folder / f"stage{name}", *of_all) for name in names]
    check_settings(config, [part.config for part in parts], dataset, eval_dataset, eval_fn)
    check_sizes(dataset.encoder.reader)
    net, handle = (model.model, model) if isinstance(model, STAHandle) else (model, get_sta(model))
    if config.sta:
        check_single_frames(dataset, STAConfig.from_dict(config.sta_config) if handle is None else handle.config)
    if names[-1] == "2":
        require_effect(locate(net).backbone if handle is None else handle._injection.spec, parts[-1].config)
    result = TrainingResult(*_injected(net, handle, config), folder)
    start = fingerprint_start(result.model)
    with contextlib.ExitStack() as alone:
        on_rank_zero(lambda: alone.enter_context(sole_run(folder)))
        on_rank_zero(
            lambda: claim(folder, identity_of(stage, config, dataset, eval_dataset, start, result.model), overwrite)
        )
        with signals, kept_environment():
            _run(parts, result)
        on_rank_zero(lambda: _publish(parts[-1].folder, folder))
    result.model.eval()
    return result


def _run(parts: Sequence[Stage], result: TrainingResult) -> None:
    """Train the stages one after the other."""
    if len(parts) > 1:  # what stands on stage one needs it as it is
        parts[0].extends = last_checkpoint(parts[1].folder) is None
    for part in parts:
        if part.finished():
            result.finished_before.append(part.name)
        result.model, result.handle = part.prepare(result.model, result.handle)
        result.stages[part.name] = part.run(result.model, result.handle)
        if part.signals.received and part is not parts[-1]:
            raise part.stopped()


def stage_names(stage: str, config: TrainingConfig) -> tuple[str, ...]:
    """The stages of a run, in order; one that there is not, or that would train nothing, is refused."""
    if stage not in STAGES:
        raise ConfigError(f"stage is {stage!r}, expected one of {', '.join(map(repr, STAGES))}.")
    if not config.sta and stage != "2":
        raise ConfigError("without STA (sta: false) there is nothing to train in stage one; use stage '2'.")
    if stage != "2" and config.for_stage("1").sta_learning_rate == 0:
        raise ConfigError("sta_learning_rate 0 trains nothing in stage one; give it one above 0, or use stage '2'.")
    return STAGES[stage]


def _opened(
    data: str | Path | Sequence[str | Path] | VideoDataset | StreamDataset,
    processor: Processor | None,
    config: TrainingConfig,
    stream: bool = True,
) -> VideoDataset | StreamDataset:
    """Files as a data set; whatever else has samples is one already."""
    files = [data] if isinstance(data, (str, Path)) else data
    if not isinstance(files, (list, tuple)):
        return cast("VideoDataset | StreamDataset", files)
    if not all(isinstance(file, (str, Path)) for file in files):
        raise ConfigError(
            "data is a list of records, expected a file, several, or a data set: VideoDataset(records, processor)."
        )
    return open_data(files, processor, config, stream=stream)


def open_data(
    data: str | Path | Sequence[str | Path],
    processor: Processor | None,
    config: TrainingConfig,
    *,
    format: str | None = None,
    videos: str | Path | None = None,
    stream: bool = True,
    cache: str | Path | None = None,
) -> VideoDataset | StreamDataset:
    """The data set for a run's settings.

    Args:
        data: a file of samples, or several, each with a weight if it is to be another than 1 ("clips.jsonl:2" has its
            samples twice in an epoch); or tar shards, as a path, a glob or a brace pattern that ends in .tar.
        processor: the model's processor.
        config: the settings.
        format: of the records; None recognises each by its keys.
        videos: the folder that relative paths start from, for a file of samples.
        stream: read shards on and on, to train; else they are looked up like a file's samples, each once, to measure.
        cache: a folder that keeps encoded samples on disk, for later epochs and runs.

    Raises:
        ConfigError: there is no processor, or `videos` was given for shards.
        DataError: the file or the shards can't be read.
    """
    if processor is None:
        raise ConfigError("the data is a file, so pass processor=AutoProcessor.from_pretrained(...) as well.")
    files = [data] if isinstance(data, (str, Path)) else list(data)
    how = config.of_samples()
    alone = len(files) == 1 and is_shards(files[0])
    if stream and alone:
        require_no_folder(videos)
        mixing, seed = config.shuffle_buffer, config.seed
        return StreamDataset(files[0], processor, format=format, cache=cache, shuffle=mixing, seed=seed, **how)
    read = partial(open_samples, files[0]) if alone else partial(mixed_samples, files, seed=config.seed)
    samples = read(format=format, videos=videos, on_bad_sample=config.on_bad_sample)
    return VideoDataset(require_usable(samples), processor, cache=cache or False, **how)


def _tell(text: str) -> None:
    sys.stderr.write(f"\n{text}\n")


def _injected(model: nn.Module, handle: STAHandle | None, config: TrainingConfig) -> tuple[nn.Module, STAHandle | None]:
    """The model and its STA, injected now if it wasn't; the seed makes a repeated run start from the same weights."""
    if not config.sta:
        if handle is not None:
            raise ConfigError("the settings say sta: false, but the model has STA; call handle.remove() first.")
        return model, None
    if handle is None:
        torch.manual_seed(config.seed)
        handle = inject_sta(model, STAConfig.from_dict(config.sta_config))
    else:
        asked = STAConfig.from_dict(config.sta_config).with_defaults(handle._injection.spec.defaults)
        wrong = [name for name in config.sta_config if getattr(asked, name) != getattr(handle.config, name)]
        if wrong:
            raise ConfigError(
                f"sta_config.{wrong[0]} is {getattr(asked, wrong[0])!r}, but the model has STA with "
                f"{getattr(handle.config, wrong[0])!r} already, where it has no effect; leave it out, or start without that adapter."
            )
    return handle.model, handle


def _publish(stage_folder: Path, folder: Path) -> None:
    """Copy the last stage's adapter to where users look for it, all of it or nothing."""
    from sta_adapter.training.stage import RESULT_FILE

    others = (RESULT_FILE, SAMPLES_FILE, TRAINED_FILE)
    adapter = [file for file in stage_folder.iterdir() if file.is_file() and file.name not in others]
    replace_files(folder, {file.name: file.read_bytes() for file in adapter if not file.name.startswith(".")})
