"""Whatever ends a command is one line on standard error; what it needs is looked at before it works."""

import errno
import io
import json
import logging
import os
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from cases import make_qwen2_vl
from huggingface_hub.errors import LocalEntryNotFoundError
from tiny_qwen import write_samples

from sta_adapter import cli as command_line
from sta_adapter import inject_sta, requirements
from sta_adapter.cli.known_errors import in_one_line
from sta_adapter.demo import TINY_BASE
from sta_adapter.errors import CheckpointError, ConfigError, MissingExtraError
from sta_adapter.loading import load_model
from sta_adapter.requirements import require_device, require_free, require_reporters, require_writable
from sta_adapter.tiny_base import TINY_ADAPTER


@pytest.fixture
def run(monkeypatch, capsys):
    """A command as the console runs it: exit code and what stands on standard error."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["sta-adapter", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            command_line.main()
        return ended.value.code, capsys.readouterr().err

    return run


@pytest.fixture
def data(tmp_path):
    return write_samples(tmp_path / "data", 1)


def only_message(outcome):
    """The one line of a failed command."""
    code, said = outcome
    assert code == 1
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    return line


# ---- any error is one line


@pytest.mark.parametrize(
    "words", [["train", "--out", "\u00fc"], ["inspect", "\u00fc"], ["\u00fc"]], ids=lambda words: words[0]
)
def test_names_that_the_locale_has_no_letters_for(words):
    """The run ended in a UnicodeEncodeError of a library, once it had begun."""
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "sta_adapter.cli", *words]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 1
    assert "can't be read in the encoding of this locale, ascii" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_answers_in_letters_that_the_terminal_lacks_end_no_command(run, monkeypatch):
    written = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", written)
    monkeypatch.setitem(vars(command_line), "cli", lambda *_, **__: print("\u4e2d"))
    monkeypatch.setattr(sys, "argv", ["sta-adapter"])
    command_line.main()
    written.flush()
    assert written.buffer.getvalue() == b"\\u4e2d\n"


def test_lines_of_libraries_that_write_their_own_stand_once(run, capsys, monkeypatch):
    """As huggingface_hub's, of each of its retries."""
    library = logging.getLogger("a_library.with_parts")
    monkeypatch.setattr(logging.getLogger("a_library"), "handlers", [logging.StreamHandler()])
    monkeypatch.setattr(logging.getLogger(), "handlers", [command_line._BesideBars()])
    library.warning("Retrying in 1s")
    logging.getLogger("a_quiet_library").warning("told once")
    assert capsys.readouterr().err == "Retrying in 1s\ntold once\n"


def test_a_name_that_is_no_text_is_named():
    with pytest.raises(UnicodeEncodeError) as found:
        "a\udcfc".encode()
    assert (
        in_one_line(found.value)
        == "the name 'a\\udcfc' is no text of UTF-8, and can't be written into a file; take another."
    )


class OutOfMemoryError(RuntimeError):
    pass


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x/a.png"), "the disk is full: '/x/a.png'"),
        (OSError(errno.EROFS, "Read-only file system", "/x/a.png"), "the disk is read-only: '/x/a.png'"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "the system does not allow it: '/x'"),
        (OSError(errno.EADDRINUSE, "Address already in use"), "the port is taken: address already in use"),
        (OSError(errno.EXDEV, "Invalid cross-device link", "a", None, "b"), "invalid cross-device link: 'a' to 'b'"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "the disk is full: RuntimeError: I/O error"),
        (ModuleNotFoundError("No module named 'peft'", name="peft.utils"), "pip install 'sta-adapter[train]'"),
        (ModuleNotFoundError("No module named 'foo'", name="foo"), "pip install foo"),
        (ImportError("This requires the Torchvision library"), "pip install 'sta-adapter[train]'"),
        (MemoryError(), "the memory is not enough: MemoryError. Take fewer clips at a time (--batch-size;"),
        (OutOfMemoryError("CUDA out of memory.\nTried"), "the memory is not enough: OutOfMemoryError: CUDA out of memory. Tried."),
        (RuntimeError("Found no NVIDIA driver on your system."), "the GPU can't be used: RuntimeError: Found no NVIDIA driver on"),
        (AssertionError("Torch not compiled with CUDA enabled"), "Torch not compiled with CUDA enabled. --device cpu does without"),
        (ValueError("a\n\nb"), "ValueError: a b. This was not foreseen; sta-adapter --debug ... shows where it happened"),
        (KeyError("x" * 999), "xxx ... This was not foreseen"),
        (ConfigError("just so"), "just so"),
        (LocalEntryNotFoundError("nothing is kept"), "the Hub: "),
    ],
    ids=lambda value: None if isinstance(value, str) else type(value).__name__,
)  # fmt: skip
def test_errors_in_one_line(error, message):
    said = in_one_line(error)
    assert message in said
    assert "\n" not in said


