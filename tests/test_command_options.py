"""What a command's options say reaches the function that does the work, and what that gives back is told; it is replaced here."""

import contextlib
import json
import logging
import warnings
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
from click.testing import CliRunner

from sta_adapter.cli import cli
from sta_adapter.cli.evaluate import _samples
from sta_adapter.cli.measurement import Measurement
from sta_adapter.cli.model_source import ModelSource
from sta_adapter.cli.options import frame_rate, merged, one_or_several
from sta_adapter.cli.plan import describe as describe_plan
from sta_adapter.cli.push import describe as describe_push
from sta_adapter.cli.train import _device, _say_how_to_go_on
from sta_adapter.cli.watch import described
from sta_adapter.errors import ConfigError, STAWarning, TrainingStopped


@pytest.fixture
def replaced(monkeypatch):
    """Puts a recorder in the place of a function; gives the list of its calls."""

    def replace(target, gives=None):
        calls = []
        monkeypatch.setattr(target, lambda *args, **named: (calls.append((args, named)), gives)[1])
        return calls

    return replace


def run(*words):
    done = CliRunner().invoke(cli, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


MODEL = ("--model", "org/base", "--revision", "v1", "--dtype", "bf16", "--trust-remote-code", "--positions", "trained")
LOADED = {"revision": "v1", "dtype": "bf16", "trust_remote_code": True, "positions": "trained", "device": "cpu"}


def test_app(replaced):
    calls = replaced("sta_adapter.visualization.app.serve")
    run("app", *MODEL, "--device", "cpu", "--fps", 2, "--port", 7999, "--time-limit", 5, "--longest", 9)
    [((model, adapter), given)] = calls
    assert (model, adapter) == ("org/base", None)
    assert given["frames"] == {"fps": 2.0, "nframes": None}
    assert LOADED.items() <= given.items()
    assert (given["port"], given["time_limit"], given["longest"], given["share"]) == (7999, 5.0, 9.0, False)
    assert given["say"] is click.echo


def test_watch_loads_the_model_as_told(replaced):
    folder = Path("found")
    found = replaced("sta_adapter.cli.watch.find_adapter", folder)
    loads = replaced("sta_adapter.visualization.viewer.Viewer.load", SimpleNamespace(settings=SimpleNamespace(fps=2)))
    from sta_adapter.cli.watch import load_viewer

    options = {**LOADED, "model": "org/base", "adapter_revision": "a1", "any_base": True, "fps": 2.0}
    assert load_viewer("org/adapter", options).settings.fps == 2
    assert found == [(("org/adapter", "a1"), {})]
    [((model, adapter), given)] = loads
    assert (model, adapter) == ("org/base", folder)
    assert given["frames"] == {"fps": 2.0, "nframes": None}
    assert LOADED.items() <= given.items()


def test_watch_in_words():
    assert described({"event": "error", "seconds": 3661.0, "error": "it broke off"}) == "[1:01:01] it broke off"
    assert (
        described({"event": "restart", "seconds": 1.0, "reason": "other frames"})
        == "[0:00:01] begun anew: other frames"
    )


def test_visualize(replaced, tmp_path):
    viewer, numbers, clip = object(), {"frames": 2}, tmp_path / "clip.mp4"
    clip.write_bytes(b"a video")
    loads = replaced("sta_adapter.visualization.viewer.Viewer.load", viewer)
    looks = replaced("sta_adapter.cli.visualize.write_look", numbers)
    found = replaced("sta_adapter.cli.visualize.find_adapter", tmp_path)
    replaced("sta_adapter.cli.visualize.describe", "in words")
    line = [
        "visualize",
        clip,
        "--out",
        tmp_path / "out",
        *MODEL,
        "--adapter",
        "org/adapter",
        "--any-base",
        "--device",
        "cpu",
    ]
    assert run(*line) == "in words\n"
    assert run(*line, "--json") == json.dumps(numbers, indent=1) + "\n"
    assert found[0][0] == ("org/adapter", None, True)
    assert loads[0][0] == ("org/base", tmp_path)
    assert LOADED.items() <= loads[0][1].items()
    assert looks[0][0][:4] == (viewer, str(clip), tmp_path / "out", None)


def test_convert(replaced):
    config = {"layers": [0, 2], "order": "after_spatial", "token_order": "published"}
    found = {"backbone": "qwen2_vl", "encoder": {"depth": 3, "num_heads": 4, "head_dim": 8}, "config": config}
    calls = replaced("sta_adapter.integrations.staveq2.conversion.convert_published", found)
    assert "wrote out: qwen2_vl, 2 of 3 blocks, 4 heads of 8" in run(
        "convert", "in", "out", "--heads", 4, "--overwrite"
    )
    config["layers"] = "all"
    assert "3 of 3 blocks" in run("convert", "in", "out")
    given = {"order": None, "backbone": None, "config": None}
    assert calls[0] == (("in", "out"), {**given, "heads": 4, "overwrite": True})
    assert calls[1] == (("in", "out"), {**given, "heads": None, "overwrite": False})
    back = replaced("sta_adapter.integrations.staveq2.conversion.convert_to_published", "there")
    assert run("convert", "in", "out", "--to-published", "--prefix", "visual.") == "wrote there\n"
    assert back == [(("in", "out"), {"prefix": "visual.", "overwrite": False})]
    with pytest.raises(ConfigError, match="--prefix goes with --to-published"):
        run("convert", "in", "out", "--prefix", "visual.")


@pytest.mark.parametrize(("lora", "beside"), [(True, ", with LoRA weights beside STA"), (False, "")])
def test_export(replaced, lora, beside):
    calls = replaced("sta_adapter.integrations.vllm.export.export_adapter", lora)
    said = run("export", "org/adapter", "out", "--adapter-revision", "a1")
    assert said == f"wrote out{beside}: sta-adapter serve --model BASE --adapter out\n"
    assert calls == [(("org/adapter", "out"), {"revision": "a1", "overwrite": False})]
    for words in (["--revision", "v1"], ["--dtype", "bf16"]):
        with pytest.raises(
            ConfigError, match=f"^{words[0]} applies to the base, and has no effect without --merge-lora"
        ):
            run("export", "org/adapter", "out", *words)
    merges = replaced("sta_adapter.integrations.vllm.export.export_merged")
    run(
        "export",
        "org/adapter",
        "out",
        "--merge-lora",
        "org/base",
        "--adapter-revision",
        "a1",
        "--dtype",
        "bf16",
        "--overwrite",
    )
    given = {"adapter_revision": "a1", "dtype": "bf16", "revision": None, "base_model": None, "overwrite": True}
    assert merges == [(("org/adapter", "out", "org/base"), given)]


def test_serve(replaced, monkeypatch):
    replaced("sta_adapter.integrations.vllm.serve_line.trained_reader", "reader")
    lines = replaced("sta_adapter.integrations.vllm.serve_line.serve_line", ["vllm", "serve"])
    checks = replaced("sta_adapter.integrations.vllm.serve_line.check_plugins")
    monkeypatch.setenv("VLLM_PLUGINS", "sta_adapter")
    words = ["serve", "--model", "org/base", "--adapter", "org/adapter", "--adapter-revision", "a1"]
    assert run(*words, "--print", "--", "--port", "1") == "vllm serve\n"
    assert not checks
    monkeypatch.setattr("sta_adapter.cli.serve.os.path.exists", lambda path: True)
    started = replaced("sta_adapter.cli.serve.os.execv")
    run(*words, "--own-frames", "--revision", "v1")
    [((program, line), _)] = started
    assert (Path(program).name, line[1:]) == ("vllm", ["serve"])
    assert checks == [(("sta_adapter",), {})]
    known = {"revision": "a1", "any_base": False}
    assert lines[0] == (("org/base", "org/adapter"), {**known, "reader": "reader", "extra": ("--port", "1")})
    assert lines[1] == (("org/base", "org/adapter"), {**known, "reader": None, "extra": ("--revision", "v1")})


def publication(**changes):
    about = {
        "repo_id": "user/adapter", "changed": True, "files": {"a.safetensors": 1234}, "removed": ["old"], "card": "kept",
        "notes": ["look"], "pr_url": None, "commit_url": "https://hub/commit/1", "card_text": "# Card\n",
    }  # fmt: skip
    return SimpleNamespace(**{**about, **changes}, to_dict=lambda: about)


def test_push(replaced):
    calls = replaced("sta_adapter.adapter.push.push_folder", publication())
    said = run("push", "folder", "user/adapter", "--private", "--dry-run")
    assert said.startswith("would upload to user/adapter in one commit:")
    assert calls[0][1]["private"] is True
    assert calls[0][1]["dry_run"] is True
    run("push", "folder", "user/adapter")
    assert calls[1][1]["private"] is None  # a repository that is there stays as it is


def test_what_push_says():
    lines = [
        *("in one commit:", "         1,234 bytes  a.safetensors", "             removed  old"),
        *("README.md of the repository was kept.", "note: look"),
    ]
    done = describe_push(publication(), False)
    assert done[1:-2] == lines[1:]
    assert done[-2:] == ["https://hub/commit/1", 'load it: load_sta(model, "user/adapter")']
    assert describe_push(publication(), True)[1:] == lines[1:]
    assert describe_push(publication(card="new"), True)[-2:] == ["", "# Card"]
    assert describe_push(publication(changed=False), False) == [
        "user/adapter holds this adapter already; nothing was uploaded."
    ]


def test_demo(replaced, tmp_path):
    from transformers.utils import logging as transformers_logging

    from sta_adapter.demo.methods import DemoSettings
    from sta_adapter.demo.reader import ReaderSettings

    runs = replaced("sta_adapter.demo.run.run_demo", ("results", "handle", "test"))
    tables = replaced("sta_adapter.demo.report.print_table")
    replaced("sta_adapter.demo.report.write_report", tmp_path / "index.html")
    try:
        said = run("demo", "--out", tmp_path, "--seeds", 2, "--seed", 3, "--quick", "--overwrite")
        assert not transformers_logging.is_progress_bar_enabled()
    finally:
        transformers_logging.enable_progress_bar()
    (_, settings, reader, seeds, _), _ = runs[0]
    assert (settings, reader, seeds) == (DemoSettings.quick(), ReaderSettings.quick(), range(3, 5))
    assert tables == [(("results",), {})]
    assert said.splitlines()[-2:] == [f"report: {tmp_path / 'index.html'}", f"adapter: {tmp_path / 'adapter'}"]


@pytest.mark.parametrize("name", ["results.json", "index.html", "adapter", "base"])
def test_demo_replaces_nothing_without_being_told(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match=f"holds {name}, which would be lost"):
        run("demo", "--out", tmp_path)


def test_a_model_source_is_what_the_options_name(replaced):
    options = {
        "model": "org/base", "revision": "v1", "quantize": "4bit", "positions": "trained", "attn_implementation": "sdpa",
        "trust_remote_code": True, "any_base": True, "dtype": "bf16",
    }  # fmt: skip
    source = ModelSource.of(options, Path("adapter"))
    assert source == ModelSource("org/base", "v1", True, "bf16", "4bit", "trained", "sdpa", Path("adapter"), True)
    assert ModelSource.of({"model": "org/base"}, None) == ModelSource("org/base")
    loads, puts = (
        replaced("sta_adapter.loading.load_model", "net"),
        replaced("sta_adapter.loading.load_adapter", "both"),
    )
    told = replaced("sta_adapter.loading.use_positions_of")
    replaced("sta_adapter.loading.saved_positions", "saved")
    assert source.load("cpu", is_trainable=True) == "both"
    assert puts == [(("net", Path("adapter")), {"revision": None, "is_trainable": True, "base_model": "any"})]
    assert told == [(("net", "trained", "saved"), {})]
    assert loads[0][1]["attn_implementation"] == "sdpa"
    assert ModelSource("org/base").load(None) == "net"
    assert len(puts) == 1


def test_a_measurement_asks_base_and_adapter(replaced, monkeypatch, tmp_path):
    asked, off = [], []

    @contextlib.contextmanager
    def without(net):
        off.append(net)
        yield
        off.pop()

    def evaluate(answerer, data, **given):
        asked.append((answerer, data, bool(off), given["frame_order"], given["predictions_file"], given["overwrite"]))
        return given["progress"]

    monkeypatch.setattr("sta_adapter.evaluation.eval_mode.without_adapter", without)
    monkeypatch.setattr("sta_adapter.evaluation.evaluator.evaluate", evaluate)
    source = SimpleNamespace(load=lambda device: "net")
    found = Measurement(source, "all", ["base", "adapter"], ("ordered", "shuffled"), None, tmp_path, True, {})
    assert found.ask_model() == {
        name: dict.fromkeys(("ordered", "shuffled"), f"answers of the {name}") for name in ("base", "adapter")
    }
    assert asked[0] == ("net", "all", True, "ordered", tmp_path / "base-ordered.jsonl", True)
    assert asked[3] == ("net", "all", False, "shuffled", tmp_path / "adapter-shuffled.jsonl", True)
    asked.clear()
    found.ask("engine", "base", "some")
    assert asked == [("engine", "some", False, "ordered", None, False)]  # nothing is kept


def test_options_that_are_read_alike_everywhere():
    assert frame_rate(2.0, None) == {"fps": 2.0, "nframes": None}
    assert frame_rate(None, 8) == {"nframes": 8}
    assert frame_rate(None, None) == {}
    assert one_or_several(None) is None
    assert one_or_several("a") == one_or_several(["a"]) == "a"
    assert one_or_several(("a", "b")) == ["a", "b"]
    assert merged({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 4}, "d": {"e": 5}}) == {
        "a": {"b": 4, "c": 2},
        "d": {"e": 5},
    }
    for command in ("evaluate", "demo"):
        assert "-1 is not in the range x>=0" in CliRunner().invoke(cli, [command, "--seed", "-1"]).output
    done = CliRunner().invoke(cli, ["train", "--stage", "3"])
    assert done.exit_code == 2
    assert "'3' is not one of '1', '2', 'both'" in done.output


