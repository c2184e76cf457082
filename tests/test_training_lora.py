"""Stage two's LoRA as a run's settings have it."""

import dataclasses

import pytest
from cases import make_qwen2_vl
from peft import get_peft_model

from sta_adapter import get_sta, inject_sta
from sta_adapter.errors import ConfigError
from sta_adapter.injection.backbone import LoRARecipe
from sta_adapter.injection.registry import get_backbone
from sta_adapter.training import TrainingConfig
from sta_adapter.training.lora import lora_config, require_effect, require_same_lora
from sta_adapter.training.stage import Stage


@pytest.mark.parametrize("sta", [True, False])
def test_lora_on_the_language_model_alone(sta):
    model = make_qwen2_vl()
    handle = inject_sta(model) if sta else None
    found = lora_config(model, handle, TrainingConfig(lora_targets="language", lora_rank=3))
    names = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in found.target_modules}
    assert not names  # whole names
    assert all("layers." in name and "visual" not in name for name in found.target_modules)
    assert {name.rpartition(".")[2] for name in found.target_modules} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    assert (found.r, found.rank_pattern, found.alpha_pattern, found.bias) == (3, {}, {}, "none")


@pytest.mark.parametrize("name", ["lora_qkv_rank", "lora_qkv_alpha"])
def test_the_rank_of_a_layer_that_an_encoder_has_not(name):
    spec = get_backbone("qwen2_vl")
    require_effect(spec, TrainingConfig(**{name: 4}))
    plain = dataclasses.replace(spec, name="plain", lora=LoRARecipe(("q_proj",)))
    require_effect(plain, TrainingConfig(lora_rank=4))
    with pytest.raises(ConfigError, match=f"{name} has no effect on backbone 'plain'"):
        require_effect(plain, TrainingConfig(**{name: 4}))


@pytest.fixture(scope="module")
def wrapped():
    handle = inject_sta(make_qwen2_vl())
    return get_peft_model(handle.model, handle.lora_config(r=4, lora_alpha=8, lora_dropout=0.5, rank_pattern={}))


def test_lora_that_a_model_brings_is_what_was_asked_for(wrapped):
    require_same_lora(wrapped, TrainingConfig())
    require_same_lora(wrapped, TrainingConfig(lora_rank=4, lora_alpha=8, lora_dropout=0.5))


@pytest.mark.parametrize(
    ("setting", "value", "found"),
    [
        ("lora_rank", 5, "4"),
        ("lora_alpha", 5, "8"),
        ("lora_dropout", 0.1, "0.5"),
        ("lora_qkv_rank", 4, "set up when it was made"),
        ("lora_qkv_alpha", 4, "set up when it was made"),
        ("lora_targets", "language", "set up when it was made"),
    ],
)
def test_lora_that_a_model_brings_is_not_changed_silently(wrapped, setting, value, found):
    with pytest.raises(ConfigError, match=rf"{setting} is .*, but the model has LoRA already \({found}\)"):
        require_same_lora(wrapped, TrainingConfig(**{setting: value}))


@pytest.mark.parametrize(
    "options", [{}, {"bias": "lora_only"}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}, {"use_dora": True}]
)
def test_lora_that_a_model_brings_trains_as_it_says(options, tmp_path):
    """Also where it was loaded to answer: biases and modules that it trains whole, not its layers and STA alone."""
    handle = inject_sta(make_qwen2_vl())
    model = get_peft_model(handle.model, handle.lora_config(**options))
    trained = trained_names(model)
    beside = {name for name in trained if ".lora_" not in name and ".sta." not in name}
    assert bool(beside) is ("bias" in options or "modules_to_save" in options)
    model.requires_grad_(False)
    Stage("2", TrainingConfig(), tmp_path, dataset=None).prepare(model, get_sta(model))
    assert trained_names(model) == trained


def trained_names(model):
    """Of what trains, but for the copies of whole modules that PEFT keeps and nothing computes with."""
    return {name for name, p in model.named_parameters() if p.requires_grad and ".original_module." not in name}
