"""What a run would do and need, before it does: parameters, steps, lengths, memory, and what fits.

Memory is that of a step on the longest sample that was found, part by part, see `sta_adapter.training.memory`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, cast

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

from sta_adapter.config import STAConfig
from sta_adapter.data.bad_sample import BadSample
from sta_adapter.data.check import spread
from sta_adapter.data.collator import Collator, uncollated
from sta_adapter.data.dataset import VideoDataset
from sta_adapter.data.visual_processing import Encoded
from sta_adapter.data.worker_process import worker_errors
from sta_adapter.errors import DataError
from sta_adapter.injection.handle import STAHandle, get_sta
from sta_adapter.injection.inject import inject_sta
from sta_adapter.training.arguments import precision_of
from sta_adapter.training.config import TrainingConfig
from sta_adapter.training.contexts import activation_checkpointing, full_precision
from sta_adapter.training.memory import step_peak, without_values
from sta_adapter.training.stage import Stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from typing_extensions import NotRequired

GB = 1e9
CONTEXT = 1.5 * GB  # of CUDA, its libraries and their workspaces
FRAGMENTS = 0.05  # of the rest, which the allocator holds and can't give
MOST = 16  # clips on a device at a time, in what is suggested
QUANTIZED = {"4bit": 0.52, "8bit": 1.0}  # bytes of a weight, with the scales


@dataclass(frozen=True)
class Machine:
    """What a run is planned for."""

    memory: float  # bytes of one GPU, or of the machine
    cuda: bool  # whether it is a GPU
    precision: str  # "bf16", "fp16" or "fp32"
    dtype: torch.dtype  # of the base's weights
    processes: int = 1  # that share a batch
    quantize: str | None = None  # None, "4bit" or "8bit"

    def needs(self, parts: dict[str, float]) -> float:
        """Bytes in all for a step's parts."""
        found = sum(parts.values())
        return found * (1 + FRAGMENTS) + CONTEXT if self.cuda else found


class LengthsReport(TypedDict):
    """Of `Lengths`, as plain values."""

    samples: int
    looked_at: int
    tokens: dict[str, float]


class Fit(TypedDict):
    """What fits into the memory."""

    device_batch_size: int
    gradient_checkpointing: bool


class StagePlan(TypedDict):
    """What one stage would do and need; memory in bytes."""

    trainable: int
    parameters: int
    samples: int
    steps: int
    batch_size: int
    device_batch_size: int
    accumulation: int
    gradient_checkpointing: bool | str
    parts: dict[str, float]
    needs: float
    fits: bool
    choices: list[Fit]  # the largest device batch that fits without and with checkpointing, 0 for none
    suggested: Fit | None  # without checkpointing where a clip fits, as that computes less; None where nothing fits
    measured: NotRequired[dict[str, float]]
    hours: NotRequired[float]


@dataclass(frozen=True)
class Lengths:
    """How long samples are."""

    tokens: list[int]  # of each sample that was looked at
    longest: Encoded  # the longest of them, encoded
    samples: int  # how many there are in all

    def to_dict(self) -> LengthsReport:
        """Plain values."""
        return {"samples": self.samples, "looked_at": len(self.tokens), "tokens": spread(self.tokens)}


