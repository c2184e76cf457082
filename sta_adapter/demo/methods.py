"""What the demo compares: STA, and LoRA without it with as many parameters; how large the comparison is; and their training."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import peft

import sta_adapter
from sta_adapter.data import FrameSettings, VideoDataset
from sta_adapter.demo.model import tiny_model
from sta_adapter.evaluation import evaluate
from sta_adapter.tiny_base import TINY_BASE, TINY_BASE_FRAMES
from sta_adapter.training import TrainingConfig, TrainingResult, train
from sta_adapter.training.lora import lora_config

METHODS = {
    "sta": "STA as in the paper, then STA and LoRA on both",
    "lora": "LoRA on language model and vision encoder, as many parameters",
    "lora_language": "LoRA on the language model alone",
}
SHOWN = ("sta", "lora")  # where no more is asked for
FRAME_SETTINGS = FrameSettings(**TINY_BASE_FRAMES)


@dataclasses.dataclass(frozen=True)
class DemoSettings:
    """How large the comparison is; the task itself is frozen in `clips.Difficulty`."""

    train_clips: int = 2000  # trained on, in the looks of training
    test_clips: int = 400  # tested on, in looks never trained on
    curve_clips: int = 100  # of those, asked during training, for the curves
    steps: int = 900  # optimiser steps of each method, both stages together
    # Share of STA's steps that train STA alone. Short, since so small a frozen language model can't yet use what STA adds:
    # longer, and STA learns to shout single answers, from which stage two must first recover.
    stage_one: float = 0.06
    batch_size: int = 16  # clips a step
    points: int = 6  # how often the curves are measured
    causal: bool = False  # whether STA's frames attend to themselves and earlier ones alone, as for a stream
    order: str = "after_spatial"  # of STA in a block
    rank: int = 8  # LoRA's beside STA; attn.qkv has twice as much, as published
    learning_rate: float = 5e-3  # of LoRA
    sta_learning_rate: float = 1e-3  # of STA in stage two
    stage_one_learning_rate: float = 1e-3  # and in stage one

    @classmethod
    def quick(cls) -> DemoSettings:
        """A run of seconds that shows every step and proves nothing."""
        return cls(train_clips=20, test_clips=20, curve_clips=10, steps=4, batch_size=4, points=1)

    def from_tiny_base(self) -> DemoSettings:
        """With what was best where methods begin with the tiny base as it is, see docs/demo.md."""
        return dataclasses.replace(self, order="before_spatial", learning_rate=3e-3)


def train_method(
    method: str,
    settings: DemoSettings,
    seed: int,
    data: VideoDataset,
    curve: VideoDataset,
    folder: Path,
    base: Path = TINY_BASE,
) -> TrainingResult:
    """Train one method from the tiny base, or from another folder of its kind."""
    first = max(1, round(settings.steps * settings.stage_one))
    rank = settings.rank if method != "lora" else equal_rank(settings)
    every = max(1, settings.steps // settings.points)
    config = TrainingConfig(
        learning_rate=settings.learning_rate,
        batch_size=settings.batch_size,
        device_batch_size=settings.batch_size,
        max_steps=settings.steps,
        warmup=0.03,
        precision="fp32",
        seed=seed,
        sta=method == "sta",
        lora_targets="language" if method == "lora_language" else "all",
        lora_rank=rank,
        lora_alpha=rank,
        frames=FRAME_SETTINGS,
        on_bad_sample="error",
        num_workers=0,
        save_steps=10 * settings.steps,
        eval_steps=every,
        keep_best=False,
    )
    if method == "sta":
        config = dataclasses.replace(
            config,
            sta_config={"order": settings.order, "causal": settings.causal},
            sta_learning_rate=settings.sta_learning_rate,
            stage1={"max_steps": first, "sta_learning_rate": settings.stage_one_learning_rate},
            stage2={"max_steps": settings.steps - first},
        )
    if method != "lora_language":
        config = dataclasses.replace(config, lora_qkv_rank=2 * rank, lora_qkv_alpha=2 * rank)
    return train(
        tiny_model(base),
        data,
        output_dir=folder,
        stage="both" if method == "sta" else "2",
        config=config,
        eval_fn=lambda model: {"accuracy": evaluate(model, curve, batch_size=50, max_new_tokens=4).accuracy},
        overwrite=True,
    )


def equal_rank(settings: DemoSettings) -> int:
    """The smallest rank at which LoRA alone has at least as many parameters as STA and its LoRA together."""

    def count(rank: int, *, sta: bool) -> int:
        model = tiny_model()
        handle = sta_adapter.inject_sta(model) if sta else None
        config = TrainingConfig(
            sta=sta, lora_rank=rank, lora_alpha=rank, lora_qkv_rank=2 * rank, lora_qkv_alpha=2 * rank
        )
        wrapped = peft.get_peft_model(model, lora_config(model, handle, config))
        return sum(p.numel() for p in wrapped.parameters() if p.requires_grad)

    wanted, rank = count(settings.rank, sta=True), settings.rank
    while count(rank, sta=False) < wanted:
        rank += 1
    return rank
