"""What `sta-adapter evaluate` asks, and of whom: the same questions of a model and of an engine, and how far the two agree."""

from __future__ import annotations

import contextlib
import gc
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from sta_adapter.cli.model_source import ModelSource
from sta_adapter.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from sta_adapter.data.conversation import Sample
    from sta_adapter.data.dataset import VideoDataset
    from sta_adapter.evaluation.engine import Agreement, Engine
    from sta_adapter.evaluation.result import EvaluationResult

    Orders = dict[str, EvaluationResult]

ORDERED = "ordered"
ENGINES = ("transformers", "vllm")


@dataclass(frozen=True)
class Measurement:
    """The runs of an evaluation ("base", "adapter" or both), each asked in all orders of frames; `out` keeps predictions."""

    source: ModelSource
    dataset: VideoDataset
    runs: list[str]
    orders: tuple[str, ...]
    device: str | None
    out: Path | None
    overwrite: bool
    arguments: Mapping[str, Any]  # of `evaluate`, the same for all runs

    def ask(self, answerer: nn.Module | Engine, run: str, some: VideoDataset | None = None) -> Orders:
        """The results of a run by the order of frames; with `some` of these alone, frames in order, and nothing is kept."""
        if some is not None:
            return {ORDERED: self._ask(answerer, run, ORDERED, some, None)}
        return {order: self._ask(answerer, run, order, self.dataset, self.out) for order in self.orders}

    def ask_model(self, some: VideoDataset | None = None) -> dict[str, Orders]:
        """As `ask`, of each run, the model itself, which is loaded for it."""
        from sta_adapter.evaluation.eval_mode import without_adapter

        net = self.source.load(self.device)
        found = {}
        for run in self.runs:
            with without_adapter(net) if run == "base" else contextlib.nullcontext():
                found[run] = self.ask(net, run, some)
        return found

    def _ask(
        self, answerer: nn.Module | Engine, run: str, order: str, data: VideoDataset, out: Path | None
    ) -> EvaluationResult:
        from sta_adapter.evaluation.evaluator import evaluate

        return evaluate(
            answerer,
            data,
            frame_order=order,
            predictions_file=None if out is None else out / f"{run}-{order}.jsonl",
            overwrite=self.overwrite and out is not None,
            progress=f"answers of the {run}",
            **self.arguments,
        )


class AskOptions(TypedDict):
    """The options of `sta-adapter evaluate` that depend on who answers."""

    engine: str
    engine_options: str | None
    check: int | None
    quantize: str | None
    device: str | None
    cache: str | None
    stop_at_letter: bool
    positions: str | None


class EngineReport(TypedDict):
    """What results.json says of an engine."""

    name: str
    version: str
    options: dict[str, object]
    agreement: dict[str, Agreement]


def check_options(options: AskOptions) -> dict[str, object]:
    """The engine's own options; those that are for another engine are refused."""
    text = options["engine_options"]
    if options["engine"] != "vllm":
        for name, value in (("engine-options", text), ("check", options["check"])):
            if value is not None:
                raise ConfigError(f"--{name} is for --engine vllm.")
        return {}
    refused = (
        (options["quantize"], "--quantize is for transformers; vLLM takes --engine-options '{\"quantization\": ...}'."),
        (options["device"], "--device is for transformers; vLLM takes CUDA_VISIBLE_DEVICES."),
        (
            options["cache"],
            "--cache keeps samples as transformers takes them, of which vLLM takes none; leave it out.",
        ),
        (options["stop_at_letter"], "--stop-at-letter is for transformers; leave it out."),
    )
    for given, reason in refused:
        if given not in (None, False):
            raise ConfigError(reason)
    if options["positions"] == "transformers":
        raise ConfigError("--positions transformers: vLLM numbers text as the base was trained; leave the option out.")
    try:
        found = json.loads(text or "{}")
    except ValueError as error:
        raise ConfigError(f"--engine-options {text!r} is not JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ConfigError(f"--engine-options {text!r}: expected an object, such as '{{\"tensor_parallel_size\": 2}}'.")
    return found


def ask_engine(measurement: Measurement, options: AskOptions) -> tuple[dict[str, Orders], EngineReport]:
    """The results of each run, each by an engine of its own, and what is to be said of the engine."""
    from sta_adapter.compatibility.releases import version
    from sta_adapter.evaluation.engine import agreement
    from sta_adapter.integrations.vllm.engine import VLLMEngine

    own, source, dataset = check_options(options), measurement.source, measurement.dataset
    some = _some(dataset, 16 if options["check"] is None else options["check"])
    expected = measurement.ask_model(some) if len(some) else {}
    _free_memory()
    most = _most(dataset.samples)
    results, agreements = {}, {}
    for run in measurement.runs:
        with VLLMEngine(
            source.model,
            source.adapter if run == "adapter" else None,
            revision=source.revision,
            trust_remote_code=source.trust_remote_code,
            any_base=source.any_base,
            dtype=source.dtype,
            most=most,
            options=own,
        ) as engine:
            results[run] = measurement.ask(engine, run)
            if expected:
                found = measurement.ask(engine, run, some)
                agreements[run] = agreement(found[ORDERED], expected[run][ORDERED])
        _free_memory()
    return results, {"name": "vllm", "version": version("vllm"), "options": own, "agreement": agreements}


def sentences(engine: EngineReport) -> list[str]:
    """What the report says of the engine."""
    said = [f"Answered by {engine['name']} {engine['version']}."]
    for run, found in engine["agreement"].items():
        scores = found["largest_difference"]
        apart = "" if scores is None else f"; log-likelihoods of options are at most {scores:.2g} apart"
        said.append(f"{run}: {found['equal']} of {found['samples']} answers are those of transformers{apart}.")
    return said if engine["agreement"] else [*said, "Not compared with transformers (--check 0)."]


def _some(dataset: VideoDataset, count: int) -> VideoDataset:
    """A data set of so many of its samples, spread evenly."""
    from sta_adapter.data.dataset import VideoDataset

    count = min(count, len(dataset.samples))
    chosen = [dataset.samples[number * len(dataset.samples) // count] for number in range(count)]
    return VideoDataset(chosen, dataset.processor, frames=dataset.frames, on_bad_sample=dataset.encoder.on_bad_sample)


def _most(samples: list[Sample]) -> dict[str, int]:
    """The most clips and pictures of a sample."""
    kinds = [[part["type"] for part in sample.visuals] for sample in samples]
    return {kind: max((found.count(kind) for found in kinds), default=0) for kind in ("video", "image")}


def _free_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
