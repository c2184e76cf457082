"""What training shows while it runs."""

import io
import sys
import types

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from sta_adapter.training.progress import Progress
from sta_adapter.training.watch import Watch


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def shown(monkeypatch, tmp_path):
    """Makes a stage of ten steps of four clips, two seconds each, whose errors go to a stream; gives it and what a step shows."""

    def begin(stream):
        monkeypatch.setattr(sys, "stderr", stream)
        now = [0.0]
        watch = types.SimpleNamespace(loss=None)
        progress = Progress("stage 1", watch, 4, "the loss on 8 samples", clock=lambda: now[0])
        state = TrainerState(max_steps=10, is_world_process_zero=True)
        arguments = TrainingArguments(use_cpu=True, report_to="none")
        progress.on_train_begin(arguments, state, TrainerControl())
        rates = types.SimpleNamespace(get_last_lr=lambda: [1e-4])

        def step(loss):
            now[0] += 2
            state.global_step += 1
            watch.loss = loss
            progress.on_step_end(arguments, state, None, lr_scheduler=rates)

        return progress, state, step

    return begin


def test_the_bar_shows_the_loss_of_each_step(shown):
    stream = Terminal()
    progress, state, step = shown(stream)
    step(2.5)
    assert "loss 2.5 lr 0.0001 2 clips/s" in progress.bar.postfix
    assert " GB" in progress.bar.postfix
    progress.on_log(None, state, None, {"loss": 2.5, "learning_rate": 1e-4})
    step(1.25)
    assert "loss 1.25 lr" in progress.bar.postfix
    assert progress.bar.n == 2
    evaluated = {"eval_loss": 5.0, "eval_runtime": 1.0, "eval_samples_per_second": 3.0, "epoch": 1.0}
    progress.on_log(None, state, None, evaluated)
    assert progress.bar.postfix.endswith("eval_loss 5")
    assert "loss 1.25 lr" in progress.bar.postfix  # that of the training stays
    progress.on_log(None, state, None, {"eval_score": 0.5, "eval_accuracy": 0.5})
    assert progress.bar.postfix.endswith("eval_loss 5 eval_accuracy 0.5")
    bar = progress.bar
    assert bar.dynamic_ncols  # a terminal that is made narrower
    progress.close()
    assert (bar.disable, progress.bar) == (True, None)
    assert stream.getvalue().endswith("\n")  # what comes next stands on a line of its own


def test_the_bar_of_an_evaluation_says_what_it_measures(shown):
    stream = Terminal()
    progress, state, _ = shown(stream)
    progress.on_prediction_step(None, state, None, eval_dataloader=range(3))
    assert progress.inner.desc.startswith("stage 1: measuring the loss on 8 samples")
    assert (progress.inner.n, progress.inner.total) == (1, 3)
    progress.on_evaluate(None, state, None)
    assert progress.inner is None
    progress.close()


def test_plain_lines_without_a_terminal(shown):
    stream = io.StringIO()
    progress, state, step = shown(stream)
    step(2.5)
    progress.on_log(None, state, None, {"loss": 2.5})
    progress.on_prediction_step(None, state, None, eval_dataloader=range(3))
    progress.on_prediction_step(None, state, None, eval_dataloader=range(3))
    progress.on_log(None, state, None, {"eval_loss": 3.5, "eval_runtime": 1.0})
    progress.on_evaluate(None, state, None)
    progress.on_log(None, state, None, {"train_runtime": 2.0, "train_loss": 9.0})
    progress.close()
    lines = stream.getvalue().split("\n")
    assert lines[0].startswith("stage 1: step 1/10, loss 2.5, lr 0.0001, 2 clips/s, ")
    assert lines[0].endswith(" GB, left 0:00:18")
    assert lines[1:] == ["stage 1: measuring the loss on 8 samples, 3 batches", "stage 1: step 1/10, eval_loss 3.5", ""]


def test_the_summary_before_the_first_step(tmp_path, monkeypatch):
    from torch import nn

    from sta_adapter.training import TrainingConfig
    from sta_adapter.training.progress import describe
    from sta_adapter.training.stage import Stage

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config = TrainingConfig(batch_size=8, epochs=2)
    stage = Stage("1", config, tmp_path / "my run" / "stage1", range(20))
    model = nn.Linear(10, 10)
    model.bias.requires_grad_(False)
    lines = describe(stage, model, tmp_path / "checkpoint-3")
    assert lines == [
        "stage 1",
        "  trains    STA: 100 of 110 parameters",
        "  data      20 samples, 6 steps of 8 clips (4 on a device at a time, 2 times)",
        "  rate      0.0001, cosine, rising for 2% of the steps",
        "  computes  in fp32 on the CPU, gradient checkpointing off",
        f"  saves     into '{tmp_path}/my run/stage1', every 100 steps or 15 minutes",
        f"  shows     tensorboard --logdir '{tmp_path}/my run/stage1'",
        "  goes on   from checkpoint-3",
    ]


def test_short_runs_log_from_the_first_step(tmp_path):
    from sta_adapter.training import TrainingConfig
    from sta_adapter.training.arguments import training_arguments

    for steps, every in ((5, 1), (30, 3), (1000, 10)):
        found = training_arguments(TrainingConfig(), tmp_path, steps, 0, None, False)
        assert (found.logging_steps, found.logging_first_step) == (every, True)
        assert not found.logging_nan_inf_filter
    assert Watch("stage 1", TrainingConfig(), tmp_path).loss is None
