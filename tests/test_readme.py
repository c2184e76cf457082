"""README stays true: its code runs, and each of its commands does, on the tiny base and made clips."""

import re
import shlex
import shutil
from pathlib import Path

import make_benchmarks
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
COMMANDS = [
    line for kind, block in BLOCKS if not kind for line in block.splitlines() if line.startswith("sta-adapter ")
]
HUB_ID = "Qwen/Qwen2-VL-2B-Instruct"


def made_checkpoint(folder):
    """A folder like one of the published STAVEQ2 code: the tiny base with its temporal attention's weights."""
    from safetensors.torch import load_file

    from sta_adapter.demo import TINY_BASE

    folder.mkdir()
    (folder / "config.json").write_text((TINY_BASE / "config.json").read_text())
    tensors = load_file(TINY_BASE / "model.safetensors")
    width, depth = 48, 1 + max(int(m[1]) for k in tensors if (m := re.search(r"visual\.blocks\.(\d+)\.", k)))
    size = {"qkv": (3 * 16, width), "proj": (width, 16)}
    for index in range(depth):
        for name, shape in size.items():
            tensors[f"visual.blocks.{index}.temp_attn.{name}.weight"] = torch.zeros(shape)
            tensors[f"visual.blocks.{index}.temp_attn.{name}.bias"] = torch.zeros(shape[0])
        tensors[f"visual.blocks.{index}.norm3.weight"] = torch.ones(width)
        tensors[f"visual.blocks.{index}.norm3.bias"] = torch.zeros(width)
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with the files that the commands name."""
    from sta_adapter.demo.clips import write_dataset

    folder = tmp_path_factory.mktemp("readme")
    write_dataset(folder, "train", range(10))
    write_dataset(folder, "test", range(100, 110), "held_out")
    made_checkpoint(folder / "STAVEQ2-CHECKPOINT")
    make_benchmarks.mvbench(folder / "MVBENCH")
    shutil.copy(next((folder / "test").glob("*.mp4")), folder / "clip.mp4")
    return folder


def test_there_are_commands():
    names = [shlex.split(command)[1] for command in COMMANDS]
    assert names == ["inspect", "train", "evaluate", "evaluate", "visualize", "app", "convert"]


@pytest.mark.slow
def test_commands(workplace, monkeypatch):
    """In order, as each works on what those before it have made."""
    from sta_adapter.cli import cli
    from sta_adapter.demo import TINY_BASE

    monkeypatch.chdir(workplace)
    for command in COMMANDS:
        words = [str(TINY_BASE) if word == HUB_ID else word for word in shlex.split(command)[1:]]
        if words[0] == "train":
            words += ["--batch-size", "4"]
        if words[0] == "app":  # it serves until Ctrl-C
            blocks = pytest.importorskip("gradio").Blocks
            monkeypatch.setattr(blocks, "block_thread", blocks.close)
        result = CliRunner().invoke(cli, words, catch_exceptions=False)
        assert result.exit_code == 0, f"{command}: {result.output}"


@pytest.mark.slow
def test_quick_start(tmp_path, monkeypatch):
    import transformers

    if not hasattr(transformers, "AutoModelForImageTextToText") or int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("the quick start is written for transformers 5")
    (code,) = [block for kind, block in BLOCKS if kind == "python"]
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["handle"].backbone == "qwen2_vl"
    assert (tmp_path / "my-adapter" / "sta_adapter.safetensors").exists()


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_length():
    assert len(README.splitlines()) < 200
