"""Training steps with STA, against the same loop on the untouched model.

    python benchmarks/training_throughput.py
    python benchmarks/training_throughput.py --device cuda --model Qwen/Qwen2-VL-2B-Instruct --frames 16 --size 336

A step is forward, backward and AdamW on one batch of clips that lies on the device already; the variants take turns.
Each case says what trains beside STA: the whole language model and the vision encoder, LoRA on both (stage two), or
nothing (stage one; there the ratio is to a forward and backward pass of the model that trains LoRA, as an untouched
model with nothing to train has no step). Values are clips a second; the ratio is to the untouched model, more is
better.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
from common import Report, benchmark_options, measure_in_turn, set_threads, use_checkout

use_checkout()

import torch  # noqa: E402
from torch import nn  # noqa: E402

from sta_adapter import get_sta, inject_sta  # noqa: E402
from sta_adapter.data import Collator  # noqa: E402
from sta_adapter.data.chat_encoding import encode  # noqa: E402
from sta_adapter.data.message import Visual  # noqa: E402
from sta_adapter.training import TrainingConfig  # noqa: E402
from sta_adapter.training.lora import lora_config, mark_trained  # noqa: E402


def batch_of(processor: Any, clips: int, frames: int, size: int) -> dict[str, torch.Tensor]:
    """A batch of clips of noise, each with a question and an answer."""
    generator = np.random.default_rng(0)
    question = {"role": "user", "content": [{"type": "video", "video": "a"}, {"type": "text", "text": "Which way?"}]}
    messages = [question, {"role": "assistant", "content": [{"type": "text", "text": "up"}]}]
    times = {"total_num_frames": frames, "fps": 1.0, "duration": float(frames), "frames_indices": list(range(frames))}
    items = []
    for _ in range(clips):
        pixels = generator.integers(0, 255, (frames, size, size, 3), np.uint8)
        items.append(encode(processor, messages, [[Visual("video", pixels, times, True)], []]))
    made = Collator.of(processor)(items)
    return {key: value for key, value in made.items() if isinstance(value, torch.Tensor)}


def stage_one(model: Any, sta: bool) -> nn.Module:
    """STA alone trains; untouched, LoRA does."""
    if not sta:
        return stage_two(model, sta)
    return inject_sta(model).freeze_base().model


def stage_two(model: Any, sta: bool) -> nn.Module:
    """LoRA on both parts, and STA."""
    from peft import get_peft_model

    handle = inject_sta(model) if sta else None
    made = get_peft_model(model, lora_config(model, handle, TrainingConfig(sta=sta)))
    mark_trained(made)
    kept = get_sta(made)
    for parameter in kept.parameters() if kept else ():
        parameter.requires_grad_(True)
    return made


def everything(model: Any, sta: bool) -> nn.Module:
    """All parameters train."""
    made = inject_sta(model).model if sta else model
    return made.requires_grad_(True)


CASES: dict[str, Callable[[Any, bool], nn.Module]] = {
    "stage two: LoRA": stage_two,
    "all parameters": everything,
    "stage one: STA alone": stage_one,
}


def stepper(model: nn.Module, batch: dict[str, torch.Tensor], device: str) -> Callable[[], None]:
    """One step of training; bf16 on CUDA."""
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@click.command(help=__doc__)
@benchmark_options
@click.option("--model", "name", help="Hub id or folder. [default: the demo's tiny base]")
@click.option("--clips", type=click.IntRange(1), default=8, show_default=True, help="Clips a step.")
@click.option("--frames", type=click.IntRange(1), default=8, show_default=True, help="Frames of a clip.")
@click.option("--size", type=click.IntRange(8), default=32, show_default=True, help="Edge of a frame in pixels.")
@click.option("--case", "cases", type=click.Choice(list(CASES)), multiple=True, help="Only this. [default: all]")
def main(
    device: str,
    repeats: int,
    threads: int | None,
    out: Path,
    name: str | None,
    clips: int,
    frames: int,
    size: int,
    cases: tuple[str, ...],
) -> None:
    """Measure every case and write the report."""
    from sta_adapter.demo import TINY_BASE
    from sta_adapter.loading import load_model, load_processor

    set_threads(threads)
    settings = {"model": name or "tiny base", "clips": clips, "frames": frames, "size": size}
    title = f"Training, {settings['model']}, {clips} clips of {frames} frames of {size} x {size} pixels"
    label = "clips a second / untouched model"
    report = Report("training-throughput", title, device, out, unit="clips/s", settings=settings, ratio_label=label)
    processor = load_processor(name or TINY_BASE)
    batch = {key: value.to(device) for key, value in batch_of(processor, clips, frames, size).items()}
    base = load_model(name or TINY_BASE, dtype="fp32", device="cpu")
    for case in cases or CASES:
        steps = {}
        for variant, sta in (("untouched", False), ("STA", True)):
            torch.manual_seed(0)
            steps[variant] = stepper(CASES[case](copy.deepcopy(base), sta).to(device), batch, device)
        seconds = measure_in_turn(steps, repeats=repeats, device=device, warmup=2)
        report.add(case, {variant: [clips / value for value in found] for variant, found in seconds.items()})
    report.finish()


if __name__ == "__main__":
    sys.exit(main())
