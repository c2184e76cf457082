"""The outcome of an evaluation: predictions, and scores with their intervals."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypedDict

from sta_adapter.evaluation.answering import Prediction

EXAMPLES, LONGEST_SAID = 3, 200  # of answers that could not be read
Z95 = 1.959963984540054  # two-sided 95 %


class ScoreReport(TypedDict):
    """What `results.json` holds of a `Score`."""

    accuracy: float
    low: float
    high: float
    correct: int
    total: int


class RunReport(TypedDict, total=False):
    """What it holds of an `EvaluationResult`."""

    frames: str
    overall: ScoreReport
    categories: dict[str, ScoreReport]
    unmatched: int
    unmatched_examples: list[dict[str, str]]
    bad_samples: list[str]
    seconds: float
    predictions: list[dict[str, object]]


@dataclass(frozen=True)
class Score:
    """A share of right answers, with its 95 % Wilson interval."""

    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        """Right answers among all; 0 where there are none."""
        return self.correct / self.total if self.total else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the accuracy."""
        return wilson(self.correct, self.total)

    def to_dict(self) -> ScoreReport:
        """Plain values."""
        low, high = self.interval
        return {"accuracy": self.accuracy, "low": low, "high": high, "correct": self.correct, "total": self.total}


@dataclass(frozen=True)
class EvaluationResult:
    """Outcome of one evaluation.

    Attributes:
        predictions: one of each usable sample.
        bad_samples: samples that could not be used, with the reason; they don't count.
        frame_order: "ordered", "shuffled" or "reversed".
        seconds: how long it took.
    """

    predictions: list[Prediction]
    bad_samples: list[str] = field(default_factory=list)
    frame_order: str = "ordered"
    seconds: float = 0.0

    @property
    def overall(self) -> Score:
        """Over all samples."""
        return _score(self.predictions)

    @property
    def accuracy(self) -> float:
        """Over all samples."""
        return self.overall.accuracy

    @property
    def categories(self) -> dict[str, Score]:
        """By the samples' category, in the order in which they came."""
        names = dict.fromkeys(p.category for p in self.predictions if p.category is not None)
        return {name: _score([p for p in self.predictions if p.category == name]) for name in names}

    def to_dict(self, *, predictions: bool = True) -> RunReport:
        """Plain values, for JSON."""
        unread = [prediction for prediction in self.predictions if prediction.unmatched]
        values: RunReport = {
            "frames": self.frame_order,
            "overall": self.overall.to_dict(),
            "categories": {name: score.to_dict() for name, score in self.categories.items()},
            "unmatched": len(unread),
            "unmatched_examples": [
                {"source": p.source, "said": p.prediction[:LONGEST_SAID]} for p in unread[:EXAMPLES]
            ],
            "bad_samples": self.bad_samples,
            "seconds": round(self.seconds, 3),
        }
        if predictions:
            values["predictions"] = [dataclasses.asdict(prediction) for prediction in self.predictions]
        return values


def wilson(correct: int, total: int, z: float = Z95) -> tuple[float, float]:
    """The Wilson interval of a share; (0, 1) where nothing was counted."""
    if total == 0:
        return 0.0, 1.0
    share, spread = correct / total, z * z / total
    middle = share + spread / 2
    half = z * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    low = 0.0 if correct == 0 else (middle - half) / (1 + spread)  # exactly, where rounding would miss it
    return low, 1.0 if correct == total else (middle + half) / (1 + spread)


def _score(predictions: Iterable[Prediction]) -> Score:
    right = [prediction.correct for prediction in predictions]
    return Score(sum(right), len(right))
