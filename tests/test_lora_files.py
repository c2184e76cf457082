"""LoRA weights beside an adapter that are not what was saved are refused; PEFT alone only warns."""

import json
import sys

import pytest
import torch
from cases import case_parameters, make_qwen2_vl, seeded
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sta_adapter import get_sta, inject_sta, load_sta
from sta_adapter.adapter.format import WEIGHTS
from sta_adapter.adapter.lora_weights import LORA_CONFIG, LORA_WEIGHTS
from sta_adapter.errors import CheckpointError, MissingExtraError


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    from peft import get_peft_model

    handle = inject_sta(seeded(make_qwen2_vl))
    model = get_peft_model(handle.model, handle.lora_config(r=2))
    folder = tmp_path_factory.mktemp("adapter")
    get_sta(model).save_pretrained(folder)
    return folder


def spoil(saved, folder, change):
    """A copy of the adapter with its LoRA weights changed."""
    for path in saved.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    state = load_file(folder / LORA_WEIGHTS)
    change(state)
    save_file(state, folder / LORA_WEIGHTS, {"format": "pt"})


def first(state):
    return next(key for key in state if "lora_B" in key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(first(s)), r"^\S*adapter_model\.safetensors does not fit the model: missing base_model"),
        (lambda s: s.update({"base_model.model.extra.lora_A.weight": torch.ones(2)}), "unexpected base_model"),
        (lambda s: s.update({first(s): torch.ones(3, 2)}), r"has the shape \(3, 2\), expected"),
        (lambda s: s[first(s)].fill_(float("nan")), "not finite"),
    ],
    ids=["missing", "unexpected", "shape", "nan"],
)
def test_changed_weights(saved, tmp_path, change, message):
    spoil(saved, tmp_path, change)
    model = seeded(make_qwen2_vl)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trained = [p.requires_grad for p in model.parameters()]
    with pytest.raises(CheckpointError, match=message) as caught:
        load_sta(model, tmp_path)
    assert ("names modules that this model lacks" in str(caught.value)) is (message == "unexpected base_model")
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert [p.requires_grad for p in model.parameters()] == trained
    assert not hasattr(model, "peft_config")


def test_a_configuration_that_imports(saved, tmp_path):
    spoil(saved, tmp_path, lambda state: None)
    fields = json.loads((tmp_path / LORA_CONFIG).read_text())
    (tmp_path / LORA_CONFIG).write_text(json.dumps({**fields, "megatron_config": {"a": 1}, "megatron_core": "this"}))
    with pytest.raises(CheckpointError, match="sets megatron_config, with which"):
        load_sta(seeded(make_qwen2_vl), tmp_path)


def test_the_file_is_for_use_until_training_is_asked_for(saved):
    """As peft writes it; `is_trainable` of `load_sta` decides."""
    assert json.loads((saved / LORA_CONFIG).read_text())["inference_mode"] is True


