"""Adapters on disk: what is written, what is refused, and that a refusal leaves model and files as they were."""

import dataclasses
import json
import os

import pytest
import torch
from cases import Clip, make_qwen2_vl, make_qwen2_vl_tower, qwen2_vl_arguments, qwen2_vl_prompt, randomize, seeded
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_inject import assert_unchanged, state
from torch import nn
from toy import toy  # noqa: F401

import sta_adapter
from sta_adapter import STAConfig, inject_sta, load_sta
from sta_adapter.adapter import format as adapter_format
from sta_adapter.adapter.format import CONFIG, WEIGHTS
from sta_adapter.errors import (
    BackendError,
    CheckpointError,
    ConfigError,
    InjectionError,
    STAError,
    STAWarning,
    UnknownBackboneError,
)


@pytest.fixture
def adapter(tmp_path):
    """A folder with a saved adapter of a Qwen2-VL tower."""
    handle = inject_sta(seeded(make_qwen2_vl_tower), STAConfig(gamma_init=0.1, layers=[0, 2], causal=True))
    for module in handle.blocks.values():
        randomize(module)
    handle.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(folder, **changes):
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_files(adapter):
    assert sorted(p.name for p in adapter.iterdir()) == [WEIGHTS, CONFIG]
    keys = load_file(adapter / WEIGHTS).keys()
    names = ["gamma", "norm.bias", "norm.weight", "to_out.bias", "to_out.weight", "to_qkv.bias", "to_qkv.weight"]
    assert sorted(keys) == [f"blocks.{i}.{name}" for i in (0, 2) for name in names]
    with safe_open(adapter / WEIGHTS, "pt") as file:
        assert file.metadata()["format"] == "pt"
    description = json.loads((adapter / CONFIG).read_text())
    assert (adapter / CONFIG).read_text() == json.dumps(description, indent=2) + "\n"  # for people to read
    assert description["format_version"] == 1
    assert description["sta_adapter_version"] == sta_adapter.__version__
    assert description["lora"] is False
    assert description["backbone"] == "qwen2_vl"
    assert description["encoder"] == {"width": 32, "depth": 3, "num_heads": 1, "head_dim": 8}
    assert description["config"]["layers"] == [0, 2]
    assert set(description["base_model"]) == {"id", "revision"}


def test_round_trip(adapter):
    handle = load_sta(seeded(make_qwen2_vl_tower), adapter)
    assert handle.config == STAConfig(gamma_init=0.1, layers=[0, 2], causal=True)
    saved = load_file(adapter / WEIGHTS)
    for index, module in handle.blocks.items():
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, saved[f"blocks.{index}.{name}"])
    assert not any(p.requires_grad for p in handle.parameters())
    again = load_sta(seeded(make_qwen2_vl_tower), str(adapter), is_trainable=True)
    assert all(p.requires_grad for p in again.parameters())


def test_an_adapter_that_names_a_kernel_of_another_machine(tmp_path):
    """What it was trained with need not be there where it is used."""
    handle = inject_sta(seeded(make_qwen2_vl_tower), STAConfig(attention="xformers", init="normal"))
    handle.save_pretrained(tmp_path)
    clip = torch.randn(32, 96), torch.tensor([[2, 4, 4]])
    with pytest.raises(BackendError, match=r"attention='xformers' can't be used here.* or, .*, in load_sta\(...\)"):
        load_sta(seeded(make_qwen2_vl_tower), tmp_path).encoder(*clip)
    loaded = load_sta(seeded(make_qwen2_vl_tower), tmp_path, attention="auto")
    assert loaded.config == dataclasses.replace(handle.config, attention="auto")
    handle.remove()
    expected = inject_sta(seeded(make_qwen2_vl_tower), loaded.config)
    for module, saved in zip(expected.blocks.values(), loaded.blocks.values(), strict=True):
        module.load_state_dict(saved.state_dict())
    assert torch.equal(loaded.encoder(*clip)[0], expected.encoder(*clip)[0])
    with pytest.raises(ConfigError, match="attention"):
        load_sta(seeded(make_qwen2_vl_tower), tmp_path, attention="flash")


