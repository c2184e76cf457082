"""The comparison: STA against LoRA with as many parameters, on the same clips, for the same steps.

Everything goes through the package's own training and evaluation; the clips are real files, read back from disk.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import sta_adapter
from sta_adapter.data import Collator, FrameSettings, VideoDataset
from sta_adapter.demo.clips import LABELS, PAIRS, write_dataset
from sta_adapter.demo.model import tiny_model, two_threads
from sta_adapter.errors import STAError
from sta_adapter.evaluation import Prediction, evaluate, wilson
from sta_adapter.loading import load_processor
from sta_adapter.tiny_base import TINY_BASE, TINY_BASE_FRAMES
from sta_adapter.training import TrainingConfig, TrainingResult, train
from sta_adapter.training.lora import lora_config

__all__ = [
    "DemoSettings",
    "FRAME_SETTINGS",
    "LOGITS",
    "METHODS",
    "answer_inputs",
    "answer_logits",
    "equal_rank",
    "run_demo",
    "summary",
]

logger = logging.getLogger(__name__)
METHODS = {
    "sta": "STA in front of the spatial attention, then STA and LoRA on both",
    "lora": "LoRA on language model and vision encoder, as many parameters",
    "lora_language": "LoRA on the language model alone",
}
FRAME_SETTINGS = FrameSettings(**TINY_BASE_FRAMES)
LOGITS = "answers.safetensors"


@dataclasses.dataclass(frozen=True)
class DemoSettings:
    """How large the comparison is; the task itself is frozen in `clips.Difficulty`.

    Attributes:
        train_clips: clips trained on, in the looks of training.
        test_clips: clips tested on, in looks never trained on.
        curve_clips: how many of those are asked during training, for the curves.
        steps: optimiser steps of each method, both stages together.
        stage_one: share of STA's steps that train STA alone. Short, since so small a frozen language model can't yet use
            what STA adds: longer, and STA learns to shout single answers, from which stage two must first recover.
        batch_size: clips a step.
        points: how often the curves are measured.
        causal: whether STA's frames attend to themselves and earlier ones alone, as for a stream.
        order: of STA in a block. The other one was 7 points worse on average over the three seeds of the search.
        rank: LoRA's rank beside STA; attn.qkv has twice as much, as published.
        learning_rate: of LoRA.
        sta_learning_rate: of STA in stage two.
        stage_one_learning_rate: of STA in stage one.
    """

    train_clips: int = 2000
    test_clips: int = 400
    curve_clips: int = 100
    steps: int = 900
    stage_one: float = 0.06
    batch_size: int = 16
    points: int = 6
    causal: bool = False
    order: str = "before_spatial"
    rank: int = 8
    learning_rate: float = 3e-3
    sta_learning_rate: float = 1e-3
    stage_one_learning_rate: float = 1e-3

    @classmethod
    def quick(cls) -> DemoSettings:
        """A run of seconds that shows every step and proves nothing."""
        return cls(train_clips=20, test_clips=20, curve_clips=10, steps=4, batch_size=4, points=1)


@two_threads()
def run_demo(
    folder: Path, settings: DemoSettings, seeds: Iterable[int], say: Callable[[str], None] = logger.info
) -> tuple[dict[str, Any], sta_adapter.STAHandle, VideoDataset]:
    """Write the clips, train and measure every method, check the saved adapter.

    Returns:
        What `results.json` holds, the handle of the first seed's STA model, and the test clips.

    Args:
        folder: gets `clips/`, `runs/`, and of the first seed's STA run `adapter/`.
        settings: how large.
        seeds: one comparison each.
        say: is told what is going on.

    Raises:
        STAError: the adapter, loaded in a new process, gives other answers.
    """
    started = time.perf_counter()
    seeds = list(seeds)
    results: dict[str, Any] = {"settings": dataclasses.asdict(settings), "versions": versions()}
    results |= {"seeds": seeds, "runs": []}
    for seed in seeds:
        say(f"writing {settings.train_clips + settings.test_clips} clips to {folder / 'clips'}, and reading them")
        data, test, curve = make_clips(folder, settings, seed)
        for method, name in METHODS.items():
            say(f"training, seed {seed}: {name}")
            run = folder / "runs" / f"{method}-{seed}"
            trained = train_method(method, settings, seed, data, curve, run)
            results["runs"].append({"method": method, "seed": seed, **measure(trained, test)})
            if trained.handle is not None and seed == seeds[0]:
                shown, asked = trained.handle, test
                results["reloaded"] = check_reload(shown, folder, test, seed)
    results["seconds"] = round(time.perf_counter() - started, 1)
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results, shown, asked


def make_clips(folder: Path, settings: DemoSettings, seed: int) -> tuple[VideoDataset, VideoDataset, VideoDataset]:
    """Write a seed's clips, and read them back: to train on, to test on, and those of the test for the curves.

    No two seeds share a clip, nor any with those that the settings were searched on, whose numbers are lower. All are
    decoded here, so that no method's training is charged for it.
    """
    clips, first, processor = folder / "clips" / f"seed{seed}", (seed + 11) * 10**7, load_processor(TINY_BASE)
    files = [
        write_dataset(clips, "train", range(first, first + settings.train_clips), "train", progress=True),
        write_dataset(clips, "test", range(first + 10**6, first + 10**6 + settings.test_clips), "held_out"),
    ]
    options: dict[str, Any] = {
        "frames": FRAME_SETTINGS,
        "on_bad_sample": "error",
        "cache": True,
        "decode_timeout": None,
    }
    data, test = (VideoDataset(file, processor, **options) for file in files)
    curve = VideoDataset(test.samples[: settings.curve_clips], processor, **options)
    for dataset in (data, test.as_prompts(), test.as_prompts("shuffled"), curve.as_prompts()):
        for index in range(len(dataset)):
            dataset[index]
    return data, test, curve


def train_method(
    method: str, settings: DemoSettings, seed: int, data: VideoDataset, curve: VideoDataset, folder: Path
) -> TrainingResult:
    """Train one method from the tiny base."""
    first = max(1, round(settings.steps * settings.stage_one))
    rank = settings.rank if method != "lora" else equal_rank(settings)
    every = max(1, settings.steps // settings.points)
    of_sta: dict[str, Any] = {
        "sta_config": {"order": settings.order, "causal": settings.causal},
        "sta_learning_rate": settings.sta_learning_rate,
        "stage1": {"max_steps": first, "sta_learning_rate": settings.stage_one_learning_rate},
        "stage2": {"max_steps": settings.steps - first},
    }
    of_encoder: dict[str, Any] = {"lora_qkv_rank": 2 * rank, "lora_qkv_alpha": 2 * rank}
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
        **(of_sta if method == "sta" else {}),
        **({} if method == "lora_language" else of_encoder),
    )
    return train(
        tiny_model(),
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


def measure(trained: TrainingResult, test: VideoDataset) -> dict[str, Any]:
    """Accuracy on the test clips, in all and per pair, with frames in order and shuffled; cost; curve."""
    found = {
        frames: evaluate(trained.model, test, frame_order=frames, batch_size=50, max_new_tokens=4)
        for frames in ("ordered", "shuffled")
    }
    last = list(trained.stages.values())[-1]
    step, curve = 0, []
    for stage in trained.stages.values():
        curve += [
            (step + entry["step"], entry["eval_accuracy"]) for entry in stage["history"] if "eval_accuracy" in entry
        ]
        step += stage["steps"]
    return {
        **{frames: result.to_dict(predictions=False) for frames, result in found.items()},
        "answers": [prediction.prediction for prediction in found["ordered"].predictions[: len(LABELS)]],
        "curve": curve,
        "trainable_parameters": last["trainable_parameters"],
        "seconds": round(sum(stage["seconds"] for stage in trained.stages.values()), 1),
        "within_pair": within_pair(found["ordered"].predictions),
    }


def within_pair(predictions: Iterable[Prediction]) -> float | None:
    """Among answers that name the right pair, the share that names the right one of the two; chance is one half."""
    partners = {label: pair for pair in PAIRS for label in pair}
    named = [p.correct for p in predictions if p.prediction.strip() in partners[p.answer]]
    return sum(named) / len(named) if named else None


def check_reload(handle: sta_adapter.STAHandle, folder: Path, test: VideoDataset, seed: int) -> dict[str, Any]:
    """Save the adapter, load it into a fresh model in a new process, and compare the logits of its answers bit for bit."""
    handle.save_pretrained(folder / "adapter")
    here, count = answer_logits(handle.model, test), len(test.samples)
    clips = folder / "clips" / f"seed{seed}" / "test.jsonl"
    command = [sys.executable, "-m", "sta_adapter.demo.reload", str(folder), str(clips)]
    subprocess.run(command, check=True)
    there = load_file(folder / "runs" / LOGITS)["logits"]
    if not torch.equal(here, there):
        raise STAError(
            f"the adapter in {folder / 'adapter'}, loaded in a new process, gives other answers: "
            f"the logits differ by up to {(here - there).abs().max().item():.3g}."
        )
    return {"clips": count, "bit_equal": True, "logits": list(here.shape)}


@torch.no_grad()
def answer_logits(model: nn.Module, test: VideoDataset) -> Tensor:
    """Logits (clips, vocabulary) of the first word of each answer."""
    model.eval()
    return torch.stack([model(**answer_inputs(test, i)).logits[0, -1].float() for i in range(len(test.samples))])


def answer_inputs(test: VideoDataset, index: int) -> dict[str, Tensor]:
    """The model's arguments for the prompt of one clip."""
    batch = Collator.of(test.processor, side="left")([test.as_prompts("ordered", 0)[index]])
    return {name: value for name, value in batch.items() if isinstance(value, Tensor) and name != "labels"}


