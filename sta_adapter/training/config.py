"""What can be set about a training run, and the checks of it; the defaults are the published recipe."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sta_adapter._validate import shown, suggestion
from sta_adapter.adapter.lora_options import MAX_ALPHA, MAX_RANK
from sta_adapter.data.sample_encoder import DECODE_TIMEOUT
from sta_adapter.errors import ConfigError
from sta_adapter.training.yaml_file import read_yaml
from sta_adapter.video.frame_settings import BY_TIME, FrameSettings

CHOICES = {
    "schedule": ("cosine", "linear", "constant", "constant_with_warmup"),
    "precision": ("auto", "bf16", "fp16", "fp32"),
    "gradient_checkpointing": (False, True, "reentrant"),
    "lora_targets": ("all", "language"),
    "on_bad_sample": ("skip", "error"),
}
_ABOVE_ZERO = ("learning_rate", "epochs")  # at 0 nothing would be trained
_NOT_NEGATIVE = (  # all other numbers are at least 1
    *("sta_learning_rate", "weight_decay", "warmup", "max_grad_norm", "num_workers", "seed", "shuffle_buffer"),
    *("lora_dropout", "decode_timeout", "save_minutes"),
)
_AT_MOST = {  # a share; what NumPy takes; what a file of LoRA may say
    **{"warmup": 1, "seed": 2**32 - 1},
    **dict.fromkeys(("lora_rank", "lora_qkv_rank"), MAX_RANK),
    **dict.fromkeys(("lora_alpha", "lora_qkv_alpha"), int(MAX_ALPHA)),
}
_BELOW = {"lora_dropout": 1}
# of the whole run: both stages share model, STA and data
OF_THE_RUN = ("sta", "sta_config", "frames", "on_bad_sample", "max_length", "shuffle_buffer", "decode_timeout", "stage1", "stage2")  # fmt: skip
OF_SAMPLES = ("frames", "on_bad_sample", "max_length", "decode_timeout")  # what a data set is made with
DEVICE_BATCH_SIZE = 4  # at most, where it isn't set
# What may differ when an interrupted run is taken up again: it doesn't change the weights that come out (the last two: but
# for rounding).
HARMLESS = (
    *("save_steps", "save_minutes", "keep_checkpoints", "logging_steps", "num_workers", "decode_timeout", "report_to"),
    *("run_name", "device_batch_size", "gradient_checkpointing"),
)
LENGTH = ("epochs", "max_steps")  # what may be raised, to go on with a run that has ended


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of a run; `stage1` and `stage2` hold what differs in one stage, under the same names."""

    # optimisation
    learning_rate: float = 1e-4  # the highest of the schedule, of all that trains
    sta_learning_rate: float | None = None  # of STA's parameters; None: as learning_rate
    weight_decay: float = 0.0  # never on norms, biases and gamma
    schedule: str = "cosine"  # how the learning rate goes on after the warm-up
    warmup: float = 0.02  # share of all steps in which the learning rate rises from 0
    batch_size: int = 64  # clips a step, over all devices
    device_batch_size: int | None = None  # clips on one device at a time, the rest is accumulated; None: up to 4
    epochs: float = 1.0  # passes over the data; raised later, it extends a run
    max_steps: int | None = None  # instead of epochs; raised later, it extends a run
    max_grad_norm: float = 1.0  # longer gradients are shortened to it; 0: none is
    precision: str = "auto"  # auto: bf16 where CUDA supports it, else fp32
    gradient_checkpointing: bool | str = False  # True: less memory, more time; "reentrant" for the older kind
    seed: int = 0  # of fresh weights, the order of clips and dropout
    # what is trained
    sta: bool = True  # False: LoRA alone, the baseline
    sta_config: dict[str, object] = field(default_factory=dict)  # fields of STAConfig
    lora_targets: str = "all"  # all: language model and vision encoder; language: the language model only
    lora_rank: int = 16  # of all layers but attn.qkv
    lora_alpha: int = 16  # LoRA's update is scaled by alpha / rank
    lora_qkv_rank: int = 32  # of the vision encoder's attn.qkv
    lora_qkv_alpha: int = 32  # of the vision encoder's attn.qkv
    lora_dropout: float = 0.0  # share of LoRA's inputs that are dropped in training
    # data
    frames: FrameSettings = field(default_factory=FrameSettings)  # how clips are sampled, see below
    on_bad_sample: str = "skip"  # skip: count and name it; error: stop
    max_length: int | None = None  # tokens; longer samples are bad samples; None: no limit
    num_workers: int = 2  # processes that decode
    shuffle_buffer: int = 100  # tar shards: samples that each of them holds in memory to mix them
    decode_timeout: float | None = DECODE_TIMEOUT  # seconds for a sample's clips, else it is a bad one; None: no limit
    # bookkeeping
    logging_steps: int = 10  # steps from one log of loss and learning rate to the next; short runs log more often
    save_steps: int = 100  # steps from one checkpoint to the next, unless evaluations decide (keep_best)
    save_minutes: float | None = 15.0  # minutes without a checkpoint after which one is saved; None: never by time
    keep_checkpoints: int = 2  # how many stay, the newest and the best always
    eval_steps: int | None = None  # None: once at the end of each epoch, if there is something to evaluate
    keep_best: bool = True  # end with the checkpoint of the best evaluation, not the last, if there are evaluations
    early_stopping: int | None = None  # evaluations in a row without a better one that end the stage; None: any number
    report_to: str = "auto"  # auto (TensorBoard, if installed), none, all, or names: "tensorboard,wandb"
    run_name: str | None = None  # of the run, in what report_to names
    # per stage
    stage1: dict[str, object] = field(default_factory=dict)  # settings that hold in stage one only
    stage2: dict[str, object] = field(default_factory=dict)  # settings that hold in stage two only

    def __post_init__(self) -> None:
        """Check every value."""
        if not isinstance(self.frames, FrameSettings):
            raise ConfigError(f"frames is {shown(self.frames)}, expected settings of frames, such as fps.")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"{name} is {getattr(self, name)!r}, expected one of {', '.join(map(repr, allowed))}."
                )
        for entry in dataclasses.fields(self):
            _check_type(entry.name, str(entry.type), getattr(self, entry.name))
        self.device_batches()
        self._check_idle()
        for stage in ("stage1", "stage2"):
            if getattr(self, stage):
                _check_names(getattr(self, stage), stage)
                _check_effect(getattr(self, stage), stage)
                self.for_stage(stage[-1])

    def _check_idle(self) -> None:
        """Refuse settings that others leave without effect; a value that is the default is not known to be set."""
        sampling = [
            f"frames.{name}" for name in BY_TIME if getattr(self.frames, name) != getattr(FrameSettings(), name)
        ]
        qkv = ("lora_qkv_rank", "lora_qkv_alpha")
        rules: tuple[tuple[bool, Sequence[str], str], ...] = (
            (not self.sta, ("sta_config", "sta_learning_rate", "stage1"), "with sta: false, which trains LoRA alone"),
            (self.lora_targets == "language", qkv, "with lora_targets: language, as it is of the vision encoder"),
            (self.max_steps is not None, ("epochs",), "beside max_steps, which says how long to train"),
            (self.schedule == "constant", ("warmup",), "with schedule: constant; take constant_with_warmup"),
        )
        for idle, names, reason in rules:
            for name in names if idle else ():
                if getattr(self, name) != DEFAULTS[name] and getattr(self, name) != {}:
                    raise ConfigError(f"{name} has no effect {reason}; leave one of them out.")
        if sampling and self.frames.nframes is not None:
            raise ConfigError(f"{sampling[0]} has no effect beside frames.nframes; leave one of them out.")

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> TrainingConfig:
        """Make it from plain values, as YAML gives them.

        Raises:
            ConfigError: a name is unknown (the nearest known one is suggested) or a value doesn't fit.
        """
        _check_names(values)
        return cls(**_typed(values))

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: object) -> TrainingConfig:
        """Read it from a YAML file; `overrides` that are not None win over the file."""
        values = {**read_yaml(path), **{key: value for key, value in overrides.items() if value is not None}}
        try:
            return cls.from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    def to_dict(self) -> dict[str, object]:
        """Plain values, for JSON or YAML."""
        return dataclasses.asdict(self)

    def for_stage(self, stage: str) -> TrainingConfig:
        """The settings in force in stage "1" or "2"."""
        own = _typed(getattr(self, f"stage{stage}"))
        for name, other in (("max_steps", "epochs"), ("epochs", "max_steps")):
            if own.get(name) is not None and own.get(other) is None:  # how long to train, said for this stage
                own[other] = DEFAULTS[other]
        return dataclasses.replace(self, **{**own, "stage1": {}, "stage2": {}})

    def of_samples(self) -> dict[str, Any]:
        """What a data set is made with, by the names of its arguments."""
        return {name: getattr(self, name) for name in OF_SAMPLES}

    @property
    def length(self) -> dict[str, float | None]:
        """How long to train."""
        return {name: getattr(self, name) for name in LENGTH}

    def device_batches(self, processes: int = 1) -> tuple[int, int]:
        """How many clips a device takes at a time, and how many times for each step.

        Args:
            processes: that share `batch_size`.

        Raises:
            ConfigError: it doesn't divide.
        """
        share, rest = divmod(self.batch_size, processes)
        if rest:
            raise ConfigError(
                f"batch_size {self.batch_size} doesn't divide into {processes} processes; take a multiple of {processes}."
            )
        if self.device_batch_size is None:
            size = next(size for size in range(DEVICE_BATCH_SIZE, 0, -1) if share % size == 0)
            return size, share // size
        size = min(self.device_batch_size, share)
        if share % size:
            shared = "" if processes == 1 else f"; for each of {processes} processes it is {share}, which"
            raise ConfigError(
                f"batch_size {self.batch_size}{shared} is not a multiple of device_batch_size {size}. Change one of them, or "
                "leave device_batch_size out."
            )
        return size, share // size