def test_the_weights_are_marked_as_torchs(saved):
    with safe_open(saved / LORA_WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_adapters_own_file_counts_for_peft_copies_too(saved, tmp_path):
    """PEFT keeps a copy of STA in its file; edited weights of the adapter are not undone by it."""
    spoil(saved, tmp_path, lambda state: None)
    state = load_file(tmp_path / WEIGHTS)
    (tmp_path / WEIGHTS).unlink()  # what was loaded may still lie in it
    save_file({key: value + 1 for key, value in state.items()}, tmp_path / WEIGHTS)
    loaded = load_sta(seeded(make_qwen2_vl), tmp_path)
    for index, module in loaded.blocks.items():
        assert torch.equal(module.to_out.bias, state[f"blocks.{index}.to_out.bias"] + 1)
        assert not any(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("part", ["input", "output"])
def test_embeddings_that_peft_saved_along_are_taken(saved, tmp_path, part):
    embeddings = {"input": "get_input_embeddings", "output": "get_output_embeddings"}[part]
    model = seeded(make_qwen2_vl)
    name = next(name for name, module in model.named_modules() if module is getattr(model, embeddings)())
    weight = torch.randn_like(model.lm_head.weight)
    spoil(saved, tmp_path, lambda state: state.update({f"base_model.model.{name}.weight": weight}))
    loaded = load_sta(model, tmp_path)
    assert torch.equal(getattr(loaded.model, embeddings)().weight, weight)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["nothing"], "modules_to_save": None}, "target_modules name no module of this model"),
        (
            {"target_parameters": ["norm1.bias"]},
            r"target_parameters name '\S+norm1\.bias', which has the shape \(32,\)",
        ),
    ],
)
def test_lora_that_names_nothing_or_what_it_is_not_for(saved, tmp_path, settings, message):
    spoil(saved, tmp_path, dict.clear)
    fields = json.loads((tmp_path / LORA_CONFIG).read_text())
    (tmp_path / LORA_CONFIG).write_text(json.dumps({**fields, **settings}))
    with pytest.raises(CheckpointError, match=message):
        load_sta(seeded(make_qwen2_vl), tmp_path)


@pytest.mark.parametrize(
    ("transposed", "modules"),
    [(False, ["q_proj"]), (True, ["q_proj"]), (False, None)],
    ids=["out-in", "in-out", "alone"],
)
@pytest.mark.parametrize("experts", [["experts.down_proj"], ["experts.gate_up_proj", "experts.down_proj"]])
@pytest.mark.parametrize("case", case_parameters(lambda case: case.id == "qwen3_vl_moe"))
def test_lora_on_experts_weights_that_are_stacked(case, experts, transposed, modules, tmp_path):
    """Before 0.19 PEFT takes them for (experts, in, out), and since then where a module says that it is transposed."""
    import peft

    if "target_parameters" not in peft.LoraConfig.__dataclass_fields__:
        pytest.skip("this release of PEFT has no LoRA on parameters")
    arguments = {key: value for key, value in case.generate(4).items() if key != "max_new_tokens"}

    def make():
        model = seeded(case.make)
        module = next(module for name, module in model.named_modules() if name.endswith(".experts"))
        if transposed and hasattr(module, "is_transposed"):
            module.is_transposed = True
            for name, weight in list(module.named_parameters()):
                setattr(module, name, torch.nn.Parameter(weight.detach().transpose(1, 2).contiguous()))
        return model

    handle = inject_sta(make())
    config = peft.LoraConfig(r=2, target_modules=modules, target_parameters=experts)
    model = peft.get_peft_model(handle.model, config)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter, std=0.1)
    get_sta(model).save_pretrained(tmp_path)
    assert sum("experts" in key for key in load_file(tmp_path / LORA_WEIGHTS)) == 2 * len(experts)
    loaded = load_sta(make(), tmp_path).model
    with torch.no_grad():
        expected, plain = model.eval()(**arguments).logits, make()(**arguments).logits
        assert torch.equal(loaded(**arguments).logits, expected)
    assert not torch.allclose(plain, expected, atol=1e-3)


def test_the_hub_is_not_asked_about_embeddings(saved, tmp_path, monkeypatch):
    spoil(saved, tmp_path, lambda state: None)
    fields = json.loads((tmp_path / LORA_CONFIG).read_text())
    (tmp_path / LORA_CONFIG).write_text(json.dumps({**fields, "base_model_name_or_path": "org/a"}))
    asked = []
    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", lambda *args, **_: asked.append(args))
    load_sta(seeded(make_qwen2_vl), tmp_path)
    assert asked == []


def test_without_peft(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    model = seeded(make_qwen2_vl)
    with pytest.raises(
        MissingExtraError, match=r"holds LoRA weights; they need peft: pip install 'sta-adapter\[train\]'"
    ):
        load_sta(model, saved)
    assert get_sta(model) is None
