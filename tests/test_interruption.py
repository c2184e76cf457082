"""Runs that are killed, or whose disk is full, at any moment: nothing is lost, and the end is the same to the bit."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_qwen import make_processor, write_samples

from sta_adapter.training.checkpoints import drop_incomplete, last_checkpoint, mark_complete, rotate

KILLED, FULL = -9, 3


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of all runs that interrupted_run.py makes, and its report."""
    folder = tmp_path_factory.mktemp("interrupted")
    write_samples(folder / "data", 8)
    make_processor(folder / "data" / "tokenizer")
    script = Path(__file__).with_name("interrupted_run.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, script, folder / "data", folder]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder, json.loads((folder / "report.json").read_text()), done.stderr


def assert_same(one, other, *names):
    for name in names:
        a, b = load_file(one / name), load_file(other / name)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), name


def result(folder, stage):
    found = json.loads((folder / stage / "result.json").read_text())
    return found["steps"], [entry["loss"] for entry in found["history"] if "loss" in entry]


@pytest.mark.slow
def test_ten_kills_end_with_the_same_weights(runs):
    folder, report, errors = runs
    assert (report["whole"], report["killed"]) == (0, [KILLED] * 10 + [0]), errors
    assert {stage for stage, _, _ in report["chosen"]} == {"stage1", "stage2"}
    files = ("stage1/trained", "stage2/trained", "sta_adapter", "adapter_model")
    assert_same(folder / "killed", folder / "whole", *(f"{file}.safetensors" for file in files))
    for stage, steps in (("stage1", 4), ("stage2", 6)):
        assert result(folder / "killed", stage) == result(folder / "whole", stage)
        assert result(folder / "killed", stage)[0] == steps


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "status"), [("killed in saving", KILLED), ("disk full", FULL)], ids=["killed", "full"]
)
def test_the_last_good_checkpoint_stays(runs, name, status):
    folder, report, errors = runs
    *failed, last = report[name]
    assert len(failed) >= 8, errors  # files of a checkpoint
    assert {(attempt["status"], attempt["last"]) for attempt in failed} == {(status, "checkpoint-2")}, errors
    assert {attempt["half"] for attempt in failed} == {
        status == KILLED
    }  # a full disk is cleared of the half-written one
    assert (last["status"], last["last"]) == (0, "checkpoint-4")
    assert_same(folder / name, folder / "whole", "stage1/trained.safetensors")
    assert not [path.name for path in folder.joinpath(name).rglob(".*")]


# ---- which checkpoints count


@pytest.fixture
def checkpoints(tmp_path):
    """Complete checkpoints of the steps 2, 4 and 10."""
    for step in (2, 4, 10):
        path = tmp_path / f"checkpoint-{step}"
        (path / "below").mkdir(parents=True)
        (path / "weights").write_text("abc")
        (path / "below" / "state").write_text("def")
        mark_complete(path)
    return tmp_path


def steps(folder):
    return sorted(int(path.name.split("-")[1]) for path in folder.iterdir())


def test_the_newest_counts(checkpoints, tmp_path):
    assert last_checkpoint(checkpoints).name == "checkpoint-10"
    assert last_checkpoint(tmp_path / "nowhere") is None


DAMAGES = {
    "unmarked": lambda path: (path / "complete.json").unlink(),
    "no_json": lambda path: (path / "complete.json").write_text('{"weigh'),
    "shorter": lambda path: (path / "weights").write_text("ab"),
    "missing": lambda path: shutil.rmtree(path / "below"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_checkpoints_do_not_count(checkpoints, damage):
    damage(checkpoints / "checkpoint-10")
    assert last_checkpoint(checkpoints).name == "checkpoint-4"
    drop_incomplete(checkpoints)
    assert steps(checkpoints) == [2, 4]


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [(1, None, [10]), (2, None, [4, 10]), (5, None, [2, 4, 10]), (1, 2, [2, 10]), (2, 2, [2, 10]), (1, 10, [10])],
)
def test_the_newest_and_the_best_stay(checkpoints, keep, best, left):
    rotate(checkpoints, keep, best and f"elsewhere/checkpoint-{best}")
    assert steps(checkpoints) == left