@pytest.mark.parametrize("order", [("ordered",), ("ordered", "shuffled", "reversed")], ids=len)
def test_orders_of_frames(order):
    from sta_adapter.cli.evaluate import _orders

    assert set(_orders({"frames": "all" if len(order) > 1 else "ordered"})) == set(order)


def test_no_picture_stays_of_results_before(tmp_path, monkeypatch, capsys):
    from sta_adapter.cli.evaluate import _write

    def draw(report, path):
        raise ValueError("too many categories")

    monkeypatch.setattr("sta_adapter.evaluation.plot.draw", draw)
    (tmp_path / "results.png").write_text("of results before")
    _write({"seed": 0}, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]
    assert "No results.png: too many categories" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--format", "--videos"])
def test_a_benchmark_has_its_own_layout(option, tmp_path):
    words = ["--format", "ssv2"] if option == "--format" else ["--videos", str(tmp_path)]
    with pytest.raises(ConfigError, match=f"{option} and --benchmark exclude each other"):
        run("evaluate", "--model", "x", "--data", tmp_path, "--benchmark", "mvbench", *words)


def test_where_training_loads_the_base(replaced):
    replaced("sta_adapter.training.arguments.join_processes", SimpleNamespace(device="cuda:1"))
    assert _device(None) == "cpu"
    assert _device("4bit") == "cuda:1"


