"""How often a model is right, with controls that take the order of frames away, and results side by side."""

from sta_adapter.evaluation.benchmarks import BENCHMARKS, EvalSet, load_benchmark
from sta_adapter.evaluation.comparison import as_text, clips_of, compare
from sta_adapter.evaluation.evaluator import EvaluationResult, Prediction, Score, evaluate, wilson

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
