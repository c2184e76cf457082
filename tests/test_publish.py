"""Adapters to the Hub: one commit with the adapter's files and a card, or none."""

import hashlib
import json

import huggingface_hub
import pytest
import torch
from cases import make_qwen2_vl, make_qwen2_vl_tower, qwen2_vl_prompt, randomize, seeded
from click.testing import CliRunner
from hub_server import HubServer

from sta_adapter import STAConfig, get_sta, inject_sta, load_sta
from sta_adapter.adapter.format import CONFIG, WEIGHTS
from sta_adapter.adapter.push import push_folder
from sta_adapter.cli import cli
from sta_adapter.errors import CheckpointError, ConfigError

NAME = "user/adapter"
LORA = {"adapter_config.json", "adapter_model.safetensors"}
FILES = {WEIGHTS, CONFIG, "README.md", ".gitattributes"}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty Hub, and this process as its client."""
    with HubServer() as server:
        server.use(monkeypatch, tmp_path / "cache")
        yield server


@pytest.fixture
def handle():
    """A tower with STA."""
    made = inject_sta(seeded(make_qwen2_vl_tower), STAConfig(gamma_init=0.1))
    for module in made.blocks.values():
        randomize(module)
    return made


@pytest.fixture
def folder(handle, tmp_path):
    """A saved adapter among files that are nobody's business."""
    handle.save_pretrained(tmp_path / "out")
    others = ("optimizer.pt", "trained.safetensors", "samples.json", "x.py", "adapter_model.bin", "README.md", "a.pkl")
    for name in others:
        (tmp_path / "out" / name).write_bytes(b"private")
    (tmp_path / "out" / "stage1").mkdir()
    (tmp_path / "out" / "stage1" / WEIGHTS).write_bytes(b"private")
    return tmp_path / "out"


def test_there_and_back(hub, handle):
    done = handle.push_to_hub(NAME, license="apache-2.0", base_model="org/base")
    assert hub.commits(NAME) == ["initial commit", "Upload STA adapter"]
    assert set(hub.files(NAME)) == FILES
    assert set(done.files) == {WEIGHTS, CONFIG, "README.md"}
    assert (done.card, done.changed, done.notes, done.pr_url) == ("new", True, [], None)
    assert done.oid == hub.repos[NAME].resolve("main")
    assert done.commit_url == f"{hub.url}/{NAME}/commit/{done.oid}"
    again = load_sta(seeded(make_qwen2_vl_tower), NAME)
    for index, module in handle.blocks.items():
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, again.blocks[index].state_dict()[name])
    assert json.loads(hub.files(NAME)[CONFIG])["base_model"]["id"] == "org/base"


def test_a_readme_is_kept(hub, handle):
    hub.upload(NAME, {"README.md": b"mine", "notes.txt": b"mine too"})
    done = handle.push_to_hub(NAME, commit_message="second try")
    assert (done.card, "README.md" in done.files) == ("kept", False)
    assert hub.commits(NAME) == ["uploaded", "second try"]
    files = hub.files(NAME)
    assert (files["README.md"], files["notes.txt"]) == (b"mine", b"mine too")
    assert WEIGHTS in files


def test_a_readme_that_comes_up_meanwhile_is_kept(hub, handle, monkeypatch):
    hub.upload(NAME, {})
    api = pytest.importorskip("huggingface_hub").HfApi
    commit = api.create_commit

    def late(self, *arguments, **options):
        hub.upload(NAME, {"README.md": b"mine"})
        return commit(self, *arguments, **options)

    monkeypatch.setattr(api, "create_commit", late)
    with pytest.raises(CheckpointError, match=r"status 412.*never a part. Push again"):
        handle.push_to_hub(NAME)
    assert hub.files(NAME)["README.md"] == b"mine"


def test_nothing_else_of_a_folder_is_uploaded(hub, folder):
    push_folder(folder, NAME)
    assert set(hub.files(NAME)) == FILES
    assert b"private" not in b"".join(hub.files(NAME).values())
    assert hub.objects.keys() == {hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()}


def test_where_the_base_model_lay_stays_private(hub, tmp_path):
    peft = pytest.importorskip("peft")
    model = seeded(make_qwen2_vl)
    model.config._name_or_path = "/home/ann/secret-project/qwen"
    handle = inject_sta(model)
    peft.get_peft_model(model, handle.lora_config(r=2))
    done = handle.push_to_hub(NAME)
    assert "the folder 'qwen' is no Hub id" in done.notes[0]
    assert b"secret-project" not in b"".join(hub.files(NAME).values())
    assert load_sta(seeded(make_qwen2_vl), NAME).backbone == "qwen2_vl"