DEFAULTS = {entry.name: entry.default for entry in dataclasses.fields(TrainingConfig)}


def _check_names(values: Mapping[str, object], where: str = "the settings", known: type = TrainingConfig) -> None:
    names = [entry.name for entry in dataclasses.fields(known)]
    for name in values:
        if name not in names:
            raise ConfigError(f"{where}: unknown setting {name!r}. {suggestion(name, names)}")


def _check_type(name: str, kind: str, value: object) -> None:
    """Refuse a value that is not of a field's type, or a number out of its range."""
    if value is None and kind.endswith("| None"):
        return
    if kind == "bool" and not isinstance(value, bool):
        raise ConfigError(f"{name} is {shown(value)}, expected true or false.")
    if kind.startswith("str") and not isinstance(value, str):
        raise ConfigError(f"{name} is {shown(value)}, expected a text.")
    if not kind.startswith(("int", "float")):
        return
    above = name in _ABOVE_ZERO
    whole, least = kind.startswith("int"), 0 if above or name in _NOT_NEGATIVE else 1
    most, below = _AT_MOST.get(name, sys.maxsize), _BELOW.get(name)
    if (
        not isinstance(value, int if whole else (int, float))
        or isinstance(value, bool)
        or not least <= value <= most
        or (above and value == 0)
        or (below is not None and value >= below)
    ):
        bounds = f"{'above' if above else 'of at least'} {least}" + (f", at most {most}" if name in _AT_MOST else "")
        bounds += "" if below is None else f", below {below}"
        raise ConfigError(f"{name} is {shown(value)}, expected a number {bounds}{', a whole one' if whole else ''}.")


