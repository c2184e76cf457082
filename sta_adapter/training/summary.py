"""What a stage is about to do, in a few lines."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from sta_adapter.data.dataset import VideoDataset
from sta_adapter.data.stream import StreamDataset
from sta_adapter.distributed import full_shape
from sta_adapter.requirements import reporters
from sta_adapter.training.arguments import join_processes, precision_of

if TYPE_CHECKING:
    from sta_adapter.training.stage import Stage

__all__ = ["describe"]

WHAT = {"1": "STA", "2": "STA and LoRA"}


def describe(stage: Stage, model: nn.Module, checkpoint: Path | None) -> list[str]:
    """Lines for a terminal about a stage, with what trains marked, and the checkpoint that it goes on from."""
    config, processes = stage.config, join_processes().num_processes
    counts = [(torch.Size(full_shape(p)).numel(), p.requires_grad) for p in model.parameters()]
    trained, whole = sum(count for count, trains in counts if trains), sum(count for count, _ in counts)
    device_batch, times = config.device_batches(processes)
    steps = stage.steps()
    what = WHAT[stage.name] if config.sta else "LoRA"
    batch = f"{device_batch} on a device at a time" + (f", {times} times" if times > 1 else "")
    saved = [f"{config.save_steps} steps"] if stage.saves_by_steps() else ["evaluation"]
    saved += [f"{config.save_minutes:g} minutes"] if config.save_minutes is not None else []
    lines = {
        "trains": f"{what}: {_millions(trained)} of {_millions(whole)} parameters",
        "data": f"{_amount(stage.dataset)}, {steps} steps of {config.batch_size} clips ({batch})",
        "rate": f"{config.learning_rate:g}, {config.schedule}, rising for {config.warmup:.0%} of the steps",
        "computes": f"in {precision_of(config.precision)} on {_device()}{_shared(processes)}, gradient checkpointing "
        f"{'on' if config.gradient_checkpointing else 'off'}",
        "saves": f"into {shlex.quote(str(stage.folder))}, every {' or '.join(saved)}",
    }
    if stage.evaluates():
        lines["measures"] = stage.measured() + (
            f" every {config.eval_steps} steps" if config.eval_steps else " each epoch"
        )
    if "tensorboard" in reporters(config.report_to):
        lines["shows"] = f"tensorboard --logdir {shlex.quote(str(stage.folder))}"
    if checkpoint is not None:
        lines["goes on"] = f"from {checkpoint.name}"
    return [f"stage {stage.name}", *(f"  {name:<9} {text}" for name, text in lines.items())]


def _amount(dataset: VideoDataset | StreamDataset) -> str:
    if isinstance(dataset, StreamDataset):
        return f"{len(dataset.shards)} shards"
    return f"{len(dataset):,} samples"


def _millions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count:,}"


def _device() -> str:
    if not torch.cuda.is_available():
        return "the CPU"
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return f"{found.name} ({found.total_memory / 1e9:.0f} GB)"


def _shared(processes: int) -> str:
    return f" and {processes - 1} more processes" if processes > 1 else ""