def versions() -> dict[str, str]:
    """Of the packages that the figures depend on."""
    packages = {"sta-adapter": sta_adapter, "torch": torch, "transformers": transformers, "peft": peft}
    return {"python": platform.python_version(), **{name: module.__version__ for name, module in packages.items()}}


def summary(results: dict[str, Any], method: str) -> dict[str, Any]:
    """One row of the table: counts of all seeds added up, so that the intervals are those of all clips asked."""
    runs = [run for run in results["runs"] if run["method"] == method]
    row: dict[str, Any] = {"method": method, "name": METHODS[method]}
    for frames in ("ordered", "shuffled"):
        row[frames] = _added([run[frames]["overall"] for run in runs])
    pairs = runs[0]["ordered"]["categories"]
    row["pairs"] = {pair: _added([run["ordered"]["categories"][pair] for run in runs]) for pair in pairs}
    row["per_seed"] = [run["ordered"]["overall"]["accuracy"] for run in runs]
    row["trainable_parameters"] = runs[0]["trainable_parameters"]
    row["seconds"] = sum(run["seconds"] for run in runs) / len(runs)
    return row


def _added(scores: list[dict[str, Any]]) -> dict[str, float]:
    correct, total = (sum(score[key] for score in scores) for key in ("correct", "total"))
    low, high = wilson(correct, total)
    return {"accuracy": correct / total, "low": low, "high": high, "total": total}