def test_what_an_error_was_raised_from_counts_and_what_was_handled_before_does_not():
    full = OSError(errno.ENOSPC, "No space left on device", "x.pt")
    with pytest.raises(RuntimeError, match="saving") as raised:
        raise RuntimeError("saving failed") from full
    assert in_one_line(raised.value) == "the disk is full: 'x.pt'"
    other = ValueError("other")
    other.__context__ = full
    assert "ValueError: other." in in_one_line(other)


@pytest.mark.parametrize("place", [1, 3])
def test_debug_shows_the_traceback_wherever_it_stands(run, tmp_path, place):
    words = ["convert", tmp_path / "nothing", tmp_path / "out"]
    assert "there is no" in only_message(run(*words))
    words.insert(place - 1, "--debug")
    code, said = run(*words)
    assert code == 1
    assert "Traceback" in said
    assert said.splitlines()[-1].startswith("error: ")


def test_an_error_nobody_foresaw(run, monkeypatch):
    def fail(*args, **options):
        raise KeyError("surprise")

    monkeypatch.setattr("sta_adapter.cli.environment.describe_environment", fail)
    assert "KeyError: 'surprise'. This was not foreseen" in only_message(run("env"))


# ---- devices


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "", "cpu:-2", "meta"], ids=list("abcde"))
def test_no_such_device(name):
    with pytest.raises(ConfigError, match=r"device is '.*', "):
        require_device(name)


def test_a_device_that_is_not_here(monkeypatch):
    if torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"there are \d+ CUDA devices"):
            require_device("cuda:99")
    else:
        with pytest.raises(ConfigError, match=r"device 'cuda' can't be used here: .*Expected one such as cpu"):
            load_model(TINY_BASE, device="cuda")
    with pytest.raises(ConfigError, match="device 'xpu' can't be used here"):
        require_device("xpu")
    require_device("cpu")
    require_device(None)


