"""docs/first-adapter.md, step by step: its commands in order in one folder, with a Hub on loopback."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from hub_server import HubServer

PAGE = (Path(__file__).parent.parent / "docs" / "first-adapter.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
MAKE_CLIPS, LOAD = (code for kind, code in BLOCKS if kind == "python")
FEWER = {"range(400)": "range(20)", "range(1000, 1050)": "range(1000, 1010)"}
COMMANDS = [
    shlex.split(line)[1:]
    for kind, code in BLOCKS
    for line in code.replace("\\\n", " ").splitlines()
    if not kind and line.startswith("sta-adapter ")
]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """The folder that all steps share, a Hub, and the variables that lead to it."""
    with HubServer() as hub, pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("first-adapter")
        patch.chdir(folder)
        yield folder, hub


def run(words):
    from sta_adapter.cli import cli
    from sta_adapter.tiny_base import TINY_ADAPTER, TINY_BASE

    folders = {"$TINY": str(TINY_BASE), "$LONGER": str(TINY_ADAPTER)}
    done = CliRunner().invoke(cli, [folders.get(word, word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def step(name, *more, adapter="my-adapter"):
    (found,) = [words for words in COMMANDS if words[0] == name and ("--adapter" not in words or adapter in words)]
    return run([*found, *more])


class Steps:
    """Each works on what those before it have made, so all are one test."""

    def clips(self, workplace):
        code = MAKE_CLIPS
        for many, few in FEWER.items():
            assert many in code
            code = code.replace(many, few)
        exec(compile(code, "docs/first-adapter.md", "exec"), {})
        assert sorted(file.name for file in workplace[0].glob("*.jsonl")) == ["test.jsonl", "train.jsonl"]

    def look_before(self, workplace):
        assert "backbone    qwen2_vl" in step("inspect")
        assert "20 samples, 0 of them bad" in step("check-data")

    def train(self, workplace):
        assert "The adapter is in my-adapter." in step(
            "train", "--epochs", "1", "--set", "num_workers=0", "--set", "stage1.max_steps=1"
        )

    def evaluate(self, workplace):
        table = step("evaluate", "--num-workers", "0")
        assert all(f"{name}, {order}" in table for name in ("base", "adapter") for order in ("ordered", "shuffled"))
        step("evaluate", "--num-workers", "0", adapter="$LONGER")
        found = json.loads((workplace[0] / "results-longer" / "results.json").read_text())["adapter"]
        assert found["ordered"]["overall"]["correct"] > found["reversed"]["overall"]["correct"]

    def look(self, workplace):
        step("visualize")
        assert (workplace[0] / "look" / "index.html").stat().st_size > 10_000

    def push(self, workplace, monkeypatch):
        workplace[1].use(monkeypatch, workplace[0] / "cache")
        first, second = [words for words in COMMANDS if words[0] == "push"]
        assert "would upload" in run(first)
        assert "uploaded to user/my-adapter in one commit" in run(second)

    def load_in_a_new_process(self, workplace):
        folder, hub = workplace
        environment = {**hub.environment(folder / "other-home"), "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-c", LOAD], capture_output=True, text=True, cwd=folder, env=environment)
        assert done.returncode == 0, done.stderr
        assert "STAHandle(backbone='qwen2_vl'" in done.stdout


@pytest.mark.slow
def test_every_step_in_order(workplace, monkeypatch):
    steps = Steps()
    steps.clips(workplace)
    steps.look_before(workplace)
    steps.train(workplace)
    steps.evaluate(workplace)
    steps.look(workplace)
    steps.push(workplace, monkeypatch)
    steps.load_in_a_new_process(workplace)
