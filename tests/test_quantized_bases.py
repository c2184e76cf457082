"""Bases in 4 and 8 bits: how they are asked for; with bitsandbytes at hand, how they train. Stand-in: test_training_modes.py."""

import importlib.util
import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from test_training import folder, processor  # noqa: F401
from tiny_qwen import save_base

from sta_adapter.cli import cli
from sta_adapter.errors import ConfigError, MissingExtraError
from sta_adapter.loading import QUANTIZED, load_model

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory, processor):  # noqa: F811
    return save_base(tmp_path_factory.mktemp("base"), processor)


def test_other_widths_are_refused(base):
    with pytest.raises(ConfigError, match="quantize is '2bit', expected one of 4bit, 8bit"):
        load_model(base, quantize="2bit")


def test_it_needs_its_package(base, monkeypatch):
    monkeypatch.setattr("sta_adapter.loading.importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="weights in 4bit need a package more: pip install bitsandbytes"):
        load_model(base, quantize="4bit")


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_the_commands_offer_what_there_is(command):
    parameter = next(p for p in cli.get_command(None, command).params if p.name == "quantize")
    assert tuple(parameter.type.choices) == QUANTIZED


@needs_bitsandbytes
@pytest.mark.parametrize("quantize", QUANTIZED)
def test_training_on_a_narrow_base(base, folder, tmp_path, quantize):  # noqa: F811
    narrow = load_model(base, device="cpu", quantize=quantize)
    widths = {p.dtype for p in narrow.parameters()}
    assert widths & {torch.uint8, torch.int8}
    line = [
        "train",
        "--model",
        str(base),
        "--data",
        str(folder / "data.jsonl"),
        "--out",
        str(tmp_path),
        "--max-steps",
        "3",
    ]
    line += ["--quantize", quantize, "--batch-size", "4", "--learning-rate", "0.01", "--dtype", "fp32"]
    for setting in ("num_workers=0", "logging_steps=1", "frames.min_tokens=null", "frames.max_tokens=null"):
        line += ["--set", setting]
    done = CliRunner().invoke(cli, line, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    for name in ("sta_adapter.safetensors", "adapter_model.safetensors"):
        assert {value.dtype for value in load_file(tmp_path / name).values()} == {torch.float32}
    for stage in ("stage1", "stage2"):
        history = json.loads((tmp_path / stage / "result.json").read_text())["history"]
        losses = [entry["loss"] for entry in history if "loss" in entry]
        assert losses[-1] < losses[0]
