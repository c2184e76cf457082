"""How often a model is right, with controls that take the order of frames away, and results side by side."""

from typing import TYPE_CHECKING

from sta_adapter._lazy import lazy

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

__getattr__, __dir__ = lazy(
    __name__,
    {
        "sta_adapter.evaluation.answering": ["Prediction"],
        "sta_adapter.evaluation.benchmarks": ["BENCHMARKS", "EvalSet", "load_benchmark"],
        "sta_adapter.evaluation.comparison": ["as_text", "clips_of", "compare"],
        "sta_adapter.evaluation.evaluator": ["evaluate"],
        "sta_adapter.evaluation.result": ["EvaluationResult", "Score", "wilson"],
    },
)
