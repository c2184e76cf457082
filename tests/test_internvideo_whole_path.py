"""Both InternVideo chat models from JSON Lines to a published adapter: cut off and resumed, pushed, loaded elsewhere, shown in the app."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hub_server import HubServer
from safetensors.torch import load_file
from test_streaming import StopAt

from sta_adapter.cli import cli
from sta_adapter.data import FrameSettings
from sta_adapter.demo.clips import write_dataset
from sta_adapter.errors import CheckpointError
from sta_adapter.loading import load_adapter, load_model, load_processor
from sta_adapter.training import TrainingConfig, train
from sta_adapter.visualization.viewer import Viewer

EXAMPLES = Path(__file__).parent.parent / "examples"
SETTINGS = {"batch_size": 2, "device_batch_size": 2, "max_steps": 3, "save_steps": 1, "num_workers": 0, "lora_rank": 2}
LOAD = """
import json, sys
from sta_adapter.loading import load_adapter, load_model
from test_internvideo_whole_path import numbers
print(json.dumps(numbers(load_adapter(load_model(sys.argv[1], dtype="fp32", device="cpu"), "user/adapter"))))
"""


@pytest.fixture(scope="module", params=["internvideo2", "internvideo2_5"])
def base(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        import tiny_models

        return getattr(tiny_models, f"write_{request.param}_chat")(tmp_path_factory.mktemp("base") / request.param)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("clips"), "train", range(4), frames=8, size=32)


def fitted(base, data, folder, stage, *callbacks):
    config = TrainingConfig(**SETTINGS, frames=FrameSettings(nframes=4))
    options = {"processor": load_processor(base), "config": config, "callbacks": callbacks, "progress": False}
    return train(load_model(base, dtype="fp32", device="cpu"), data, output_dir=folder, stage=stage, **options)


@pytest.fixture(scope="module")
def adapter(base, data, tmp_path_factory):
    """Both stages, left alone."""
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    fitted(base, data, folder, "both")
    return folder


def numbers(model):
    """A sum over each tensor of the adapter."""
    return {
        name: float(tensor.double().abs().sum())
        for name, tensor in model.named_parameters()
        if "lora_" in name or ".sta." in name
    }


def test_a_run_that_is_cut_off_ends_as_one_left_alone(base, data, adapter, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fitted(base, data, tmp_path / "cut", "both", StopAt(2))
    fitted(base, data, tmp_path / "cut", "both")
    for name in ("sta_adapter.safetensors", "adapter_model.safetensors"):
        one, other = (load_file(folder / name) for folder in (adapter, tmp_path / "cut"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name


def test_pushed_and_loaded_in_a_new_process(base, adapter, tmp_path, monkeypatch):
    with HubServer() as hub:
        hub.use(monkeypatch, tmp_path / "cache")
        done = CliRunner().invoke(cli, ["push", str(adapter), "user/adapter"], catch_exceptions=False)
        assert "uploaded to user/adapter in one commit" in done.output, done.output
        environment = {**hub.environment(tmp_path / "home"), "PYTHONPATH": str(Path(__file__).parent)}
        found = subprocess.run(
            [sys.executable, "-c", LOAD, str(base)], capture_output=True, text=True, env=environment, cwd=tmp_path
        )
        assert found.returncode == 0, found.stderr
        with pytest.raises(CheckpointError, match="gone"):
            load_adapter(load_model(base, device="cpu"), "user/adapter", revision="gone")
    here = numbers(load_adapter(load_model(base, dtype="fp32", device="cpu"), adapter))
    assert json.loads(found.stdout.splitlines()[-1]) == here
    assert any("lora_" in name for name in here)


def test_the_app_answers_with_and_without_the_adapter(base, data, adapter):
    viewer = Viewer.load(base, adapter, device="cpu", dtype="fp32")
    clip = viewer.read(next(data.parent.glob("train/*.mp4")), "Which way?")
    without, _ = viewer.answers(clip, max_new_tokens=4)
    plain = Viewer.load(base, device="cpu", dtype="fp32", frames={"nframes": 4})
    assert (
        plain.answers(plain.read(next(data.parent.glob("train/*.mp4")), "Which way?"), max_new_tokens=4)[0] == without
    )
    seen = viewer.observe(clip)
    assert len(seen.attention) == len(viewer.handle.blocks)