def test_an_argument_that_is_none(adapter):
    """It would have no effect where nothing is downloaded."""
    model = seeded(make_qwen2_vl_tower)
    before = state(model)
    for name, hint in (("trainable", r" \(did you mean 'is_trainable'\?\)"), ("backbone", "")):
        with pytest.raises(
            ConfigError, match=f"load_sta has no argument '{name}'{hint}; known: .*is_trainable.*cache_dir"
        ):
            load_sta(model, adapter, **{name: True})
    assert_unchanged(model, before)
    load_sta(model, adapter, token=False, is_trainable=True)


def test_adapters_of_before_there_were_windows(adapter):
    """And files without a window are as then, so that older releases read them."""
    assert "window" not in json.loads((adapter / CONFIG).read_text())["config"]
    assert load_sta(seeded(make_qwen2_vl_tower), adapter).config.window is None


def test_a_window_is_kept(tmp_path):
    handle = inject_sta(seeded(make_qwen2_vl_tower), STAConfig(causal=True, window=5))
    handle.save_pretrained(tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["config"]["window"] == 5
    loaded = load_sta(seeded(make_qwen2_vl_tower), tmp_path)
    assert (loaded.config, loaded.stream().window) == (handle.config, 5)
    edit(tmp_path, config={**handle.config.to_dict(), "window": 6})
    refused(tmp_path, "were not saved together")
    edit(tmp_path, config={**handle.config.to_dict(), "window": 0})
    refused(tmp_path, "window=0: expected a whole number of frames above 0")


def test_into_another_dtype(adapter):
    handle = load_sta(seeded(make_qwen2_vl_tower).to(torch.bfloat16), adapter)
    assert {p.dtype for p in handle.parameters()} == {torch.bfloat16}


def refused(folder, message, error=CheckpointError, make=make_qwen2_vl_tower):
    """Loading fails with the message, and the model stays as it was."""
    model = seeded(make)
    before = state(model)
    with pytest.raises(error, match=message) as caught:
        load_sta(model, folder)
    assert isinstance(caught.value, STAError)
    assert_unchanged(model, before)


def test_missing_files(adapter, tmp_path):
    refused(tmp_path / "nowhere", "there is no folder")
    refused(adapter / WEIGHTS, "is a file; expected the folder")
    refused(nn.Linear(1, 1), "the adapter is a Linear; expected its folder, or its id on the Hub", ConfigError)
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no sta_config.json.*found: nothing")
    (adapter / WEIGHTS).unlink()
    refused(adapter, "holds no sta_adapter.safetensors")


def test_a_cut_off_saving_that_cant_be_finished(adapter, monkeypatch):
    def read_only(folder):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(adapter_format, "finish_write", read_only)
    refused(adapter, "was interrupted and can't be completed: .*Permission denied. Make the folder writable")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged or no safetensors"),
        (b"PK\x03\x04 pickle", "damaged or no safetensors"),
        (b"\xff" * 64, "damaged or no safetensors"),
        (b"\x02\x00\x00\x00\x00\x00\x00\x00{}", "missing blocks.0.norm.weight"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a pointer of Git LFS.*git lfs pull"),
    ],
    ids=["empty", "foreign", "lying length", "no tensors", "Git LFS"],
)
def test_damaged_weights(adapter, content, message):
    (adapter / WEIGHTS).write_bytes(content)
    refused(adapter, message)


@pytest.mark.parametrize("share", [0.0001, 0.3, 0.999])
def test_truncated_weights(adapter, share):
    whole = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(whole[: int(len(whole) * share)])
    refused(adapter, "damaged or no safetensors")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "can't be read as JSON"),
        ("[1, 2]", "holds a list, expected a JSON object"),
        ('{"format_version": true}', "has no format_version"),
        ("[" * 100_000, "can't be read as JSON"),
        ('{"format_version": 2}', "format version 2; this sta-adapter reads 1. Upgrade"),
        ('{"format_version": 1, "backbone": 3, "config": {}}', "lacks backbone, encoder"),
        ('{"format_version": 1, "x": "' + "y" * (1 << 20) + '"}', "expected at most 1048576"),
    ],
    ids=["empty", "list", "boolean", "deep", "newer", "types", "huge"],
)
def test_damaged_configuration(adapter, text, message):
    (adapter / CONFIG).write_text(text)
    refused(adapter, message)


