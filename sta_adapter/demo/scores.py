"""What a method of the demo scored, and what all of its seeds did together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypedDict

from sta_adapter.data import VideoDataset
from sta_adapter.demo.clips import LABELS, PAIRS
from sta_adapter.demo.methods import METHODS
from sta_adapter.evaluation import Prediction, Score, evaluate
from sta_adapter.evaluation.result import RunReport, ScoreReport
from sta_adapter.training import TrainingResult


class Measured(TypedDict):
    """What one training run scored."""

    ordered: RunReport
    shuffled: RunReport
    answers: list[str]
    curve: list[tuple[float, float]]
    trainable_parameters: int
    seconds: float
    within_pair: float | None


class Run(Measured):
    """One method with one seed."""

    method: str
    seed: int


class Reloaded(TypedDict):
    """What the saved adapter gave in a new process."""

    clips: int
    bit_equal: bool
    logits: list[int]


class Results(TypedDict, total=False):
    """What `results.json` holds."""

    settings: dict[str, Any]
    reader: dict[str, float]
    versions: dict[str, str]
    seeds: list[int]
    runs: list[Run]
    reloaded: Reloaded
    seconds: float


class Row(TypedDict):
    """Of the table: a method over all seeds."""

    method: str
    ordered: ScoreReport
    shuffled: ScoreReport
    pairs: dict[str, ScoreReport]
    trainable_parameters: int
    seconds: float


def measure(trained: TrainingResult, test: VideoDataset) -> Measured:
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
        "ordered": found["ordered"].to_dict(predictions=False),
        "shuffled": found["shuffled"].to_dict(predictions=False),
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


def compared(results: Results) -> list[str]:
    """The methods that were run, in the table's order."""
    run = {run["method"] for run in results["runs"]}
    return [method for method in METHODS if method in run]


def summary(results: Results, method: str) -> Row:
    """One row of the table: counts of all seeds added up, so that the intervals are those of all clips asked."""
    runs = [run for run in results["runs"] if run["method"] == method]
    pairs = runs[0]["ordered"]["categories"]
    return {
        "method": method,
        "ordered": _added([run["ordered"]["overall"] for run in runs]),
        "shuffled": _added([run["shuffled"]["overall"] for run in runs]),
        "pairs": {pair: _added([run["ordered"]["categories"][pair] for run in runs]) for pair in pairs},
        "trainable_parameters": runs[0]["trainable_parameters"],
        "seconds": sum(run["seconds"] for run in runs) / len(runs),
    }


def _added(scores: list[ScoreReport]) -> ScoreReport:
    return Score(sum(score["correct"] for score in scores), sum(score["total"] for score in scores)).to_dict()
