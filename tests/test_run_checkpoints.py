"""Checkpoints of a run as files: which one counts, which stay, and what goes back into a model."""

import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sta_adapter.errors import CheckpointError
from sta_adapter.training.checkpoints import (
    COMPLETE_FILE,
    TRAINED_FILE,
    drop_incomplete,
    last_checkpoint,
    load_trained,
    mark_complete,
    numpy_allowed,
    rotate,
    trained_state,
)


@pytest.fixture
def folder(tmp_path):
    """Complete checkpoints at steps 2, 4, 6, 8 and 10, of which 10 comes before 2 by its name."""
    for step in (2, 4, 6, 8, 10):
        place = tmp_path / f"checkpoint-{step}" / "deeper"
        place.mkdir(parents=True)
        (place / "a.bin").write_bytes(bytes(step))
        mark_complete(place.parent)
    return tmp_path


def steps(folder):
    return sorted(int(path.name.partition("-")[2]) for path in folder.glob("checkpoint-*"))


def test_a_checkpoint_is_marked_with_the_sizes_of_its_files(folder):
    assert json.loads((folder / "checkpoint-6" / COMPLETE_FILE).read_text()) == {"deeper/a.bin": 6}


def test_files_reach_the_disk_before_their_checkpoint_counts(folder, monkeypatch):
    synced, real = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(os.fstat(file).st_size), real(file)))
    place = folder / "checkpoint-12"
    place.mkdir()
    (place / "a.bin").write_bytes(bytes(1234))
    mark_complete(place)
    assert synced[0] == 1234


@pytest.mark.parametrize("damage", ["cut", "gone", "unmarked", "no json"])
def test_what_is_not_whole_does_not_count(folder, damage):
    place = folder / "checkpoint-10"
    if damage == "cut":
        (place / "deeper" / "a.bin").write_bytes(b"1")
    elif damage == "gone":
        (place / "deeper" / "a.bin").unlink()
    elif damage == "unmarked":
        (place / COMPLETE_FILE).unlink()
    else:
        (place / COMPLETE_FILE).write_text("{")
    assert last_checkpoint(folder).name == "checkpoint-8"
    drop_incomplete(folder)
    assert steps(folder) == [2, 4, 6, 8]


def test_other_folders_are_no_checkpoints(folder):
    for name in ("checkpoint-x", "checkpoint-"):
        (folder / name).mkdir()
        mark_complete(folder / name)
    assert last_checkpoint(folder).name == "checkpoint-10"
    assert last_checkpoint(folder / "nowhere") is None


@pytest.mark.parametrize(
    ("keep", "best", "stay"),
    [
        (1, None, [10]),
        (2, None, [8, 10]),
        (3, None, [6, 8, 10]),
        (9, None, [2, 4, 6, 8, 10]),
        (1, "out/checkpoint-4", [4, 10]),
        (2, "out/checkpoint-4", [4, 10]),
        (3, "out/checkpoint-4", [4, 8, 10]),
        (2, "out/checkpoint-10", [8, 10]),
        (2, "out/checkpoint-5", [8, 10]),
    ],
)
def test_the_newest_and_the_best_stay(folder, keep, best, stay):
    rotate(folder, keep, best)
    assert steps(folder) == stay


@pytest.fixture
def model():
    """Of its two layers the second trains."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    model[0].requires_grad_(False)
    return model


def test_what_was_trained_comes_back(model, tmp_path):
    state = trained_state(model)
    assert list(state) == ["1.weight", "1.bias"]
    save_file({name: value + 1 for name, value in state.items()}, tmp_path / TRAINED_FILE)
    load_trained(model, tmp_path)
    assert all(torch.equal(value, state[name] + 1) for name, value in trained_state(model).items())


@pytest.mark.parametrize(
    ("change", "name"),
    [({"1.bias": None}, "1.bias"), ({"0.weight": (3, 2)}, "0.weight"), ({"1.weight": (4, 2)}, "1.weight")],
    ids=["missing", "unexpected", "shape"],
)
def test_what_another_run_trained_is_refused(model, tmp_path, change, name):
    state = trained_state(model)
    changed = {**state, **{key: None if shape is None else torch.ones(shape) for key, shape in change.items()}}
    save_file({key: value for key, value in changed.items() if value is not None}, tmp_path / TRAINED_FILE)
    with pytest.raises(CheckpointError, match=f"of another run: 1 parameters are .* such as {name}"):
        load_trained(model, tmp_path)
    assert all(torch.equal(value, state[key]) for key, value in trained_state(model).items())


def test_a_damaged_file_is_named(model, tmp_path):
    (tmp_path / TRAINED_FILE).write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match=r"can't read .*trained\.safetensors.* go on from an earlier checkpoint"):
        load_trained(model, tmp_path)


@pytest.mark.parametrize("older", [False, True], ids=["here", "before_2.5"])
def test_a_random_state_of_numpys_is_read_again(older, tmp_path, monkeypatch):
    """torch 2.4 has no list of what may be read, and asks for none."""
    if older:
        monkeypatch.delattr(torch.serialization, "safe_globals", raising=False)
    state, default = np.random.get_state(), {"weights_only": False} if older else {}
    torch.save(state, tmp_path / "rng_state.pth")
    with numpy_allowed():
        found = torch.load(tmp_path / "rng_state.pth", **default)  # as transformers does
    assert np.array_equal(found[1], state[1])
