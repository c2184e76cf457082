"""Adapters by id: what is fetched from the Hub, what the cache is good for, and what is said when it isn't available."""

import json
from types import SimpleNamespace

import pytest
import torch
from cases import make_qwen2_vl, make_qwen2_vl_tower, randomize, seeded
from hub_server import HubServer
from test_inject import assert_unchanged, state

from sta_adapter import STAConfig, get_sta, inject_sta, load_sta
from sta_adapter.adapter.format import CONFIG, WEIGHTS
from sta_adapter.adapter.hub import WAITS, explain, patiently
from sta_adapter.errors import CheckpointError

NAME = "user/adapter"


@pytest.fixture(scope="session")
def adapter_files(tmp_path_factory):
    """Contents of an adapter's files, by name."""
    folder = tmp_path_factory.mktemp("adapter")
    handle = inject_sta(seeded(make_qwen2_vl_tower), STAConfig(gamma_init=0.1))
    for module in handle.blocks.values():
        randomize(module)
    handle.save_pretrained(folder)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def hub(monkeypatch, tmp_path, adapter_files):
    """A Hub with an adapter, and this process as its client."""
    with HubServer() as server:
        server.upload(NAME, adapter_files)
        server.use(monkeypatch, tmp_path / "cache")
        yield server


def load(name=NAME, **options):
    return load_sta(seeded(make_qwen2_vl_tower), name, **options)


def refused(message, name=NAME, **options):
    """Loading fails with the message, and the model stays as it was."""
    model = seeded(make_qwen2_vl_tower)
    before = state(model)
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        load_sta(model, name, **options)
    assert_unchanged(model, before)


def test_one_line(hub, adapter_files):
    from safetensors.torch import load as tensors_of

    saved = tensors_of(adapter_files[WEIGHTS])
    found = {f"blocks.{i}.{k}": v for i, module in load().blocks.items() for k, v in module.state_dict().items()}
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[key], saved[key]) for key in saved)


def test_a_subfolder(hub, adapter_files):
    hub.upload("user/several", {f"one/two/{name}": content for name, content in adapter_files.items()})
    refused("holds no sta_config.json", "user/several")
    assert load("user/several", subfolder="one/two").backbone == "qwen2_vl"
    assert load("user/several", subfolder="one/two/").backbone == "qwen2_vl"


def test_branches_tags_and_commits(hub, adapter_files):
    first = hub.repos[NAME].resolve("main")
    hub.upload(NAME, {CONFIG: b"{}"})
    hub.upload(NAME, adapter_files, branch="exp/one")
    refused("has no format_version")
    assert load(revision=first).backbone == "qwen2_vl"
    assert load(revision="exp/one").backbone == "qwen2_vl"
    refused("at revision 'v9' isn't available: it has no such branch, tag or commit", revision="v9")


def test_no_pickle_and_no_code_is_fetched(hub, adapter_files):
    dangerous = (
        "pytorch_model.bin",
        "optimizer.pt",
        "modeling_sta.py",
        "sub/sta_config.json",
        "adapter_model.bin",
        "x.pkl",
    )
    hub.upload(NAME, dict.fromkeys(dangerous, b"\x80\x04."))
    load()
    fetched = {path.split("/resolve/")[1].split("/", 1)[1] for _, path in hub.log if "/resolve/" in path}
    assert fetched == {WEIGHTS, CONFIG}


def test_a_repository_without_an_adapter(hub):
    hub.upload("user/model", {"config.json": b"{}", "model.safetensors": b""})
    refused("holds no sta_config.json, so it is no STA adapter", "user/model")


def test_private_repositories(hub, adapter_files, monkeypatch):
    hub.upload("user/secret", adapter_files, private=True)
    hub.tokens["hf_other"] = "other"
    looks_missing = "it does not exist, or is private, which looks the same from outside: then log in .*HF_TOKEN"
    refused(looks_missing, "user/secret", token="hf_other")
    refused(looks_missing, "user/secret", token=False)
    refused(looks_missing, "user/nothing")
    assert load("user/secret").backbone == "qwen2_vl"  # by HF_TOKEN
    monkeypatch.delenv("HF_TOKEN")
    assert load("user/secret", token="hf_user").backbone == "qwen2_vl"


def test_gated_repositories(hub, adapter_files):
    hub.upload("user/gated", adapter_files, gated=True)
    refused("its owner lets in only who asked for access", "user/gated", token=False)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"status": 401}, "it does not exist, or is private"),
        ({"status": 403}, "your token does not allow it"),
        ({"status": 429}, "too many requests from here; wait some minutes"),
        ({"status": 500}, "answered with status 500"),
        ({"cut": True}, r"no connection to http://127.*HF_ENDPOINT\), and no complete copy in the cache"),
    ],
    ids=lambda value: str(value.get("status", "cut")) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("page", ["/api/models/", "/resolve/.*safetensors"], ids=["listing", "weights"])
