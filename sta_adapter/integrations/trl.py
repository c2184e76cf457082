"""STA in TRL's trainers, on clips that are decoded here.

TRL's own data code takes images alone; with these collators its trainers get
clips, read as everywhere in sta-adapter. Rows are what `sta-adapter convert-data --to trl` writes.
"""

from __future__ import annotations

import importlib
import json
import logging
import multiprocessing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, cast

import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from sta_adapter.compatibility.calls import parameter_names
from sta_adapter.compatibility.processors import Processor
from sta_adapter.compatibility.releases import incompatible, numbers, version
from sta_adapter.data.bad_sample import BadSample
from sta_adapter.data.chat_encoding import IGNORE, Loaded
from sta_adapter.data.chat_template import has_reasoning
from sta_adapter.data.collator import Collator
from sta_adapter.data.conversation import Sample, parse_sample
from sta_adapter.data.sample_encoder import SampleEncoder
from sta_adapter.data.visual_processing import Encoded
from sta_adapter.errors import CompatibilityError, ConfigError, DataError, MissingExtraError
from sta_adapter.injection.handle import STAHandle
from sta_adapter.integrations.callbacks import ReportBadClips, sta_callbacks
from sta_adapter.integrations.settings import Settings, prepare_model
from sta_adapter.video.frame_settings import FrameSettings

if TYPE_CHECKING:
    from peft import LoraConfig
    from typing_extensions import NotRequired

__all__ = ["PreferenceCollator", "Prepared", "VideoCollator", "prepare"]

Item = TypeVar("Item")
logger = logging.getLogger(__name__)

FIRST = (1, 1)  # release of TRL
TRAINERS: dict[str, dict[str, object]] = {  # what the trainer's config needs beside the user's own
    "sft": {"dataset_kwargs": {"skip_prepare_dataset": True}},
    "dpo": {},
    "grpo": {},
}
# settings of TRL's own data code, in whose place these collators stand: what changes nothing here, and what to do instead
IDLE: dict[str, tuple[tuple[object, ...], str]] = {
    "max_length": ((None,), "pass **prepared.config to it, and to prepare the length above which rows are left out"),
    "completion_only_loss": ((None, True), 'the answers alone are learnt; "loss": false in a message leaves one out'),
    "packing": ((False,), "leave it out"),
    "eval_packing": ((None, False), "leave it out"),
    "pad_to_multiple_of": ((None,), "leave it out"),
}