def test_unknown_or_bad_configuration_fields(adapter):
    config = json.loads((adapter / CONFIG).read_text())["config"]
    edit(adapter, config={**config, "head_scales": 1})
    refused(adapter, r"unknown STA configuration field 'head_scales' \(did you mean 'head_scale'")
    edit(adapter, config={**config, "head_scale": -1})
    refused(adapter, "above 0")
    edit(adapter, config={**config, "layers": [0, 7]})
    refused(adapter, r"layers \[7\] don't exist", ConfigError)


def test_another_encoder_lists_every_difference(adapter, toy):  # noqa: F811
    before = state(toy)
    with pytest.raises(
        CheckpointError, match="backbone: 'qwen2_vl' in the adapter, 'toy' in the model; width: 32 in the adapter, 16"
    ):
        load_sta(toy, adapter)
    assert_unchanged(toy, before)
    edit(adapter, encoder={"width": 64, "depth": 9, "num_heads": 1, "head_dim": 8})
    refused(adapter, "width: 64 in the adapter, 32 in the model; depth: 9 in the adapter, 3 in the model")


def test_tensors_that_do_not_fit_are_all_listed(adapter):
    tensors = load_file(adapter / WEIGHTS)
    tensors["blocks.1.gamma"] = tensors.pop("blocks.0.gamma")
    tensors["blocks.2.gamma"] = tensors["blocks.2.gamma"][:5].clone()
    save_file(tensors, adapter / WEIGHTS)
    refused(
        adapter,
        r"missing blocks.0.gamma; unexpected blocks.1.gamma; blocks.2.gamma has the shape \(5,\), expected \(32,\)",
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(adapter, value, tmp_path):
    tensors = load_file(adapter / WEIGHTS)
    tensors["blocks.0.gamma"][3] = value
    save_file(tensors, adapter / WEIGHTS)
    refused(adapter, "not finite floating-point numbers of 16, 32 or 64 bits, the first is 'blocks.0.gamma'")
    handle = inject_sta(seeded(make_qwen2_vl_tower))
    torch.nn.init.constant_(handle.blocks[1].to_out.bias, value)
    with pytest.raises(CheckpointError, match=r"hold NaN or infinity, the first is blocks\.1\.to_out\.bias; not saved"):
        handle.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_whole_numbers_are_no_weights(adapter):
    tensors = load_file(adapter / WEIGHTS)
    tensors["blocks.0.gamma"] = torch.zeros(32, dtype=torch.int64)
    save_file(tensors, adapter / WEIGHTS)
    refused(adapter, "not finite floating-point numbers")


def test_files_of_two_adapters(adapter):
    config = json.loads((adapter / CONFIG).read_text())["config"]
    edit(adapter, config={**config, "causal": False})
    refused(adapter, "were not saved together")


def test_a_model_with_sta_already(adapter):
    model = seeded(make_qwen2_vl_tower)
    inject_sta(model)
    before = state(model)
    with pytest.raises(InjectionError, match="has STA already"):
        load_sta(model, adapter)
    assert_unchanged(model, before)


def test_a_foreign_model(adapter):
    refused(adapter, "no backbone matches 'Linear'", UnknownBackboneError, lambda: torch.nn.Linear(2, 2))


def test_saving_over_an_adapter_is_all_or_nothing(adapter, monkeypatch):
    before = {p.name: p.read_bytes() for p in adapter.iterdir()}
    handle = inject_sta(seeded(make_qwen2_vl_tower), STAConfig(init="normal"))

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"can.t write the adapter to .*No space left"):
        handle.save_pretrained(adapter)
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in adapter.iterdir()} == before
    handle.save_pretrained(adapter)
    assert load_sta(seeded(make_qwen2_vl_tower), adapter).config.init == "normal"


def test_saving_over_the_result_of_a_training(adapter):
    """Whose settings the model card would tell of what was saved by hand."""
    handle = load_sta(seeded(make_qwen2_vl_tower), adapter)
    (adapter / "run.json").write_text("{}")
    with pytest.warns(STAWarning, match=r"adapter/run\.json tells how the adapter that lay here was trained"):
        handle.save_pretrained(adapter)
    assert (adapter / "run.json").read_text() == "{}"


