"""A run's settings in the words of the Hugging Face trainer, and the processes that it is of."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import TrainingArguments

from sta_adapter.distributed import FLATTENS
from sta_adapter.errors import ConfigError
from sta_adapter.requirements import reporters, require_reporters
from sta_adapter.training.config import TrainingConfig

PRECISION = "ACCELERATE_MIXED_PRECISION"  # where accelerate looks for it, and a TrainingArguments of transformers
LOGS = 10  # a run logs its loss so many times at least


def training_arguments(
    config: TrainingConfig, folder: Path, steps: int, workers: int, measured: str | None, streamed: bool
) -> TrainingArguments:
    """The settings of a stage of so many steps in the trainer's words.

    `measured` is what evaluations measure, "eval_loss" or "eval_score"; None if there are none.
    """
    device_batch, accumulation = config.device_batches(join_processes().num_processes)
    precision = precision_of(config.precision)
    require_reporters(config.report_to)
    evaluating = "no" if measured is None else "steps" if config.eval_steps else "epoch"
    keeps_best = measured is not None and config.keep_best  # for which every evaluation needs a checkpoint
    # the settings decide: else what a launcher, or on older transformers the run before, has asked for would hold
    os.environ[PRECISION] = "no" if precision == "fp32" else precision
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=device_batch,
        per_device_eval_batch_size=device_batch,
        gradient_accumulation_steps=accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=min(math.ceil(config.warmup * steps), steps - 1),  # the first of them has a rate of 0
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        max_grad_norm=config.max_grad_norm,
        use_cpu=not has_accelerator(),  # otherwise bf16 is refused there
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        seed=config.seed,
        logging_steps=min(config.logging_steps, max(1, steps // LOGS)),
        logging_first_step=True,
        logging_nan_inf_filter=False,  # such a loss is shown, and ends the run
        # DDP would look for unused parameters at the first of the backwards that re-entrant checkpoints run, each of its own
        ddp_find_unused_parameters=False if config.gradient_checkpointing == "reentrant" else None,
        dataloader_num_workers=workers,
        ignore_data_skip=streamed,  # it finds its place itself
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        label_names=["labels"],
        prediction_loss_only=True,
        report_to=reporters(config.report_to),
        disable_tqdm=True,
        run_name=config.run_name,
        eval_strategy=evaluating,
        eval_steps=config.eval_steps,
        save_strategy=evaluating if keeps_best else "steps",
        save_steps=config.eval_steps if keeps_best and config.eval_steps else config.save_steps,
        load_best_model_at_end=keeps_best,
        metric_for_best_model=measured if keeps_best else None,
        greater_is_better=measured != "eval_loss" if keeps_best else None,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # never nn.DataParallel, whose copies of modules lose the hooks' state
    return arguments


def join_processes() -> PartialState:
    """The processes of one run find each other; a process on its own is one of one."""
    return PartialState(cpu=not has_accelerator())


def refuse_flattening(plugin: object) -> None:
    """Refuse FSDP's first version; `plugin` is accelerate's settings of FSDP, None without it."""
    if plugin is not None and getattr(plugin, "fsdp_version", 1) == 1:
        raise ConfigError(FLATTENS)


def has_accelerator() -> bool:
    """Whether there is anything but a CPU."""
    return bool(getattr(torch, "accelerator", torch.cuda).is_available())


def precision_of(asked: str) -> str:
    """The precision in force: "bf16", "fp16" or "fp32"; one that the device can't compute in is refused."""
    if asked == "fp16" and not has_accelerator():
        raise ConfigError("precision fp16 needs a GPU: on the CPU it would be fp32 silently; take bf16, fp32 or auto.")
    if asked != "auto":
        return asked
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp32"
