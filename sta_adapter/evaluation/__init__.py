"""How often a model is right, with controls that take the order of frames away, and results side by side."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sta_adapter.evaluation.answering import Prediction
    from sta_adapter.evaluation.benchmarks import BENCHMARKS, EvalSet, load_benchmark
    from sta_adapter.evaluation.comparison import as_text, clips_of, compare
    from sta_adapter.evaluation.evaluator import evaluate
    from sta_adapter.evaluation.result import EvaluationResult, Score, wilson

__all__ = [
    "BENCHMARKS",
    "EvalSet",
    "EvaluationResult",
    "Prediction",
    "Score",
    "as_text",
    "clips_of",
    "compare",
    "evaluate",
    "load_benchmark",
    "wilson",
]

_PLACES = {
    "BENCHMARKS": "sta_adapter.evaluation.benchmarks",
    "EvalSet": "sta_adapter.evaluation.benchmarks",
    "load_benchmark": "sta_adapter.evaluation.benchmarks",
    "as_text": "sta_adapter.evaluation.comparison",
    "clips_of": "sta_adapter.evaluation.comparison",
    "compare": "sta_adapter.evaluation.comparison",
    "EvaluationResult": "sta_adapter.evaluation.result",
    "Prediction": "sta_adapter.evaluation.answering",
    "Score": "sta_adapter.evaluation.result",
    "evaluate": "sta_adapter.evaluation.evaluator",
    "wilson": "sta_adapter.evaluation.result",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for, so that commands start without torch."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    """What is there, for completion."""
    return sorted({*globals(), *__all__})