@pytest.mark.parametrize(
    ("dtype", "expected"), [("auto", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_weights_are_wide_on_the_cpu_unless_asked_for(tmp_path, monkeypatch, dtype, expected):
    make_qwen2_vl().bfloat16().save_pretrained(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = load_model(tmp_path, dtype=dtype)
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(expected, "cpu")}


@pytest.mark.parametrize("command", ["evaluate", "visualize", "app"])
def test_commands_look_at_the_device_first(run, command, data, tmp_path):
    rest = {
        "evaluate": ["--model", "no/where", "--data", "nothing"],
        "visualize": [tmp_path / "none.mp4", "--out", tmp_path],
        "app": [],
    }
    assert "device is 'gpu', expected" in only_message(run(command, "--device", "gpu", *rest[command]))


@pytest.mark.parametrize("command", ["visualize", "watch"])
def test_commands_look_for_the_video_before_they_load_a_model(run, command, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    rest = {"visualize": ["--out", tmp_path / "x"], "watch": ["--adapter", "no/where"]}
    said = only_message(run(command, tmp_path / "none.mp4", "--model", "no/where", *rest[command]))
    assert "none.mp4" in said
    assert "no/where" not in said


def test_an_option_of_vllm_is_told_where_it_goes(run):
    code, said = run("serve", "--model", "a/b", "--adapter", "c/d", "--port", "8000")
    assert code == 2
    assert "No such option" in said
    assert "Options of vLLM follow --, at the end: ... -- --port 8000." in said


# ---- reporters


def test_reporters(monkeypatch):
    for asked in ("none", "all", [], ["none"]):
        require_reporters(asked)
    with pytest.raises(ConfigError, match=r"report_to is 'tensorbord': .*tensorboard"):
        require_reporters("tensorbord")
    monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", lambda: ["tensorboard"])
    require_reporters("tensorboard")
    with pytest.raises(MissingExtraError, match=r"report_to: wandb needs a package more: pip install wandb"):
        require_reporters(["tensorboard", "wandb"])


def test_train_looks_at_reporters_and_folder_before_it_loads(run, data, tmp_path):
    line = ["train", "--model", "no/where", "--data", data]
    assert "report_to is 'wnadb'" in only_message(run(*line, "--out", tmp_path / "o", "--set", "report_to=wnadb"))
    (tmp_path / "file").write_text("")
    said = only_message(run(*line, "--out", tmp_path / "file" / "o"))
    assert "can't write into" in said
    assert "Not a directory" in said


# ---- folders


@pytest.mark.parametrize("command", ["evaluate", "visualize", "demo", "train"])
def test_a_folder_that_can_t_be_written(run, command, data, monkeypatch, tmp_path):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(requirements.tempfile, "TemporaryFile", full)
    rest = {
        "evaluate": ["--model", "no/where", "--data", data],
        "train": ["--model", "no/where", "--data", data],
        "visualize": [tmp_path / "none.mp4"],
        "demo": [],
    }
    said = only_message(run(command, *rest[command], "--out", tmp_path / "out"))
    assert said.endswith("out': No space left on device. Take another folder.")


def test_a_disk_without_room_for_a_byte(tmp_path, monkeypatch):
    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(requirements.tempfile, "TemporaryFile", lambda **how: Full())
    with pytest.raises(ConfigError, match=r"can't write into .*: No space left on device"):
        require_writable(tmp_path)


def test_folders_are_made_and_nothing_else(tmp_path):
    require_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    require_free(tmp_path / "none", ["x"], False)
    (tmp_path / "x").symlink_to("nowhere")
    with pytest.raises(ConfigError, match=r"holds x, which would be lost\. .*--overwrite"):
        require_free(tmp_path, ["x", "y"], False)
    require_free(tmp_path, ["x"], True)


@pytest.mark.parametrize("command", ["train", "evaluate", "visualize"])
def test_no_empty_folder_stays_of_a_command_that_failed(run, tmp_path, command):
    data = ["--data", tmp_path / "nothing.jsonl"]
    words = {"train": ["--model", TINY_BASE, *data], "evaluate": ["--model", TINY_BASE, *data]}
    only_message(run(command, *words.get(command, [tmp_path / "nothing.mp4"]), "--out", tmp_path / "a" / "b"))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    only_message(run(command, *words.get(command, [tmp_path / "nothing.mp4"]), "--out", tmp_path / "mine"))
    assert (tmp_path / "mine").is_dir()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("inspect", ["{}"]),
        ("check-data", ["{data}", "--model", "{}"]),
        ("evaluate", ["--model", "{}", "--data", "{data}"]),
    ],
    ids=["inspect", "check-data", "evaluate"],
)
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no-such-model", "there is no such folder, and the Hub repository of that id isn't available: HF_HUB_OFFLINE=1 is set"),
        ("a/b/c", "it is no repository id on the Hub"),
    ],
    ids=["id", "path"],
)  # fmt: skip
def test_a_model_that_is_nowhere_is_one_line(run, data, monkeypatch, command, words, name, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, said = run(command, *[word.format(name, data=data) for word in words])
    assert (code, said.splitlines()[-1].startswith("error: ")) == (1, True)
    assert message in said.splitlines()[-1]


@pytest.mark.parametrize("layers", ["0-999999999", "1-", "²", "3-1", ""])
def test_layers_that_are_none(run, layers):
    assert "expected block indices such as 0-3,8 or all" in only_message(run("inspect", TINY_BASE, "--layers", layers))


def test_layers_that_the_encoder_doesn_t_have_are_not_all_listed(run):
    said = only_message(run("inspect", TINY_BASE, "--layers", "0-9999"))
    assert "don't exist: the encoder has 4 blocks, 0 to 3" in said
    assert len(said) < 250


def test_the_usual_field_to_group_by_is_named_with_the_others(run, data):
    line = ["evaluate", "--model", TINY_BASE, "--data", data, "--category", "kind"]
    records = [{**json.loads(line), "category": "falling", "source": "x"} for line in data.read_text().splitlines()]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert "--category kind: no sample has that field; there are: category, source." in only_message(run(*line))


def test_an_engine_that_is_not_installed_is_told_before_anything_is_asked(run, tmp_path, monkeypatch):
    monkeypatch.setattr(requirements, "find_spec", lambda name: None if name == "vllm" else object())
    said = only_message(run("evaluate", "--model", "no/where", "--data", tmp_path / "nothing", "--engine", "vllm"))
    assert "pip install 'sta-adapter[vllm]'" in said


@pytest.mark.parametrize("option", ["--longest", "--time-limit"])
def test_the_app_takes_no_limit_below_zero(run, option):
    code, said = run("app", option, "-1")
    assert (code, f"Invalid value for '{option}'" in said) == (2, True)


@pytest.fixture
def adapter(tmp_path):
    folder = tmp_path / "adapter"
    handle = inject_sta(load_model(TINY_BASE, device="cpu"))
    handle.save_pretrained(folder)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "run.json").write_text("{}")
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.filterwarnings("default::sta_adapter.errors.STAWarning")
def test_convert_loses_nothing_without_being_told(run, adapter, tmp_path):
    published = tmp_path / "p.safetensors"
    code, said = run("convert", adapter, published, "--to-published")
    assert code == 0
    assert (
        "warning: the published code computes something else with these weights: token_order is 'clip', there 'published'"
        in said
    )
    before = contents(adapter)
    said = only_message(run("convert", published, adapter))
    assert "holds sta_adapter.safetensors, sta_config.json, adapter_config.json, run.json, which would be lost" in said
    assert contents(adapter) == before
    assert run("convert", published, adapter, "--overwrite")[0] == 0
    assert set(contents(adapter)) == {"sta_adapter.safetensors", "sta_config.json"}
    kept = published.read_bytes()
    assert "holds p.safetensors, which" in only_message(run("convert", adapter, published, "--to-published"))
    assert published.read_bytes() == kept