def test_lora_travels_along_and_goes_with_its_adapter(hub, handle):
    peft = pytest.importorskip("peft")
    model = seeded(make_qwen2_vl)
    wrapped = peft.get_peft_model(model, inject_sta(model).lora_config(r=2))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name or ".sta." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    prompt = qwen2_vl_prompt(3)
    with torch.no_grad():
        expected = wrapped(**prompt).logits
    get_sta(wrapped).push_to_hub(NAME)
    assert set(hub.files(NAME)) == FILES | LORA
    loaded = load_sta(seeded(make_qwen2_vl), NAME)
    with torch.no_grad():
        assert torch.equal(loaded.model(**prompt).logits, expected)
    done = handle.push_to_hub(NAME)  # without LoRA: the one that is there must not be loaded with it
    assert set(done.removed) == LORA
    assert set(hub.files(NAME)) == FILES
    assert hub.commits(NAME)[1:] == ["Upload STA adapter"] * 2


def test_the_same_again_is_no_commit(hub, folder):
    first = push_folder(folder, NAME)
    again = push_folder(folder, NAME)
    assert (again.changed, again.oid, len(hub.commits(NAME))) == (False, first.oid, 2)


def test_branches_and_pull_requests(hub, handle):
    handle.push_to_hub(NAME, revision="exp/one")
    assert set(hub.files(NAME, "exp/one")) == FILES
    assert set(hub.files(NAME)) == {".gitattributes"}
    assert load_sta(seeded(make_qwen2_vl_tower), NAME, revision="exp/one").backbone == "qwen2_vl"
    done = handle.push_to_hub(NAME, create_pr=True)
    assert done.pr_url == f"{hub.url}/{NAME}/discussions/1"
    assert set(hub.files(NAME)) == {".gitattributes"}
    assert set(hub.files(NAME, "refs/pr/1")) == FILES


def test_another_hub(hub, handle):
    with HubServer() as mirror:
        if int(huggingface_hub.__version__.split(".")[0]) < 1:  # the commit's address is read by HF_ENDPOINT alone
            with pytest.raises(ConfigError, match="set HF_ENDPOINT before Python starts"):
                handle.push_to_hub(NAME, endpoint=mirror.url)
            assert handle.push_to_hub(NAME, endpoint=f"{hub.url}/").files
            assert not mirror.log
        else:
            handle.push_to_hub(NAME, endpoint=f"{mirror.url}/")
            assert set(mirror.files(NAME)) == FILES
            assert NAME not in hub.repos


def test_sharded_weights_are_pushed_by_one_process(hub, handle, monkeypatch):
    monkeypatch.setattr("sta_adapter.injection.contents.is_sharded", lambda parameters: True)
    assert handle.push_to_hub(NAME).files
    assert set(hub.files(NAME)) == FILES


def test_private_repositories(hub, handle):
    handle.push_to_hub(NAME, private=True)
    assert hub.repos[NAME].private
    with pytest.raises(CheckpointError, match="does not exist, or is private"):
        load_sta(seeded(make_qwen2_vl_tower), NAME, token=False)
    handle.push_to_hub("user/public")
    assert not hub.repos["user/public"].private
    before = hub.commits("user/public")
    with pytest.raises(CheckpointError, match="exists and is public, but private=True was requested; nothing was"):
        handle.push_to_hub("user/public", private=True)
    assert hub.commits("user/public") == before


@pytest.mark.parametrize(
    ("method", "page", "fault", "message"),
    [
        ("PUT", "/lfs/", {"cut": True}, "no connection to http://127"),
        ("PUT", "/lfs/", {"status": 500}, "status 500"),
        ("POST", "/preupload/", {"status": 429}, "too many requests"),
        ("POST", "/commit/", {"cut": True}, "no connection to http://127"),
        ("POST", "/commit/", {"status": 403}, "your token does not allow it"),
        ("POST", "/commit/", {"status": 500}, "status 500"),
        ("POST", "/lfs-verify/", {"status": 500}, "status 500"),
    ],
    ids=["upload cut", "upload 500", "429", "commit cut", "commit 403", "commit 500", "verify 500"],
)
def test_a_failed_push_leaves_the_repository_as_it_was(hub, folder, handle, method, page, fault, message):
    push_folder(folder, NAME)
    before = hub.files(NAME)
    for module in handle.blocks.values():
        torch.nn.init.normal_(module.to_out.weight)
    hub.fail(method, page, **fault)
    with pytest.raises(
        CheckpointError, match=f"(?s){message}.*holds the whole adapter or its old contents, never a part"
    ):
        handle.push_to_hub(NAME)
    assert hub.files(NAME) == before
    assert len(hub.commits(NAME)) == 2
    hub.recover()
    handle.push_to_hub(NAME)
    assert hub.files(NAME)[WEIGHTS] != before[WEIGHTS]
    assert len(hub.commits(NAME)) == 3


def test_a_first_push_that_is_cut_leaves_no_adapter(hub, handle):
    hub.fail("PUT", "/lfs/", cut=True)
    with pytest.raises(CheckpointError, match="Push again later"):
        handle.push_to_hub(NAME)
    assert set(hub.files(NAME)) == {".gitattributes"}
    hub.recover()
    handle.push_to_hub(NAME)
    assert set(hub.files(NAME)) == FILES


