"""What is pushed is an adapter and nothing else: every byte that leaves was parsed before."""

import json
import os

import pytest
import torch
from cases import make_qwen2_vl, seeded
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from sta_adapter import get_sta, inject_sta
from sta_adapter.adapter.format import CONFIG, WEIGHTS
from sta_adapter.adapter.lora_weights import LORA_CONFIG, LORA_WEIGHTS
from sta_adapter.adapter.push import push_folder
from sta_adapter.adapter.push_check import read_checked
from sta_adapter.errors import CheckpointError

FILES = (CONFIG, WEIGHTS, LORA_CONFIG, LORA_WEIGHTS)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    handle = inject_sta(seeded(make_qwen2_vl))
    model = get_peft_model(handle.model, handle.lora_config(r=2, modules_to_save=["merger"], bias="all"))
    folder = tmp_path_factory.mktemp("saved")
    get_sta(model).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    place = tmp_path / "adapter"
    place.mkdir()
    for path in saved.iterdir():
        (place / path.name).write_bytes(path.read_bytes())
    return place


def test_the_bytes_that_were_checked_are_those_of_the_files(folder):
    description, count, contents = read_checked(folder)
    assert contents == {name: (folder / name).read_bytes() for name in FILES}
    assert description == json.loads(contents[CONFIG])
    assert count == sum(tensor.numel() for tensor in load_file(folder / WEIGHTS).values())


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", [b"hf_secret", b'{"token": "hf_secret"}', b""], ids=["text", "json", "empty"])
def test_something_else_under_the_name_of_a_file_is_not_pushed(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError):
        push_folder(folder, "user/name", dry_run=True)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["link", "folder of links"])
def test_a_link_out_of_the_folder_is_not_pushed(folder, tmp_path, name, kind):
    """Also of a good file: whose it is can't be known."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (folder / name).rename(outside / name)
    if kind == "link":
        (folder / name).symlink_to(outside / name)
    else:
        (folder / "inner").symlink_to(outside)
        (folder / name).symlink_to(folder / "inner" / name)
    with pytest.raises(CheckpointError, match=r"is a link to .*, outside of the folder, and is not pushed"):
        push_folder(folder, "user/name", dry_run=True)


def test_a_link_inside_the_folder_is_fine(folder):
    (folder / WEIGHTS).rename(folder / "weights")
    (folder / WEIGHTS).symlink_to("weights")
    assert read_checked(folder)[2][WEIGHTS] == (folder / "weights").read_bytes()


def test_a_pipe_is_not_waited_for(folder):
    (folder / LORA_WEIGHTS).unlink()
    os.mkfifo(folder / LORA_WEIGHTS)
    with pytest.raises(CheckpointError, match="is no regular file"):
        push_folder(folder, "user/name", dry_run=True)


@pytest.mark.parametrize(
    ("name", "key", "message"),
    [
        (LORA_WEIGHTS, "token", "'token' is no tensor of LoRA"),
        (LORA_WEIGHTS, "base_model.model.model.layers.0.weight", "is no tensor of LoRA"),
        (LORA_WEIGHTS, "base_model.model.x.q_proj.lora_A.weight", "expected the rank 2"),
        (WEIGHTS, "token", "'token' is not one"),
        (WEIGHTS, "blocks.7.norm.weight", r"'blocks.7.norm.weight' is not one"),
    ],
)
def test_other_tensors_are_not_pushed(folder, name, key, message):
    from safetensors import safe_open

    with safe_open(folder / name, "pt") as file:
        metadata = file.metadata()
    save_file({**load_file(folder / name), key: torch.ones(3, 3)}, folder / name, metadata)
    with pytest.raises(CheckpointError, match=message):
        push_folder(folder, "user/name", dry_run=True)


@pytest.mark.parametrize(
    "fields",
    [{"peft_type": "XLORA"}, {"megatron_config": {"a": 1}}, {"r": 400_000}, {"lora_alpha": float("nan")}],
    ids=str,
)
def test_settings_that_could_not_be_loaded_are_not_pushed(folder, fields):
    path = folder / LORA_CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        push_folder(folder, "user/name", dry_run=True)


def test_why_a_description_is_not_pushed(folder):
    path = folder / CONFIG
    good = json.loads(path.read_text())
    for change, message in (
        ({"config": {**good["config"], "head_scale": -1}}, r"sta_config\.json: head_scale=-1"),
        (
            {"encoder": {**good["encoder"], "depth": (1 << 20) + 1}},
            "depth of the encoder must be whole numbers from 1 to 1048576",
        ),
    ):
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(CheckpointError, match=message):
            read_checked(folder)


def test_settings_of_lora_have_a_size(folder):
    path = folder / LORA_CONFIG
    path.write_bytes(path.read_bytes() + b" " * (1 << 20))
    with pytest.raises(CheckpointError, match="expected at most 1048576"):
        read_checked(folder)


def test_an_adapter_without_lora(tmp_path):
    inject_sta(seeded(make_qwen2_vl)).save_pretrained(tmp_path)
    assert read_checked(tmp_path)[2].keys() == {CONFIG, WEIGHTS}
    path = tmp_path / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora": True}))
    with pytest.raises(CheckpointError, match=r"was saved with LoRA weights, but adapter_config\.json is missing"):
        read_checked(tmp_path)


def test_files_of_two_adapters_are_not_pushed(folder):
    path = folder / CONFIG
    description = json.loads(path.read_text())
    path.write_text(json.dumps({**description, "config": {**description["config"], "causal": True}}))
    with pytest.raises(CheckpointError, match="were not saved together"):
        push_folder(folder, "user/name", dry_run=True)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(FILES), place=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255), cut=st.booleans()
)
def test_one_changed_byte_is_checked_or_harmless(saved, folder, name, place, byte, cut):
    content = bytearray((saved / name).read_bytes())
    at = int(place * len(content))
    content[at] = byte
    changed = bytes(content[:at] if cut else content)
    (folder / name).write_bytes(changed)
    try:
        assert read_checked(folder)[2][name] == changed
    except CheckpointError:
        assert changed != (saved / name).read_bytes()
    finally:
        (folder / name).write_bytes((saved / name).read_bytes())