def test_failures_are_told_and_bounded(hub, fault, message, page):
    for method in ("GET", "HEAD"):
        hub.fail(method, page, **fault)
    refused(message)
    assert len(hub.log) <= (1 + len(WAITS)) * 25  # huggingface_hub has retries of its own
    hub.recover()
    assert load().backbone == "qwen2_vl"  # what was fetched by halves is no harm


@pytest.mark.parametrize("fault", [{"status": 500}, {"status": 429}, {"cut": True}], ids=["500", "429", "cut"])
@pytest.mark.parametrize("page", ["/api/models/", "/resolve/.*safetensors"], ids=["listing", "weights"])
def test_what_passes_is_waited_for(hub, fault, page):
    hub.fail("GET", page, times=2, **fault)
    assert load().backbone == "qwen2_vl"


def test_a_download_that_came_damaged_is_fetched_again(monkeypatch):
    tries = []

    def fetch():
        tries.append(None)
        if len(tries) < 3:
            raise OSError("Consistency check failed: file should be of size 9 but has size 3")
        return "whole"

    monkeypatch.setattr("sta_adapter.adapter.hub.time.sleep", lambda seconds: None)
    assert patiently(fetch) == "whole"
    with pytest.raises(OSError, match="disk full"):
        patiently(lambda: tries.append(None) or (_ for _ in ()).throw(OSError("disk full")))
    assert len(tries) == 4


def test_a_token_that_the_hub_does_not_know(hub):
    error = OSError("Invalid credentials in Authorization header")
    error.response = SimpleNamespace(status_code=401)
    assert explain(error).startswith("the Hub does not know your token; log in")
    error.args = ("Unauthorized",)
    assert explain(error).startswith("it does not exist, or is private")


def test_a_refusal_is_not_tried_again(hub):
    hub.fail("GET", "/api/models/", status=403)
    refused("your token does not allow it")
    assert len([path for method, path in hub.log if method == "GET"]) == 1


def test_offline(hub, monkeypatch):
    from huggingface_hub import constants, utils

    load()
    asked = len(hub.log)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    getattr(utils, "reset_sessions", lambda: None)()
    assert load().backbone == "qwen2_vl"
    refused("HF_HUB_OFFLINE=1 is set, and the cache holds no complete copy of it", "user/other")
    refused("HF_HUB_OFFLINE=1 is set, and the cache holds no complete copy of it", revision="other")
    assert len(hub.log) == asked
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    getattr(utils, "reset_sessions", lambda: None)()


def test_the_cache_serves_when_the_hub_is_down(hub):
    load()
    hub.fail("GET", "/", status=503)
    hub.fail("HEAD", "/", status=503)
    assert load().backbone == "qwen2_vl"


def test_a_cached_copy_without_its_lora_is_not_taken_for_whole(hub, adapter_files):
    description = {**json.loads(adapter_files[CONFIG]), "lora": True}
    hub.upload(NAME, {CONFIG: json.dumps(description).encode()})
    refused("was saved with LoRA weights, but adapter_config.json is missing")


def test_a_mirror(hub, adapter_files, tmp_path):
    with HubServer() as mirror:
        mirror.upload("user/mirrored", adapter_files)
        assert load("user/mirrored", endpoint=mirror.url, cache_dir=tmp_path / "other").backbone == "qwen2_vl"
        assert mirror.log
    assert not hub.log
    assert not (tmp_path / "cache").exists()


def test_a_folder_goes_before_a_repository(hub, adapter_files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / NAME
    folder.mkdir(parents=True)
    for name, content in adapter_files.items():
        (folder / name).write_bytes(content)
    load()
    assert not hub.log
    refused("is a folder, which has no revision 'main'", revision="main")


@pytest.mark.parametrize("name", ["user/ad apter", "user/-x", "user/a..b", ""])
def test_what_is_no_id(hub, name):
    refused("there is no folder", name)
    assert not hub.log


def test_trainable(hub):
    assert all(torch.is_tensor(p) and p.requires_grad for p in load(is_trainable=True).parameters())


@pytest.mark.parametrize("hooked", [False, True], ids=["PEFT", "the hook"])
def test_pefts_own_loader_brings_sta_back_with_a_token_and_a_cache(hub, tmp_path, monkeypatch, hooked):
    """Which PEFT itself takes; without them nobody sees that STA belongs to the LoRA of a private repository."""
    from peft import PeftModel, get_peft_model

    from sta_adapter.integrations import peft as hook

    handle = inject_sta(seeded(make_qwen2_vl), STAConfig(init="normal"))
    get_sta(get_peft_model(handle.model, handle.lora_config(r=2))).save_pretrained(tmp_path / "a")
    hub.upload("user/lora", {file.name: file.read_bytes() for file in (tmp_path / "a").iterdir()}, private=True)
    monkeypatch.delenv("HF_TOKEN")
    if hooked:
        hook.install()
    try:
        loaded = PeftModel.from_pretrained(
            seeded(make_qwen2_vl), "user/lora", token="hf_user", cache_dir=tmp_path / "mine"
        )
    finally:
        hook.uninstall()
    assert get_sta(loaded) is not None
    assert not list((tmp_path / "cache").rglob("sta_config.json"))