@pytest.mark.parametrize(
    ("name", "token", "message"),
    [
        ("other/adapter", None, "your token does not allow it"),
        (NAME, "hf_wrong", "the Hub does not know your token; log in"),
        (NAME, False, "the Hub wants a token with write access; log in"),
        ("user/ad apter", None, "HFValidationError"),
    ],
    ids=["foreign", "wrong token", "no token", "no id"],
)
def test_who_may_not_push(hub, handle, name, token, message):
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        handle.push_to_hub(name, token=token)
    assert not hub.repos


def test_offline(hub, handle, monkeypatch):
    from huggingface_hub import constants, utils

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    getattr(utils, "reset_sessions", lambda: None)()
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE=1 is set; unset it to push"):
        handle.push_to_hub(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    getattr(utils, "reset_sessions", lambda: None)()


def test_what_is_no_adapter_is_not_pushed(hub, folder):
    with pytest.raises(CheckpointError, match=r"holds no sta_config.json, so it is no STA adapter"):
        push_folder(folder / "stage1", NAME)
    with pytest.raises(ConfigError, match=r"base_model is './models/a', expected the id of a model on the Hub"):
        push_folder(folder, NAME, base_model="./models/a")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no adapter_model.safetensors; pickled weights are not pushed"):
        push_folder(folder, NAME)
    (folder / "adapter_config.json").unlink()
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="damaged"):
        push_folder(folder, NAME)
    assert not hub.log


def run(*words):
    done = CliRunner().invoke(cli, ["push", *map(str, words)])
    assert done.exception is None, done.output
    return done.stdout if hasattr(done, "stdout") else done.output


def test_the_command_says_what_it_does(hub, folder):
    planned = run(folder, NAME, "--dry-run", "--base-model", "org/base")
    assert not hub.repos
    assert "note: a dry run asks nobody" in planned
    assert planned.startswith(f"would upload to {NAME} in one commit:")
    assert "base_model: org/base" in planned
    assert "note: the card names no licence" in planned
    text = run(folder, NAME, "--license", "mit", "--private", "--message", "hello")
    listed = [line.split()[-1] for line in text.splitlines() if " bytes " in line]
    assert set(listed) == FILES - {".gitattributes"}
    assert f"{hub.url}/{NAME}/commit/" in text
    assert max(map(len, text.splitlines())) <= 100
    assert hub.commits(NAME)[-1] == "hello"
    assert "holds this adapter already; nothing was uploaded" in run(folder, NAME)
    values = json.loads(run(folder, NAME, "--revision", "second", "--json"))
    assert (values["repo_id"], values["card"], values["changed"]) == (NAME, "kept", False)


def test_a_dry_run_needs_no_network(folder, monkeypatch):
    import socket

    def refuse(*args, **options):
        raise AssertionError("the network was asked")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    planned = run(folder, NAME, "--dry-run", "--license", "mit", "--base-model", "org/base")
    assert planned.startswith(f"would upload to {NAME} in one commit:")
    assert f'handle = load_sta(model, "{NAME}")' in planned
    done = CliRunner().invoke(cli, ["push", str(folder), 'x");import os', "--dry-run"])
    assert isinstance(done.exception, CheckpointError)
    assert "Repo id must use alphanumeric chars" in str(done.exception)


def test_help_fits_a_screen():
    text = CliRunner().invoke(cli, ["push", "--help"]).output
    assert text.split("\n")[2].strip().startswith("Example: sta-adapter push")
    assert len(text.split("\n")) <= 32
    assert max(map(len, text.split("\n"))) <= 80


def test_a_listing_without_files_is_asked_for_again(hub, handle, monkeypatch):
    hub.upload(NAME, {"README.md": b"mine"})
    api = pytest.importorskip("huggingface_hub").HfApi
    info = api.model_info

    def bare(self, *arguments, **options):
        found = info(self, *arguments, **options)
        found.siblings = None
        return found

    monkeypatch.setattr(api, "model_info", bare)
    assert handle.push_to_hub(NAME).card == "kept"
    assert hub.files(NAME)["README.md"] == b"mine"


def test_a_base_model_of_the_hub_is_named(hub, folder):
    path, base = folder / CONFIG, {"id": "org/base", "revision": "main"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model": base}))
    push_folder(folder, NAME)
    assert json.loads(hub.files(NAME)[CONFIG])["base_model"] == base
    assert b"base_model: org/base" in hub.files(NAME)["README.md"]


@pytest.mark.parametrize("base", [None, "text", {"id": 3}, {}], ids=repr)
def test_a_base_model_that_makes_no_sense_is_none(hub, folder, base):
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model": base}))
    assert "a model without a name is no Hub id" in push_folder(folder, NAME).notes[0]
    assert json.loads(hub.files(NAME)[CONFIG])["base_model"] == {"id": None, "revision": None}
