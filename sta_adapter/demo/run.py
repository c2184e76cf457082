"""The comparison: STA against LoRA with as many parameters, on the same clips, for the same steps.

Everything goes through the package's own training and evaluation; the clips are real files, read back from disk.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import sta_adapter
from sta_adapter.data import Collator, VideoDataset
from sta_adapter.demo.clips import LABELS, describe, write_dataset
from sta_adapter.demo.methods import FRAME_SETTINGS, METHODS, SHOWN, DemoSettings, train_method
from sta_adapter.demo.model import save_adapter, two_threads
from sta_adapter.demo.reader import ReaderSettings, write_reader
from sta_adapter.demo.scores import Reloaded, Results, measure
from sta_adapter.errors import ConfigError, STAError
from sta_adapter.loading import load_processor
from sta_adapter.tiny_base import TINY_BASE

logger = logging.getLogger(__name__)
LOGITS = "answers.safetensors"
BATCH = 40  # clips whose answers are compared at a time


@two_threads()
def run_demo(
    folder: Path,
    settings: DemoSettings,
    reader: ReaderSettings,
    seeds: Iterable[int],
    say: Callable[[str], None] = logger.info,
    *,
    methods: Sequence[str] = SHOWN,
) -> tuple[Results, sta_adapter.STAHandle, VideoDataset]:
    """Write the clips, train and measure the methods, check the saved adapter.

    Returns:
        What `results.json` holds, the handle of the first seed's STA model, and the test clips.

    Args:
        folder: gets `clips/`, `runs/`, of the first seed `base/` with the reader, and of its STA run `adapter/`.
        settings: how large.
        reader: how long the reader of single frames learns that all methods begin with.
        seeds: one comparison each.
        say: is told what is going on.
        methods: of `METHODS`, with "sta" among them, else a ConfigError.

    Raises:
        STAError: the adapter, loaded in a new process, gives other answers.
    """
    unknown = [method for method in methods if method not in METHODS]
    if unknown or "sta" not in methods:
        raise ConfigError(f"methods are {list(methods)}, expected 'sta' and others of {', '.join(METHODS)}.")
    started = time.perf_counter()
    seeds = list(seeds)
    results: Results = {
        "settings": dataclasses.asdict(settings),
        "reader": dataclasses.asdict(reader),
        "versions": versions(),
        "seeds": seeds,
        "runs": [],
    }
    for seed in seeds:
        say(f"writing {settings.train_clips + settings.test_clips} clips to {folder / 'clips'}, and reading them")
        data, test, curve = make_clips(folder, settings, seed)
        say(f"teaching the reader of single frames that all methods begin with, seed {seed}")
        base = folder / ("base" if seed == seeds[0] else f"runs/base-{seed}")
        seen = [describe(LABELS[i % len(LABELS)], clip) for i, clip in enumerate(train_seeds(settings, seed))]
        write_reader(base, reader, seed, data, seen)
        for method in methods:
            say(f"training, seed {seed}: {METHODS[method]}")
            run = folder / "runs" / f"{method}-{seed}"
            trained = train_method(method, settings, seed, data, curve, run, base)
            results["runs"].append({"method": method, "seed": seed, **measure(trained, test)})
            if trained.handle is not None and seed == seeds[0]:
                shown, asked = trained.handle, test
                results["reloaded"] = check_reload(shown, folder, test, seed)
    results["seconds"] = round(time.perf_counter() - started, 1)
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results, shown, asked


def train_seeds(settings: DemoSettings, seed: int) -> range:
    """Of the clips to train on. No two seeds share a clip, nor any with those that the settings were searched on."""
    first = (seed + 11) * 10**7
    return range(first, first + settings.train_clips)


def make_clips(folder: Path, settings: DemoSettings, seed: int) -> tuple[VideoDataset, VideoDataset, VideoDataset]:
    """Write a seed's clips, and read them back: to train on, to test on, and those of the test for the curves.

    All are decoded here, so that no method's training is charged for it.
    """
    clips, seeds, processor = folder / "clips" / f"seed{seed}", train_seeds(settings, seed), load_processor(TINY_BASE)
    unseen = range(seeds.start + 10**6, seeds.start + 10**6 + settings.test_clips)
    files = [
        write_dataset(clips, "train", seeds, "train", progress=True),
        write_dataset(clips, "test", unseen, "held_out"),
    ]
    opened = functools.partial(
        VideoDataset,
        processor=processor,
        frames=FRAME_SETTINGS,
        on_bad_sample="error",
        cache=True,
        decode_timeout=None,
    )
    data, test = (opened(file) for file in files)
    curve = opened(test.samples[: settings.curve_clips])
    for dataset in (data, test.as_prompts(), test.as_prompts("shuffled"), curve.as_prompts()):
        for index in range(len(dataset)):
            dataset[index]
    return data, test, curve


def check_reload(handle: sta_adapter.STAHandle, folder: Path, test: VideoDataset, seed: int) -> Reloaded:
    """Save the adapter, load it into a fresh model in a new process, and compare the logits of its answers bit for bit."""
    save_adapter(handle, folder / "adapter")
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
    clips = range(len(test.samples))
    batches = [clips[first : first + BATCH] for first in clips[::BATCH]]
    return torch.cat([model(**answer_inputs(test, *batch)).logits[:, -1].float() for batch in batches])


def answer_inputs(test: VideoDataset, *indices: int) -> dict[str, Tensor]:
    """The model's arguments for the prompts of these clips."""
    prompts = test.as_prompts("ordered", 0)
    batch = Collator.of(test.processor, side="left")([prompts[index] for index in indices])
    return {name: value for name, value in batch.items() if isinstance(value, Tensor)}


def versions() -> dict[str, str]:
    """Of the packages that the figures depend on."""
    packages = {"sta-adapter": sta_adapter, "torch": torch, "transformers": transformers, "peft": peft}
    return {"python": platform.python_version(), **{name: module.__version__ for name, module in packages.items()}}
