"""The file that predictions are kept in: what it holds, and what a later evaluation takes from it."""

import contextlib
import json

import pytest

from sta_adapter.errors import ConfigError
from sta_adapter.evaluation.prediction_log import PredictionLog

SETTINGS = {"model": "m", "seed": None}
QUESTIONS = ["left", "right", "left", "up"]


@contextlib.contextmanager
def opened(path, *about, overwrite=False):
    """A log that has read its file."""
    with PredictionLog(path, overwrite=overwrite) as log:
        log.read(*about)
        yield log


@pytest.fixture
def path(tmp_path):
    """A file with predictions for three of four questions, of which two are the same."""
    path = tmp_path / "deep" / "predictions.jsonl"
    with opened(path, SETTINGS, QUESTIONS) as log:
        log.open(log.done)
        for index in (2, 1, 0):
            log.add(index, {"said": f"é{index}"})
        log.add_bad(3, "no video")
        assert log.bad == {3: "no video"}
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_line_a_prediction(path):
    assert lines(path) == [
        {"settings": SETTINGS},
        {"index": 2, "question": "left", "prediction": {"said": "é2"}},
        {"index": 1, "question": "right", "prediction": {"said": "é1"}},
        {"index": 0, "question": "left", "prediction": {"said": "é0"}},
    ]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_prediction_is_in_the_file_at_once(path):
    with opened(path, SETTINGS, QUESTIONS) as log:
        log.open(log.done)
        log.add(3, {"said": "up"})
        assert lines(path)[-1] == {"index": 3, "question": "up", "prediction": {"said": "up"}}


def test_what_is_still_asked_is_taken(path):
    with opened(path, SETTINGS, ["down", "right", "left"], lambda index, kept: {**kept, "at": index}) as log:
        assert log.done == {1: {"said": "é1", "at": 1}, 2: {"said": "é2", "at": 2}}
    assert [line.get("question") for line in lines(path)] == [None, "right", "left"]


def test_a_line_that_was_cut_off_ends_the_file(path):
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    with opened(path, SETTINGS, QUESTIONS) as log:
        assert sorted(log.done) == [0, 1]  # the first "left" gets what there is
    path.write_bytes(whole[:-3] + b"\r" + whole.splitlines(keepends=True)[-1])
    with opened(path, SETTINGS, QUESTIONS) as log:
        assert len(log.done) == 2


@pytest.mark.parametrize(
    ("settings", "differ"),
    [({**SETTINGS, "seed": 1}, "seed"), ({"model": "m", "more": 2}, "more"), ({"model": "n", "x": 1}, "model, x")],
)
def test_other_settings_are_named(path, settings, differ):
    before = path.read_bytes()
    with (
        pytest.raises(ConfigError, match=rf"that differs in {differ}\. Take"),
        opened(path, settings, QUESTIONS),
    ):
        pass
    assert path.read_bytes() == before
    with opened(path, settings, QUESTIONS, overwrite=True) as log:
        assert not log.done
    assert lines(path) == [{"settings": settings}]


@pytest.mark.parametrize("first", ["[]", "3", '{"settings": 3}', "x"])
def test_a_file_of_something_else(path, first):
    path.write_text(f"{first}\n")
    with (
        pytest.raises(ConfigError, match=r"predictions of an evaluation that differs|line 1 is not a prediction"),
        opened(path, SETTINGS, QUESTIONS),
    ):
        pass


def test_without_a_file_predictions_are_kept_in_memory():
    with opened(None, SETTINGS, []) as log:
        log.add(4, {"said": "a"})
    assert log.done == {4: {"said": "a"}}


def test_a_part_of_another_evaluation_is_named(path):
    part = path.rename(path.with_name(f"{path.name}.part1"))
    with pytest.raises(ConfigError, match=rf"{part.name} holds predictions of an evaluation that differs in model"):
        PredictionLog(path).read({**SETTINGS, "model": "n"}, QUESTIONS)
