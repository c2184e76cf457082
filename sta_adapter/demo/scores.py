"""What a method of the demo scored, and what all of its seeds did together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sta_adapter.data import VideoDataset
from sta_adapter.demo.clips import LABELS, PAIRS
from sta_adapter.demo.methods import METHODS
from sta_adapter.evaluation import Prediction, evaluate, wilson
from sta_adapter.training import TrainingResult

__all__ = ["measure", "summary"]


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