def test_a_folder_that_can_not_be(tmp_path):
    handle = inject_sta(seeded(make_qwen2_vl_tower))
    with pytest.raises(CheckpointError, match="can't write the adapter to"):
        handle.save_pretrained(tmp_path / ("n" * 300))


def test_sharded_weights_are_written_by_one_process(tmp_path, monkeypatch):
    monkeypatch.setattr("sta_adapter.injection.contents.is_sharded", lambda parameters: True)
    inject_sta(seeded(make_qwen2_vl_tower)).save_pretrained(tmp_path)
    assert load_sta(seeded(make_qwen2_vl_tower), tmp_path).backbone == "qwen2_vl"


def test_lora_travels_along_and_the_hub_id_is_kept(tmp_path):
    peft = pytest.importorskip("peft")
    model = seeded(make_qwen2_vl)
    model.config._name_or_path = "Qwen/Qwen2-VL-2B-Instruct"
    handle = inject_sta(model)
    wrapped = peft.get_peft_model(model, handle.lora_config(r=2))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name or ".sta." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    prompt = qwen2_vl_prompt(3)
    with torch.no_grad():
        expected = wrapped(**prompt).logits
    handle.save_pretrained(tmp_path)  # the handle has not been told of the PeftModel
    assert json.loads((tmp_path / CONFIG).read_text())["base_model"]["id"] == "Qwen/Qwen2-VL-2B-Instruct"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        WEIGHTS,
        CONFIG,
    ]
    loaded = load_sta(seeded(make_qwen2_vl), tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded.model(**prompt).logits, expected)
    assert not any(p.requires_grad for p in loaded.model.parameters())
    trainable = load_sta(seeded(make_qwen2_vl), tmp_path, is_trainable=True)
    assert all(p.requires_grad for p in trainable.parameters())
    assert any("lora_" in n and p.requires_grad for n, p in trainable.model.named_parameters())
    (tmp_path / "adapter_model.safetensors").unlink()
    (tmp_path / "adapter_model.bin").write_bytes(b"a pickle")
    refused(tmp_path, "pickled weights are never read", make=make_qwen2_vl)


def test_saved_from_a_disabled_handle(adapter):
    model = seeded(make_qwen2_vl_tower)
    handle = load_sta(model, adapter)
    handle.disable()
    handle.save_pretrained(adapter)
    twin = load_sta(seeded(make_qwen2_vl_tower), adapter)
    handle.enable()
    arguments = qwen2_vl_arguments([Clip(3)])
    found, expected = twin.model(**arguments), model(**arguments)
    assert torch.equal(*(o if isinstance(o, torch.Tensor) else o.pooler_output for o in (found, expected)))


def with_lora(folder):
    """A folder with an adapter that has LoRA beside it."""
    peft = pytest.importorskip("peft")
    handle = inject_sta(seeded(make_qwen2_vl_tower))
    peft.get_peft_model(handle.model, handle.lora_config(r=2))
    handle.save_pretrained(folder)


@pytest.mark.parametrize("content", [b"", b"junk" * 99], ids=["empty", "foreign"])
def test_damaged_lora_weights(tmp_path, content):
    with_lora(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(content)
    refused(tmp_path, "adapter_model.safetensors is damaged or no safetensors file")


def test_lora_for_another_model(tmp_path):
    with_lora(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["attn.qkv"], "r": 5}))
    refused(tmp_path, r"lora_A.weight has the shape \(2, 32\), expected \(5, 32\)")


def test_an_adapter_without_lora_replaces_one_with_it(tmp_path):
    with_lora(tmp_path)
    inject_sta(seeded(make_qwen2_vl_tower)).save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [WEIGHTS, CONFIG]


def test_lora_that_was_saved_beside_by_peft_itself_is_kept_and_loaded(adapter, tmp_path):
    peft = pytest.importorskip("peft")
    model = seeded(make_qwen2_vl_tower)
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["attn.qkv"])).save_pretrained(adapter)
    inject_sta(seeded(make_qwen2_vl_tower)).save_pretrained(adapter)
    assert isinstance(load_sta(seeded(make_qwen2_vl_tower), adapter).model, peft.PeftModel)