def test_train_loses_no_adapter_without_being_told(run, adapter, data):
    (adapter / "run.json").unlink()
    before = contents(adapter)
    line = ["train", "--model", TINY_BASE, "--data", data, "--out", adapter, "--max-steps", "1", "--batch-size", "1"]
    assert "holds sta_adapter.safetensors, adapter_config.json, which would be lost" in only_message(run(*line))
    assert contents(adapter) == before


@pytest.mark.parametrize(
    ("command", "name"), [("demo", "index.html"), ("demo", "adapter"), ("visualize", "branch.png")]
)
def test_reports_are_not_replaced_without_being_told(run, tmp_path, command, name):
    (tmp_path / name).write_text("mine")
    said = only_message(run(command, *(["clip.mp4"] if command == "visualize" else []), "--out", tmp_path))
    assert f"holds {name}, which would be lost" in said
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ("mine", "differs in its form"),
        ({"base": {}, "model": "other"}, "differs in its form"),
        ({"adapter": {"ordered": {}}}, "differs in adapter, ordered frames"),
        ({"base": {"ordered": {}, "shuffled": {}}}, "differs in base, shuffled frames"),
        ({"data": "other.jsonl"}, "differs in data"),
    ],
    ids=["text", "form", "run", "order", "data"],
)
def test_results_are_not_replaced_without_being_told(run, data, tmp_path, found, message):
    about = {"model": TINY_BASE.name, "adapter_id": None, "data": data.name, "benchmark": None, "seed": 0}
    if isinstance(found, dict) and "model" not in found:
        found = {**about, **found}
    (tmp_path / "results.json").write_text(json.dumps(found))
    before = (tmp_path / "results.json").read_bytes()
    said = only_message(run("evaluate", "--model", TINY_BASE, "--data", data, "--out", tmp_path))
    assert message in said
    assert (tmp_path / "results.json").read_bytes() == before


# ---- packages


@pytest.mark.parametrize(
    ("command", "module", "extra"),
    [
        ("train", "peft", "train"), ("train", "accelerate", "train"), ("evaluate", "torchvision", "train"), ("demo", "matplotlib", "viz"),
        ("demo", "peft", "train"), ("visualize", "matplotlib", "viz"), ("visualize", "torchvision", "train"), ("app", "gradio", "app"),
        ("check-data", "PIL", "train"),
    ],
)  # fmt: skip
def test_a_missing_package_is_named_with_its_extra_at_once(run, monkeypatch, command, module, extra):
    found = requirements.find_spec
    monkeypatch.setattr(requirements, "find_spec", lambda name: None if name == module else found(name))
    rest = {
        "evaluate": ["--model", "no/where", "--data", "nothing"],
        "visualize": ["none.mp4", "--out", "x"],
        "check-data": ["nothing"],
    }
    said = only_message(run(command, *rest.get(command, [])))
    assert said == f"error: sta-adapter {command} needs more packages ({module}): pip install 'sta-adapter[{extra}]'"
    assert run(command, "--help")[0] == 0


