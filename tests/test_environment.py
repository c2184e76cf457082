"""`sta-adapter env`: all that a bug report needs, no secrets, and no crash on a broken machine."""

import json
import sys
import types

import pytest
import torch
import yaml
from click.testing import CliRunner
from test_package import ROOT

from sta_adapter.attention import kernels as attention
from sta_adapter.attention import xformers_kernels
from sta_adapter.cli import cli, environment


def env(*args):
    done = CliRunner().invoke(cli, ["env", *args])
    assert done.exit_code == 0, done.output
    return done.output


def test_json_and_text_say_the_same():
    found, text = json.loads(env("--json")), env()
    assert env("--json").startswith('{\n  "')
    assert found["versions"]["torch"] == torch.__version__
    assert found["backbones"]["qwen2_vl"].startswith("sta-adapter ")
    assert {kernel["dtype"] for kernel in found["kernels"]} == {"float32", "bfloat16", "float16"}
    for name, value in {**found["versions"], **found["backbones"], **found["decoders"]}.items():
        assert any(line.split()[:1] == [name] and value in line for line in text.splitlines()), name
    for kernel in found["kernels"]:
        assert kernel["reason"] in text
    assert not any(seam["differs"] for seam in found["seams"])
    assert "DIFFERS" not in text
    assert {"sta-adapter", "transformers", "peft", "accelerate", "xformers", "av", "numpy"} <= found["versions"].keys()


def test_a_seam_that_differs_stands_out(monkeypatch):
    monkeypatch.delattr(torch._C, "_current_graph_task_id")
    assert "DIFFERS: torch._C has no _current_graph_task_id" in env()


def test_no_secret_and_no_home_is_shown(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", "https://anna:geheim@mirror.example/hub?key=abc")
    for text in (env(), env("--json")):
        assert not any(word in text for word in ("verysecret", "anna", "geheim", "abc", str(tmp_path)))
    hub = json.loads(env("--json"))["hub"]
    assert hub["HF_ENDPOINT"] == "https://mirror.example/hub"
    assert hub["HF_HOME"] == "~/cache"
    assert hub["token"] == "set"
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/hf_verysecret/hub")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    hub = json.loads(env("--json"))["hub"]
    assert (hub["HF_ENDPOINT"], hub["token"]) == ("https://mirror.example/hf_.../hub", "not set")


def test_a_broken_decoder_is_told(monkeypatch, tmp_path):
    (tmp_path / "torchcodec.py").write_text("raise OSError('libavutil.so.60: no such file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchcodec", raising=False)
    found = json.loads(env("--json"))["decoders"]
    assert found["torchcodec"] == "can't be imported: OSError: libavutil.so.60: no such file"


def test_a_gpu_and_its_kernels(monkeypatch):
    about = types.SimpleNamespace(name="H100", total_memory=80 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: about)
    monkeypatch.setattr(attention, "xformers_refusal", lambda device, dtype, head_dim: None)
    monkeypatch.setattr(xformers_kernels, "kernel_names", lambda *tensors: ("fa2F-pt", "fa2B-pt"))
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, device, dtype: empty(*shape, device="meta", dtype=dtype))
    found = environment.describe_environment()
    assert found["devices"][1] == {"type": "cuda", "name": "H100, 80 GiB, capability 9.0"}
    kernel = next(k for k in found["kernels"] if k["device"] == "cuda")
    assert kernel["kernel"] == "xformers (fa2F-pt, fa2B-pt)"
    assert "cuda float32" in environment.format_environment(found)


def test_the_issue_template_asks_for_it():
    template = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text())
    assert any("sta-adapter env" in part["attributes"]["label"] for part in template["body"])


@pytest.mark.parametrize("category", ["DeprecationWarning", "FutureWarning", "PendingDeprecationWarning"])
def test_what_other_packages_deprecate_is_not_shown_to_users_of_a_command(category):
    import subprocess

    code = (
        "import sys, warnings, sta_adapter.cli as c\nsys.argv = ['sta-adapter', '--version']\n"
        "c.cli = lambda words, prog_name: [warnings.warn_explicit('old', %s, 'f.py', 1, module=m) for m in ('peft.x', 'sta_adapter.x')]\n"
        "c.main()"
    )
    done = subprocess.run([sys.executable, "-c", code % category], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(f"{category}: old") == 1, done.stderr