def _check_effect(values: Mapping[str, object], stage: str) -> None:
    """Refuse what a stage of its own doesn't read."""
    for name in values:
        if name in OF_THE_RUN:
            raise ConfigError(
                f"{stage}: {name} has no effect there, as it is one for both stages; write it beside {stage}."
            )
        if stage == "stage1" and name.startswith("lora_"):
            raise ConfigError(
                f"{stage}: {name} has no effect there, as stage one trains STA alone; write it below stage2."
            )


def _typed(values: Mapping[str, object]) -> dict[str, Any]:
    """Bring plain values to the fields' types: `frames` to its class, and 1e-4, which YAML takes for a text, to a number."""
    typed: dict[str, Any] = dict(values)
    kinds = {entry.name: str(entry.type) for entry in dataclasses.fields(TrainingConfig)}
    for name, value in values.items():
        if isinstance(value, str) and kinds.get(name, "").startswith("float"):
            try:
                typed[name] = float(value)
            except ValueError as error:
                raise ConfigError(f"{name} is {value!r}, expected a number.") from error
    frames = values.get("frames")
    if isinstance(frames, Mapping):
        _check_names(frames, "frames", FrameSettings)
        typed["frames"] = FrameSettings(**frames)
    for name in ("sta_config", "stage1", "stage2"):
        if not isinstance(values.get(name, {}), Mapping):
            raise ConfigError(f"{name} is {values[name]!r}, expected settings below it.")
    return typed