def sample_lengths(dataset: VideoDataset, count: int, workers: int = 0) -> Lengths:
    """Decode and encode up to so many samples, spread evenly; a DataError where none of them can be used."""
    every = max(1, -(-len(dataset) // count))
    tokens: list[int] = []
    longest: Encoded | None = None
    bad = ""
    loader = DataLoader(
        Subset(dataset, range(0, len(dataset), every)), None, num_workers=workers, collate_fn=uncollated
    )
    with worker_errors():
        for item in loader:
            if isinstance(item, BadSample):
                bad = bad or str(item)
                continue
            tokens.append(len(item["input_ids"]))
            longest = item if tokens[-1] == max(tokens) else longest
    if longest is None:
        raise DataError(f"none of the samples that were looked at can be used, first {bad}")
    return Lengths(tokens, longest, len(dataset))


def plan_stage(
    name: str,
    config: TrainingConfig,
    make_model: Callable[[], nn.Module],
    dataset: VideoDataset,
    lengths: Lengths,
    machine: Machine,
) -> StagePlan:
    """What one stage, "1" or "2", would do and need under the settings in force in it.

    `make_model` gives a fresh base without weights, see `sta_adapter.inspection.empty_model`; `lengths` are of the samples.
    """
    stage = Stage(name, config, Path(), dataset)
    device_batch, accumulation = config.device_batches(machine.processes)
    share = config.batch_size // machine.processes
    sizes = [size for size in range(1, min(share, MOST) + 1) if share % size == 0]
    found: dict[bool, dict[str, float]] = {}
    choices: list[Fit] = []
    for kind in (False, config.gradient_checkpointing or True):
        peak, counts = _one_clip(stage, make_model, lengths.longest, machine, kind, share > 1)
        found[bool(kind)] = peak
        fits = max((size for size in sizes if machine.needs(_of_clips(peak, size)) <= machine.memory), default=0)
        choices.append({"device_batch_size": fits, "gradient_checkpointing": bool(kind)})
    parts = _of_clips(found[bool(config.gradient_checkpointing)], device_batch)
    return {
        "trainable": counts["trainable"],
        "parameters": counts["parameters"],
        "samples": lengths.samples,
        "steps": stage.steps(),
        "batch_size": config.batch_size,
        "device_batch_size": device_batch,
        "accumulation": accumulation,
        "gradient_checkpointing": config.gradient_checkpointing,
        "parts": parts,
        "needs": machine.needs(parts),
        "fits": machine.needs(parts) <= machine.memory,
        "choices": choices,
        "suggested": next((choice for choice in choices if choice["device_batch_size"]), None),
    }


def _one_clip(
    stage: Stage,
    make_model: Callable[[], nn.Module],
    sample: Encoded,
    machine: Machine,
    kind: bool | str,
    accumulates: bool,
) -> tuple[dict[str, float], dict[str, int]]:
    """The parts of the peak with one clip, and the stage's numbers of parameters."""
    model = make_model()
    for value in (*model.parameters(), *model.buffers()):
        if value.is_floating_point() and value.is_meta:
            value.data = value.data.to(machine.dtype)
    model, handle = _prepared(stage, model)
    batch = _batch(stage, [sample], handle)
    with full_precision(model), activation_checkpointing(model, handle, kind):
        narrower = _saved_by_quantizing(model, machine)
        trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
        counts = {"trainable": sum(trained), "parameters": sum(p.numel() for p in model.parameters())}
        mode = without_values(model.train())
        parts = step_peak(
            model, batch, mode, precision=machine.precision, like_cuda=machine.cuda, accumulates=accumulates
        )
    parts["weights"] -= narrower
    if machine.processes > 1:
        parts["gradients"] += 4 * counts["trainable"]  # the buckets in which processes exchange them
    return parts, counts


def _prepared(stage: Stage, model: nn.Module) -> tuple[nn.Module, STAHandle | None]:
    """The model as it trains in the stage."""
    config = stage.config
    handle = get_sta(model) or (inject_sta(model, STAConfig.from_dict(config.sta_config)) if config.sta else None)
    return stage.prepare(model if handle is None else handle.model, handle)


def _batch(stage: Stage, samples: list[Encoded], handle: STAHandle | None) -> dict[str, torch.Tensor]:
    """The samples as the model takes them, `clip_lengths` among them where it has STA."""
    found = Collator.of(stage.dataset.processor)(samples)
    tensors = {key: value for key, value in found.items() if isinstance(value, torch.Tensor)}
    return {key: value for key, value in tensors.items() if key != "clip_lengths" or handle is not None}


def _saved_by_quantizing(model: nn.Module, machine: Machine) -> int:
    """Bytes by which quantized weights are smaller; the output layer stays as it is."""
    if machine.quantize is None:
        return 0
    output = cast("PreTrainedModel", model).get_output_embeddings()
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not output and not m.weight.requires_grad]
    frozen = sum(layer.weight.numel() for layer in layers)
    return round(frozen * (machine.dtype.itemsize - QUANTIZED[machine.quantize]))


def _of_clips(parts: dict[str, float], clips: int) -> dict[str, float]:
    """The parts for so many clips: what a clip takes comes as often, the rest once."""
    by_clip = ("activations", "logits")
    return {part: size * clips if part in by_clip else size for part, size in parts.items()}


def measure_step(stage: Stage, model: nn.Module, sample: Encoded, processes: int) -> dict[str, float]:
    """Seconds, and on CUDA the peak in bytes, of one forward and backward on a device batch of the longest sample, where the model is."""
    size, _ = stage.config.device_batches(processes)
    model, handle = _prepared(stage, model)
    device = next(model.parameters()).device
    inputs = {key: value.to(device) for key, value in _batch(stage, [sample] * size, handle).items()}
    model.train()
    with full_precision(model), activation_checkpointing(model, handle, stage.config.gradient_checkpointing):
        seconds = min(_timed(model, inputs, device, stage) for _ in range(2))  # the first one warms up
    peak = {"bytes": float(torch.cuda.max_memory_allocated(device))} if device.type == "cuda" else {}
    return {"seconds": seconds, **peak}


def _timed(model: nn.Module, inputs: dict[str, torch.Tensor], device: torch.device, stage: Stage) -> float:
    precision = precision_of(stage.config.precision)
    narrow = torch.float16 if precision == "fp16" else torch.bfloat16
    started = time.perf_counter()
    with torch.autocast(device.type, narrow, enabled=precision != "fp32"):
        loss = model(**inputs).loss
    loss.backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    model.zero_grad(set_to_none=True)
    return time.perf_counter() - started
