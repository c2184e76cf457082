"""One stage of training: what trains in it, in which precision, and the trainer that runs it.

Used by `sta_adapter.training.two_stage`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import multiprocessing
import signal
import time
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TypedDict, cast

import torch
from accelerate.utils.memory import should_reduce_batch_size
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from sta_adapter.adapter.lora_weights import lora_files, lora_state
from sta_adapter.adapter.save import adapter_files
from sta_adapter.data.collator import Collator
from sta_adapter.data.dataset import VideoDataset
from sta_adapter.data.stream import StreamDataset
from sta_adapter.data.worker_process import worker_errors
from sta_adapter.data.worker_signals import end_workers, outlasting_signals
from sta_adapter.distributed import full_shape, is_rank_zero, is_sharded, on_rank_zero
from sta_adapter.errors import CheckpointError, ConfigError, TrainingStopped
from sta_adapter.injection.contents import adapter_contents
from sta_adapter.injection.handle import STAHandle, get_sta
from sta_adapter.training.arguments import join_processes, training_arguments
from sta_adapter.training.checkpoints import drop_incomplete, last_checkpoint, load_trained, require_readable
from sta_adapter.training.config import TrainingConfig
from sta_adapter.training.contexts import (
    activation_checkpointing,
    full_precision,
    kept_configuration,
    trainable_when_quantized,
)
from sta_adapter.training.identity import write_json
from sta_adapter.training.lora import lora_config, mark_trained, require_same_lora
from sta_adapter.training.progress import Progress, describe
from sta_adapter.training.trainer import AdapterTrainer
from sta_adapter.training.watch import Resumption, Signals, Watch

logger = logging.getLogger(__name__)

RESULT_FILE = "result.json"


class StageResult(TypedDict):
    """What a finished stage leaves."""

    steps: int
    seconds: float
    trainable_parameters: int
    bad_samples: list[str]
    history: list[dict[str, float]]
    length: dict[str, float | None]


@dataclass
class Stage:
    """One stage of a run."""

    name: str  # "1" or "2"
    config: TrainingConfig  # the settings in force in it
    folder: Path  # for its checkpoints and its result
    dataset: VideoDataset | StreamDataset  # what it trains on
    eval_dataset: VideoDataset | StreamDataset | None = None  # what the loss is measured on
    eval_fn: Callable[[nn.Module], dict[str, float]] | None = None  # what is measured instead
    signals: Signals = field(default_factory=Signals)  # that end the run
    callbacks: Sequence[TrainerCallback] = ()
    progress: bool = True  # whether a summary and bars are shown
    extends: bool = True  # whether a finished stage goes on, when it is to be longer now

    def prepare(self, model: nn.Module, handle: STAHandle | None) -> tuple[nn.Module, STAHandle | None]:
        """Decide what trains. PEFT copies the STA modules, so what counts afterwards is the handle that comes back."""
        if self.name == "1" and handle is not None:
            handle.freeze_base()
            return handle.model, handle
        if is_sharded(model.parameters()):
            raise ConfigError(
                "the model's weights are sharded, and LoRA can't be added to them. If stage one has just ended, it is saved: "
                "start the same command again, and stage two continues from it. Otherwise pass the model before sharding."
            )
        torch.manual_seed(self.config.seed)
        if not isinstance(model, PeftModel):
            model = get_peft_model(model, lora_config(model, handle, self.config))
        else:
            require_same_lora(model, self.config)
        mark_trained(model)
        handle = get_sta(model)
        for parameter in () if handle is None else handle.parameters():
            parameter.requires_grad_(True)
        return model, handle

    def finished(self) -> StageResult | None:
        """What an earlier call that finished this stage left; None where there is something to train."""
        file = self.folder / RESULT_FILE
        if not file.exists():
            return None
        found: StageResult = json.loads(file.read_text(encoding="utf-8"))
        longer = found["length"] != self.config.length
        return None if longer and self.extends else found

    def run(self, model: nn.Module, handle: STAHandle | None) -> StageResult:
        """Train, or take what an earlier call finished; gives what `TrainingResult.stages` holds. Errors are those of `train`."""
        found = self.finished()
        if found is not None:
            logger.info("stage %s is finished already in %s", self.name, self.folder)
            load_trained(model, self.folder)
            return found
        started = time.perf_counter()
        trainer = None
        while trainer is None:
            trainer = self._attempt(model, handle)
        result: StageResult = {
            "steps": trainer.state.global_step,
            "seconds": round(time.perf_counter() - started, 3),
            "trainable_parameters": sum(math.prod(full_shape(p)) for p in model.parameters() if p.requires_grad),
            "bad_samples": trainer.counts.of_all()["bad_samples"],
            "history": trainer.state.log_history,
            "length": self.config.length,
        }
        on_rank_zero(lambda: write_json(self.folder / RESULT_FILE, result))
        return result

    def _attempt(self, model: nn.Module, handle: STAHandle | None) -> AdapterTrainer | None:
        """Train to the end; None where the memory was not enough, and smaller parts of a step are to be tried."""
        checkpointed = activation_checkpointing(model, handle, self.config.gradient_checkpointing)
        with full_precision(model), checkpointed, kept_configuration(model):
            watch = Watch(f"stage {self.name}", self.config, self.folder, self.signals)
            shown = Progress(f"stage {self.name}", watch, self.config.batch_size, self.measured())
            trainer = self._trainer(model, handle, watch, shown)
            on_rank_zero(lambda: drop_incomplete(self.folder))
            checkpoint = last_checkpoint(self.folder)
            if checkpoint is None and (self.folder / RESULT_FILE).exists():
                raise CheckpointError(f"{self.folder} holds a finished stage without a checkpoint to go on from.")
            if self.progress and is_rank_zero():
                shown.say("\n".join(describe(self, model, checkpoint)))
            if checkpoint is None or not trainer.take_up(checkpoint, self.steps()):
                smaller = self._train(trainer, checkpoint, shown)
                if smaller is not None:
                    trainer.keep_for_smaller_parts()
                    self.config = smaller
                    return None
            if watch.stopped:
                raise self.stopped()
            trainer.counts.require_used()
            trainer.save_model(str(self.folder))
        return trainer

    def _train(self, trainer: AdapterTrainer, checkpoint: Path | None, shown: Progress) -> TrainingConfig | None:
        """Train; gives settings that take less memory at a time if there was too little of it."""
        if checkpoint is not None:
            logger.info("going on from %s", checkpoint)
            require_readable(checkpoint)
        others = multiprocessing.active_children()
        trainer.add_callback(_EndWorkers(trainer.watch, others))
        try:
            with worker_errors(), outlasting_signals():
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except RuntimeError as error:
            smaller = self._smaller() if should_reduce_batch_size(error) else None
            if smaller is None:
                raise
            logger.warning(
                "stage %s: the memory is not enough for %d clips at a time; going on with device_batch_size %d and "
                "gradient_checkpointing %s, and as many clips a step (%d) as before",
                self.name,
                trainer.args.per_device_train_batch_size,
                smaller.device_batch_size,
                smaller.gradient_checkpointing,
                smaller.batch_size,
            )
            return smaller
        finally:
            shown.close()
            end_workers(others)
        return None

    def _smaller(self) -> TrainingConfig | None:
        """Half of the clips at a time, or gradient checkpointing; None where that is used up, or other processes would wait."""
        if join_processes().num_processes > 1:
            return None
        size, _ = self.config.device_batches()
        half = next((part for part in range(size // 2, 0, -1) if self.config.batch_size % part == 0), None)
        if half is not None:
            return dataclasses.replace(self.config, device_batch_size=half)
        if not self.config.gradient_checkpointing:
            return dataclasses.replace(self.config, device_batch_size=1, gradient_checkpointing=True)
        return None

    def stopped(self) -> TrainingStopped:
        """What is said after a signal."""
        last, number = last_checkpoint(self.folder), self.signals.received
        saved = "no checkpoint was saved" if last is None else f"{last} is saved"
        return TrainingStopped(
            f"stage {self.name} was stopped by {signal.Signals(number).name}; {saved}. Call train again with the same "
            "arguments to go on.",
            signal=number,
            checkpoint=last,
        )

    def evaluates(self) -> bool:
        """Whether anything is measured."""
        return self.eval_fn is not None or self.eval_dataset is not None

    def saves_by_steps(self) -> bool:
        """Whether checkpoints come every `save_steps`; else with each evaluation, for the best to be kept."""
        return not (self.evaluates() and self.config.keep_best)

    def steps(self) -> int:
        """How many steps the stage has."""
        config = self.config
        return config.max_steps or math.ceil(
            config.epochs * math.ceil(len(cast(Sized, self.dataset)) / config.batch_size)
        )

    def measured(self) -> str:
        """What evaluations measure, in words."""
        if self.eval_fn is not None:
            return "what eval_fn measures"
        return "the loss" if self.eval_dataset is None else f"the loss on {len(cast(Sized, self.eval_dataset))} samples"

    def _trainer(self, model: nn.Module, handle: STAHandle | None, watch: Watch, shown: Progress) -> AdapterTrainer:
        with trainable_when_quantized(model):
            trainer = AdapterTrainer(
                model=model,
                args=self._arguments(),
                train_dataset=self.dataset,
                eval_dataset=self.eval_dataset or (self.dataset if self.eval_fn else None),
                data_collator=Collator.of(self.dataset.processor, on_bad_sample=self.dataset.encoder.on_bad_sample),
                callbacks=[watch, Resumption(), *self.callbacks, *([shown] if self.progress else [])],
                config=self.config,
                sta_parameters=lambda: iter(()) if handle is None else handle.parameters(),
                adapter_files=lambda: (
                    lora_files(model, lora_state(model)) if handle is None else adapter_files(*adapter_contents(handle))
                ),
                watch=watch,
                eval_fn=self.eval_fn,
            )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _arguments(self) -> TrainingArguments:
        """The settings in the trainer's words."""
        measured = "eval_score" if self.eval_fn is not None else None if self.eval_dataset is None else "eval_loss"
        workers, streamed = self.config.num_workers, isinstance(self.dataset, StreamDataset)
        if isinstance(self.dataset, StreamDataset):
            workers = self.dataset.usable_workers(workers, join_processes().num_processes)
        elif self.dataset.cached:
            workers = 0
        return training_arguments(self.config, self.folder, self.steps(), workers, measured, streamed)


class _EndWorkers(TrainerCallback):
    """After the checkpoint of a stopped stage, what is still being decoded is of no use."""

    def __init__(self, watch: Watch, others: Sequence[BaseProcess]) -> None:
        self.watch, self.others = watch, others

    def on_save(self, *_: object, **kwargs: object) -> None:
        """End the workers."""
        if self.watch.stopped:
            end_workers(self.others)
