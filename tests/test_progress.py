"""The bar that training shows."""

import types

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from sta_adapter.training.progress import ProgressBar


@pytest.fixture
def bar(monkeypatch):
    """A bar's callback, and what was shown beside it."""
    shown = []
    made = types.SimpleNamespace(set_postfix=lambda values: shown.append(dict(values)), close=lambda: None, n=0)
    monkeypatch.setattr("tqdm.auto.tqdm", lambda **options: made)
    callback = ProgressBar("stage 1")
    state = TrainerState(max_steps=2, is_world_process_zero=True)
    callback.on_train_begin(TrainingArguments(use_cpu=True, report_to="none"), state, TrainerControl())
    return lambda logs: (callback.on_log(None, state, None, logs), shown[-1])[1]


def test_the_evaluation_s_loss_is_not_the_training_s(bar):
    assert bar({"loss": 2.0, "learning_rate": 1e-4}) == {"loss": "2.000"}
    evaluated = {"eval_loss": 5.0, "eval_runtime": 1.0, "eval_samples_per_second": 3.0, "epoch": 1.0}
    assert bar(evaluated) == {"loss": "2.000", "eval_loss": "5.000"}
    assert bar({"loss": 1.0}) == {"loss": "1.000", "eval_loss": "5.000"}


def test_what_else_is_measured(bar):
    assert bar({"eval_score": 0.5, "eval_accuracy": 0.5, "eval_loss": 3.0}) == {
        "eval_accuracy": "0.500",
        "eval_loss": "3.000",
    }
    assert bar({"train_runtime": 2.0, "train_loss": 9.0}) == {"eval_accuracy": "0.500", "eval_loss": "3.000"}
