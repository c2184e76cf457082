"""Tests that need lmms-eval, which has an environment of its own: `make test-lmms-eval`. Elsewhere they are not collected."""

import importlib.util
import os

import pytest
import torch
from lmms_eval_task import write_task

if importlib.util.find_spec("lmms_eval") is None:
    collect_ignore_glob = ["test_*.py"]
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A task of lmms-eval made of four tiny clips: `task/`, `data.jsonl` and the clips."""
    return write_task(tmp_path_factory.mktemp("local") / "here")


@pytest.fixture(scope="session")
def make_adapter(tmp_path_factory):
    """Saves an adapter with strong random weights for a model, and gives its folder."""

    def make(model):
        from sta_adapter import STAConfig, inject_sta

        torch.manual_seed(0)
        handle = inject_sta(model, STAConfig(init="normal"))
        for parameter in handle.parameters():
            parameter.data.normal_(0, 0.3)
        place = tmp_path_factory.mktemp("adapter")
        handle.save_pretrained(place)
        return place

    return make