def test_how_to_go_on_does_not_throw_the_run_away(replaced, capsys):
    replaced("sta_adapter.cli.train.given_words", ["train", "--out", "o", "--overwrite"])
    stopped = TrainingStopped.__new__(TrainingStopped)
    stopped.signal, stopped.checkpoint = 15, Path("o/checkpoint")
    _say_how_to_go_on(stopped, {"overwrite": True})
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "Stopped by SIGTERM. o/checkpoint is saved. To go on:"
    assert said[1].strip() == "sta-adapter train --out o"


def test_a_plan_for_a_gpu_says_what_it_keeps_back():
    stage = {
        **dict.fromkeys(("trainable", "parameters", "steps", "batch_size", "device_batch_size", "accumulation"), 1),
        **{"parts": {}, "gradient_checkpointing": False, "fits": True, "suggested": {}, "choices": [], "needs": 1e9},
    }
    reader = {"samples": 2, "looked_at": 2, "tokens": {"least": 1, "largest": 3, "median": 2}}

    def said(cuda):
        machine = {"cuda": cuda, "memory": 24e9, "precision": "bf16"}
        return describe_plan({"model": "m", "machine": machine, "data": reader, "stages": {"1": stage}})

    kept = " (with CUDA and 5 % that its allocator can't give)"
    assert f"  memory    1.0 GB{kept}: fits, gradient checkpointing off" in said(True)
    assert "  memory    1.0 GB: fits, gradient checkpointing off" in said(False)


