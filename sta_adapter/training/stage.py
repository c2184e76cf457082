"""One stage of training: what trains in it, in which precision, and the trainer that runs it.

Used by `sta_adapter.training.two_stage`.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PrinterCallback, TrainingArguments

from sta_adapter.adapter.lora_weights import lora_files
from sta_adapter.adapter.save import adapter_files
from sta_adapter.data.collator import Collator
from sta_adapter.data.dataset import VideoDataset
from sta_adapter.data.stream import StreamDataset
from sta_adapter.data.worker_process import worker_errors
from sta_adapter.distributed import full_shape, is_sharded, on_rank_zero
from sta_adapter.errors import ConfigError
from sta_adapter.injection.contents import adapter_contents
from sta_adapter.injection.handle import STAHandle, get_sta
from sta_adapter.requirements import require_reporters
from sta_adapter.training.checkpoints import drop_incomplete, last_checkpoint, load_trained
from sta_adapter.training.config import TrainingConfig
from sta_adapter.training.contexts import activation_checkpointing, full_precision, trainable_when_quantized
from sta_adapter.training.lora import lora_config, lora_parameters, require_same_lora
from sta_adapter.training.progress import ProgressBar
from sta_adapter.training.trainer import AdapterTrainer

__all__ = ["Stage", "join_processes"]

logger = logging.getLogger(__name__)

RESULT_FILE = "result.json"


@dataclass
class Stage:
    """One stage of a run.

    Attributes:
        name: "1" or "2".
        config: the settings in force in it.
        folder: for its checkpoints and its result.
        dataset: what it trains on.
        eval_dataset: what the loss is measured on.
        eval_fn: what is measured instead.
    """

    name: str
    config: TrainingConfig
    folder: Path
    dataset: VideoDataset | StreamDataset
    eval_dataset: VideoDataset | StreamDataset | None = None
    eval_fn: Callable[[nn.Module], dict[str, float]] | None = None

    def prepare(self, model: nn.Module, handle: STAHandle | None) -> tuple[nn.Module, STAHandle | None]:
        """Decide what trains. PEFT copies the STA modules, so what counts afterwards is the handle that comes back."""
        if self.name == "1" and handle is not None:
            handle.freeze_base()
            return handle.model, handle
        if is_sharded(model.parameters()):
            raise ConfigError(
                "the model's weights are sharded, and LoRA can't be added to them. If stage one has just ended, it is saved: "
                "start the same command again, and stage two goes on from it. Otherwise pass the model before sharding."
            )
        torch.manual_seed(self.config.seed)
        if not isinstance(model, PeftModel):
            model = get_peft_model(model, lora_config(model, handle, self.config))
        else:
            require_same_lora(model, self.config)
        handle = get_sta(model)
        model.requires_grad_(False)
        for parameter in lora_parameters(model) if handle is None else [*lora_parameters(model), *handle.parameters()]:
            parameter.requires_grad_(True)
        return model, handle

    def run(
        self, model: nn.Module, handle: STAHandle | None, callbacks: Sequence[Any] = (), progress: bool = True
    ) -> dict[str, Any]:
        """Train, or take what an earlier call finished; gives what `TrainingResult.stages` holds."""
        finished = self.folder / RESULT_FILE
        if finished.exists():
            logger.info("stage %s is finished already in %s", self.name, self.folder)
            load_trained(model, self.folder)
            return json.loads(finished.read_text(encoding="utf-8"))
        started = time.perf_counter()
        with full_precision(model), activation_checkpointing(model, handle, self.config.gradient_checkpointing):
            trainer = self._trainer(model, handle, callbacks, progress)
            on_rank_zero(lambda: drop_incomplete(self.folder))
            checkpoint = last_checkpoint(self.folder)
            if checkpoint is not None:
                logger.info("going on from %s", checkpoint)
                trainer.go_on_after(checkpoint)
            if checkpoint is None or not trainer.ended_in(checkpoint):
                with worker_errors():
                    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            trainer.require_used()
            trainer.save_model(str(self.folder))
        result = {
            "steps": trainer.state.global_step,
            "seconds": round(time.perf_counter() - started, 3),
            "trainable_parameters": sum(math.prod(full_shape(p)) for p in model.parameters() if p.requires_grad),
            "bad_samples": trainer.sample_counts()["bad_samples"],
            "history": trainer.state.log_history,
        }
        on_rank_zero(lambda: write_json(finished, result))
        return result

    def _trainer(
        self, model: nn.Module, handle: STAHandle | None, callbacks: Sequence[Any], progress: bool
    ) -> AdapterTrainer:
        with trainable_when_quantized(model):
            trainer = AdapterTrainer(
                model=model,
                args=self._arguments(),
                train_dataset=self.dataset,
                eval_dataset=self.eval_dataset or (self.dataset if self.eval_fn else None),
                data_collator=Collator.of(self.dataset.processor, on_bad_sample=self.config.on_bad_sample),
                callbacks=[*callbacks, *([ProgressBar(f"stage {self.name}")] if progress else [])],
                config=self.config,
                sta_parameters=lambda: iter(()) if handle is None else handle.parameters(),
                adapter_files=lambda: lora_files(model) if handle is None else adapter_files(*adapter_contents(handle)),
                eval_fn=self.eval_fn,
            )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _arguments(self) -> TrainingArguments:
        """The settings in the trainer's words."""
        config = self.config
        device_batch, accumulation = config.device_batches(join_processes().num_processes)
        step_clips = config.batch_size
        total = config.max_steps or math.ceil(config.epochs * math.ceil(self._samples() / step_clips))
        precision = _precision(config.precision)
        require_reporters(config.report_to)
        # the settings decide: else what a launcher, or on older transformers the run before, has asked for would hold
        os.environ["ACCELERATE_MIXED_PRECISION"] = "no" if precision == "fp32" else precision
        arguments = TrainingArguments(
            output_dir=str(self.folder),
            per_device_train_batch_size=device_batch,
            per_device_eval_batch_size=device_batch,
            gradient_accumulation_steps=accumulation,
            learning_rate=config.learning_rate,
            lr_scheduler_type=config.schedule,
            warmup_steps=math.ceil(config.warmup * total),
            num_train_epochs=config.epochs,
            max_steps=config.max_steps or -1,
            max_grad_norm=config.max_grad_norm,
            use_cpu=not _has_accelerator(),  # otherwise bf16 is refused there
            bf16=precision == "bf16",
            fp16=precision == "fp16",
            seed=config.seed,
            logging_steps=config.logging_steps,
            dataloader_num_workers=self._workers(),
            ignore_data_skip=isinstance(self.dataset, StreamDataset),  # it finds its place itself
            dataloader_pin_memory=torch.cuda.is_available(),
            remove_unused_columns=False,
            label_names=["labels"],
            prediction_loss_only=True,
            report_to=config.report_to,
            disable_tqdm=True,
            **self._saving(),
        )
        arguments._n_gpu = min(
            arguments.n_gpu, 1
        )  # never nn.DataParallel, whose copies of modules lose the hooks' state
        return arguments

    def _samples(self) -> int:
        return len(cast(Sized, self.dataset))

    def _workers(self) -> int:
        wanted = self.config.num_workers
        if isinstance(self.dataset, StreamDataset):
            return self.dataset.usable_workers(wanted, join_processes().num_processes)
        return 0 if self.dataset.cached else wanted

    def _saving(self) -> dict[str, Any]:
        """When to save and to evaluate; the best checkpoint can only be kept if every evaluation has one."""
        config = self.config
        if self.eval_fn is None and self.eval_dataset is None:
            return {"save_strategy": "steps", "save_steps": config.save_steps, "eval_strategy": "no"}
        evaluating: dict[str, Any] = {"eval_strategy": "steps" if config.eval_steps else "epoch"}
        if config.eval_steps:
            evaluating["eval_steps"] = config.eval_steps
        if not config.keep_best:
            return {"save_strategy": "steps", "save_steps": config.save_steps, **evaluating}
        return {
            **evaluating,
            "save_strategy": evaluating["eval_strategy"],
            "save_steps": config.eval_steps or config.save_steps,
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss" if self.eval_fn is None else "eval_score",
            "greater_is_better": self.eval_fn is not None,
        }


def join_processes() -> PartialState:
    """The processes of one run find each other; a process on its own is one of one."""
    return PartialState(cpu=not _has_accelerator())


def _has_accelerator() -> bool:
    return bool(getattr(torch, "accelerator", torch.cuda).is_available())


def write_json(path: Path, values: Any) -> None:
    """Write a JSON file all at once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def _precision(asked: str) -> str:
    if asked == "fp16" and not _has_accelerator():
        raise ConfigError("precision fp16 needs a GPU: on the CPU it would be fp32 silently; take bf16, fp32 or auto.")
    if asked != "auto":
        return asked
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp32"