class VideoCollator:
    """Rows with messages to one batch, the clips decoded and the answers' tokens labelled.

    Args:
        processor: the model's processor.
        frames: how clips are sampled where a row doesn't say it; the published recipe's by default.
        max_length: rows of more tokens are bad ones.
        on_bad_sample: "skip" leaves a row out whose clip can't be read, and counts it; "error" raises. A batch of bad
            rows alone is an error always.
        folder: what relative paths start from.
    """

    def __init__(
        self,
        processor: Processor,
        *,
        frames: FrameSettings | None = None,
        max_length: int | None = None,
        on_bad_sample: str = "skip",
        folder: str | Path = ".",
    ) -> None:
        self.encoder = SampleEncoder(
            processor, frames or FrameSettings(), on_bad_sample=on_bad_sample, max_length=max_length
        )
        self.folder = folder
        self._collate = Collator.of(processor, on_bad_sample=on_bad_sample)
        self._bad, self._good = multiprocessing.Value("q"), multiprocessing.Value("q")  # workers count too

    def counts(self) -> tuple[int, int]:
        """Bad and good rows so far, of this process and its workers."""
        return self._bad.value, self._good.value

    def __call__(self, rows: Sequence[Mapping[str, object]]) -> dict[str, torch.Tensor]:
        """A batch of tensors, as the model's forward takes them.

        Raises:
            DataError: a row is no sample; no row of the batch can be used; or, if asked for, a clip can't be read.
        """
        return self._padded(self._usable([self.encode(row) for row in rows]))

    def encode(self, row: Mapping[str, object]) -> Any:
        """Tensors of one row (of DPO, of both its conversations), or a `BadSample`."""
        return self.encoder.load(self._sample(row))

    def _sample(self, row: Mapping[str, object], **changed: object) -> Sample:
        record = {key: value for key, value in {**row, **changed}.items() if value is not None}
        return parse_sample(record, source=f"row {json.dumps(record, default=str)[:120]}", folder=self.folder)

    def _usable(self, items: Sequence[Item | BadSample]) -> list[Item]:
        """The items without bad samples and those that make no batch with the others, which are counted."""
        first = [
            item[0] if type(item) is tuple else item for item in items
        ]  # the answers of a pair have the same clips
        fits = self._collate.of_one_batch(cast("list[Encoded | BadSample]", first))
        good = [cast("Item", item) for item, fit in zip(items, fits, strict=True) if not isinstance(fit, BadSample)]
        bad = [fit for fit in fits if isinstance(fit, BadSample)]
        for counter, more in ((self._bad, len(bad)), (self._good, len(good))):
            with counter.get_lock():
                counter.value += more
        for item in bad:
            logger.warning("left out a bad sample: %s: %s", item.source, item.reason)
        if bad and not good:
            raise DataError(
                f"all {len(bad)} samples of a batch are bad, first {bad[0].source}: {bad[0].reason} TRL can't leave a whole batch "
                "out. Take the bad samples out of the data (sta-adapter check-data finds them), or larger batches."
            )
        return good

    def _padded(self, items: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        return {key: value for key, value in self._collate(items).items() if isinstance(value, torch.Tensor)}


class PreferenceCollator(VideoCollator):
    """Rows with `prompt`, `chosen` and `rejected` to a batch for DPO: first all chosen answers, then all rejected ones.

    Each clip is decoded once for both answers. Arguments as for `VideoCollator`.
    """

    def __call__(self, rows: Sequence[Mapping[str, object]]) -> dict[str, torch.Tensor]:
        """A batch of tensors with `completion_mask`, which marks the answers' tokens."""
        pairs: list[tuple[Encoded, Encoded]] = self._usable([self.encode(row) for row in rows])
        batch = self._padded([*(chosen for chosen, _ in pairs), *(rejected for _, rejected in pairs)])
        labels = batch.pop("labels")
        return {**batch, "completion_mask": (labels != IGNORE).long()}

    def encode(self, row: Mapping[str, Any]) -> tuple[Encoded, Encoded] | BadSample:
        """Tensors of the chosen and of the rejected conversation, or a `BadSample`."""
        missing = [name for name in ("prompt", "chosen", "rejected") if not row.get(name)]
        if missing:
            raise DataError(
                f"a row has no {', '.join(missing)}; expected prompt, chosen and rejected, each a list of messages."
            )
        rest = {key: value for key, value in row.items() if key not in ("prompt", "chosen", "rejected")}
        prompt = [{**turn, "loss": False} if turn.get("role") == "assistant" else turn for turn in row["prompt"]]
        chosen, rejected = (self._sample(rest, messages=[*prompt, *row[name]]) for name in ("chosen", "rejected"))
        try:
            visuals = [*self.encoder.visuals(chosen.prompt), []]
            thinking = has_reasoning([*chosen.messages, *rejected.messages])  # one prompt for both
            one, other = (self.encoder.encoded(sample.messages, visuals, thinking) for sample in (chosen, rejected))
        except BaseException as error:  # whatever a library raises
            return BadSample.of(chosen.source, error).skipped(self.encoder.on_bad_sample, error)
        return Loaded.of(one, chosen.source), other


class Arguments(TypedDict):
    """Of one of TRL's trainers."""

    model: nn.Module
    processing_class: Processor
    peft_config: LoraConfig | None
    callbacks: list[TrainerCallback]
    data_collator: NotRequired[VideoCollator]


class RefuseIdle(TrainerCallback):
    """Refuses settings of the trainer's config that would have no effect beside these collators."""

    def on_train_begin(self, args: TrainingArguments, *_: object, **kwargs: object) -> None:
        """Before anything is trained."""
        for name, (idle, instead) in IDLE.items():
            if (value := getattr(args, name, idle[0])) not in idle:
                raise ConfigError(
                    f"{name}={value!r} of {type(args).__name__} has no effect on clips read here: {instead}."
                )


@dataclass(frozen=True)
class Prepared:
    """What goes into one of TRL's trainers.

    Attributes:
        handle: of the model's STA, before LoRA is added; `get_sta(trainer.model)` is the one after.
        arguments: for the trainer: model, processing_class, peft_config, data_collator, callbacks.
        config: for its config class, such as `SFTConfig(output_dir, **prepared.config)`.
    """

    handle: STAHandle
    arguments: Arguments
    config: dict[str, object]

    @property
    def model(self) -> nn.Module:
        """The model with STA."""
        return self.arguments["model"]

    @property
    def peft_config(self) -> LoraConfig | None:
        """The LoRA that the trainer adds, or None."""
        return self.arguments["peft_config"]

    @property
    def callbacks(self) -> list[TrainerCallback]:
        """Those of `sta_callbacks`, one that tells of bad clips, and `RefuseIdle`."""
        return self.arguments["callbacks"]


def prepare(
    model: nn.Module,
    processor: Processor,
    trainer: str = "sft",
    *,
    settings: Settings | Mapping[str, object] | None = None,
    frames: FrameSettings | None = None,
    max_length: int | None = None,
    on_bad_sample: str = "skip",
    **lora: object,
) -> Prepared:
    """Make a model ready for one of TRL's trainers: STA in it, LoRA by the recipe, clips, and callbacks that save and watch.

    Example:
        `sta = prepare(model, processor)`, then `SFTTrainer(**sta.arguments, train_dataset=rows, args=SFTConfig("out",
        **sta.config))`.

    Args:
        model: the base model, or one that has STA already.
        processor: its processor.
        trainer: "sft", "dpo" or "grpo".
        settings: of STA, stage, and the adapter to start from; see `Settings`.
        frames: how clips are sampled.
        max_length: rows of more tokens are bad ones.
        on_bad_sample: "skip" or "error", see `VideoCollator`.
        lora: fields of `LoraConfig` in the place of the recipe's.

    Raises:
        ConfigError: there is no such trainer, or settings don't fit.
        CompatibilityError: the trainer's loss gets no clips, so that STA would not be trained (GRPO; DPO before TRL 1.1).
        MissingExtraError: trl is not installed.
    """
    if trainer not in TRAINERS:
        raise ConfigError(f"trainer is {trainer!r}, expected one of {', '.join(map(repr, TRAINERS))}.")
    if version("trl") == "not installed":
        raise MissingExtraError("this needs TRL: pip install trl")
    if numbers(version("trl")) < FIRST:
        raise incompatible("trl", "before 1.1, TRL's DPO takes no clips, or leaves them out")
    if trainer == "grpo":
        refuse_blind_grpo()
    settings = settings if isinstance(settings, Settings) else Settings.from_mapping(settings)
    if trainer != "sft" and settings.stage == 1:
        raise ConfigError(f"stage 1 of {trainer} would have no reference model without STA; train stage 1 by 'sft'.")
    handle, peft_config = prepare_model(model, settings, **lora)
    kind = PreferenceCollator if trainer == "dpo" else VideoCollator
    collator = kind(processor, frames=frames, max_length=max_length, on_bad_sample=on_bad_sample)
    arguments: Arguments = {
        "model": handle.model,
        "processing_class": processor,
        "peft_config": peft_config,
        "callbacks": [*sta_callbacks(settings), ReportBadClips(collator.counts)],
    }
    if trainer != "grpo":
        arguments["data_collator"] = collator
        arguments["callbacks"].append(RefuseIdle())
    config = {"remove_unused_columns": False, **TRAINERS[trainer]}
    return Prepared(handle, arguments, config if trainer == "grpo" else {**config, "max_length": None})


def refuse_blind_grpo() -> None:
    """Refuse a GRPO trainer whose loss sees no clips: there STA gets no gradient at all, without an error."""
    function = getattr(importlib.import_module("trl").GRPOTrainer, "_get_per_token_logps_and_entropies", None)
    names = () if function is None else parameter_names(function, "GRPOTrainer", "trl")
    if not {"pixel_values_videos", "video_grid_thw"} <= set(names):
        raise CompatibilityError(
            f"GRPO in trl {version('trl')} hands clips to generation alone and not to the loss, so STA would get no gradient. "
            "Train by SFT or DPO here, or by GRPO in ms-swift (use_vllm false), where clips reach the loss."
        )