def test_what_transformers_lacks_is_named_with_its_extra(monkeypatch):
    from sta_adapter.loading import load_processor

    def fail(*args, **options):
        raise ImportError("\nQwen2VLVideoProcessor requires the Torchvision library but ... torchvision\n" * 9)

    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", fail)
    with pytest.raises(
        MissingExtraError, match=r"needs more packages \(torchvision\): pip install 'sta-adapter\[train\]'$"
    ):
        load_processor("any")


def test_all_that_transformers_lacks_is_named(monkeypatch):
    from sta_adapter.loading import load_processor

    def fail(*args, **options):
        raise ImportError("it requires torchvision and PIL")

    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", fail)
    with pytest.raises(MissingExtraError, match=r"needs more packages \(torchvision, PIL\): pip install"):
        load_processor("any")


# ---- the app's address


def test_a_port_that_is_taken(run):
    pytest.importorskip("gradio")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = only_message(run("app", "--port", port, "--model", "no/where"))
    assert f"the page can't be served at 127.0.0.1:{port}: Address already in use" in said
    assert "can't be served at no.such.host.invalid" in only_message(run("app", "--host", "no.such.host.invalid"))


@pytest.mark.parametrize(("option", "missing"), [("--any-base", "--adapter"), ("--overwrite", "--out")])
def test_an_option_needs_the_one_that_it_is_about(run, data, option, missing):
    line = ["evaluate", "--model", TINY_BASE, "--data", data, option]
    assert f"{option}: there is no {missing}" in only_message(run(*line))


def test_an_adapter_s_revision_needs_an_adapter(run, data, tmp_path):
    line = ["evaluate", "--model", TINY_BASE, "--data", data, "--adapter-revision", "v1"]
    assert "--adapter-revision v1: there is no --adapter" in only_message(run(*line))
    (tmp_path / "a").mkdir()
    assert "is a folder, which has no revision 'v1'" in only_message(run(*line, "--adapter", tmp_path / "a"))


def test_damaged_models_are_one_line(run, data, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{")
    line = ["evaluate", "--model", tmp_path / "model", "--data", data]
    assert "can't load the processor" in only_message(run(*line))
    with pytest.raises(CheckpointError, match="can't load the model"):
        load_model(tmp_path / "model")


@pytest.mark.parametrize("lora", [False, True], ids=["STA", "LoRA alone"])
def test_an_adapter_in_the_place_of_its_base_is_told(run, data, tmp_path, lora):
    shutil.copytree(TINY_ADAPTER, tmp_path, dirs_exist_ok=True)
    if lora:
        (tmp_path / "sta_config.json").rename(tmp_path / "adapter_config.json")
    found = only_message(run("evaluate", "--model", tmp_path, "--data", data))
    assert "is an adapter's folder; expected a model's. Give its base" in found
    with pytest.raises(
        CheckpointError, match=r"is an adapter's folder.*and this as the adapter \(load_sta, --adapter\)"
    ):
        load_model(tmp_path)


def test_what_is_published_shows_no_folders(tmp_path):
    from sta_adapter.visualization.local_paths import public_name, subject, without_folders

    (tmp_path / "my model").mkdir()
    assert public_name(tmp_path / "my model") == "my model"
    assert public_name("Qwen/Qwen2-VL-2B-Instruct") == "Qwen/Qwen2-VL-2B-Instruct"
    assert public_name("runs/today/best") == "best"  # no Hub id, whether it is there or not
    assert subject("org/base", "/home/ann/runs/adapter/") == "org/base, adapter"
    text = (
        "/home/ann/d.jsonl, line 2: no such video file '/mnt/x y/clips/0.mp4'; 1 / 2, and/or, https://example.org/a/b"
    )
    shown = without_folders({"a": [text]}, ["/mnt/x y/clips"])["a"][0]
    assert shown == "d.jsonl, line 2: no such video file '0.mp4'; 1 / 2, and/or, https://example.org/a/b"