def test_logging_and_warnings_beside_bars(replaced, capsys):
    from tqdm import tqdm

    from sta_adapter import cli as command_line

    calls = replaced("sta_adapter.cli.logging.basicConfig")
    run("-v", "path", "ms-swift")
    run("path", "ms-swift")
    assert [given["level"] for _, given in calls] == [logging.INFO, logging.WARNING]
    bar = tqdm(total=2, disable=False)
    command_line._show_warning("be careful", STAWarning, "file.py", 1)
    command_line._show_warning("be careful", UserWarning, "file.py", 1)
    command_line._close_bars()
    assert bar.disable
    said = capsys.readouterr().err
    assert "warning: be careful\n" in said
    assert "file.py:1: UserWarning: be careful\n" in said
    assert warnings.showwarning is not command_line._show_warning


def test_a_category_with_half_a_character_can_be_printed(tmp_path):
    """Of any field, as that of the field "category" can."""
    file = tmp_path / "t.jsonl"
    file.write_text(json.dumps({"question": "q", "answer": "a", "video": "x.mp4", "topic": "a\ud800"}))
    options = {"benchmark": None, "data": str(file), "format": None, "videos": None, "on_bad_sample": "error"}
    (sample,), _ = _samples({**options, "category": "topic"})
    assert sample.category == "a\\ud800"
