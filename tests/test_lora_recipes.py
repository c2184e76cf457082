"""Stage two's LoRA reaches every linear layer of an encoder's blocks, as each backbone's recipe says."""

import pytest
from cases import case_parameters
from qwen2_vl_prompts import transformers_version
from torch import nn

from sta_adapter import get_sta, inject_sta
from sta_adapter.errors import ConfigError
from sta_adapter.injection.registry import get_backbone

LEFT_OUT = {  # layers without LoRA, and why
    "qwen2_5_omni-tower": {
        "attn.q",
        "attn.k",
        "attn.v",
    },  # names so short that the language model's would match as well
    "qwen3_omni-tower": {"mlp.0", "mlp.2"},  # the names of the merger's layers, too
    "glm4v_moe": {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"},  # PEFT takes these names for the experts', see docs
}
CASES = case_parameters(lambda case: get_backbone(case.backbone).lora is not None)
LANGUAGE_LEFT_OUT = {  # the last name of layers of the language model without LoRA: gates, mixers of streams, indexers
    "qwen3_5": {"in_proj_a", "in_proj_b"},
    "qwen4_exp": {
        *("in_proj_a", "in_proj_b", "shared_expert_gate", "index_qk_proj"),
        *("block_inject_weight", "input_mix_weight_down", "input_mix_weight_up"),
    },
    "glm4v_moe": set() if transformers_version() < (5,) else {"gate_proj", "up_proj", "down_proj"},  # as above
    "glm5_next": {"f_a_proj", "f_b_proj", "g_a_proj", "g_b_proj", "b_proj", "weights_proj", "wk", "wq_b"},
}


@pytest.mark.parametrize("case", CASES)
def test_lora_reaches_every_layer_of_a_block(case):
    peft = pytest.importorskip("peft")
    handle = inject_sta(case.make())
    blocks = list(handle.encoder.get_submodule(get_backbone(case.backbone).blocks))
    peft.get_peft_model(handle.model, handle.lora_config())
    assert any("lora_A" in name for block in blocks for name, _ in block.named_modules())
    left_out = set()
    for block in blocks:
        for name, module in block.named_modules():
            plain = isinstance(module, nn.Linear) and not name.endswith("base_layer")
            if plain and "lora_" not in name and not name.startswith("sta."):
                left_out.add(name)
    assert left_out <= LEFT_OUT.get(case.id, set())


@pytest.mark.parametrize("case", case_parameters(lambda case: get_backbone(case.backbone).lora and case.generate))
def test_lora_reaches_the_language_model_s_attention_and_mlps(case):
    peft = pytest.importorskip("peft")
    handle = inject_sta(case.make())
    peft.get_peft_model(handle.model, handle.lora_config())
    encoder = set(handle.encoder.modules())
    linear = [
        (name.rsplit(".", 1)[-1], hasattr(module, "lora_A"))
        for name, module in handle.model.named_modules()
        if ".layers." in name and module not in encoder and isinstance(getattr(module, "base_layer", module), nn.Linear)
    ]
    reached = {name for name, with_lora in linear if with_lora}
    left_out = {name for name, with_lora in linear if not with_lora and name not in ("base_layer", "default")}
    assert reached
    assert left_out - {"gate"} == LANGUAGE_LEFT_OUT.get(case.id, set())  # the router, which is linear in transformers 4


def test_a_recipe_is_what_the_backbone_declares_but_for_what_is_asked_for():
    from cases import make_qwen2_vl

    handle, recipe = inject_sta(make_qwen2_vl()), get_backbone("qwen2_vl").lora
    found = handle.lora_config()
    assert (found.r, found.lora_alpha, found.bias) == (recipe.r, recipe.lora_alpha, "none")
    assert found.target_modules == set(recipe.target_modules)
    assert found.rank_pattern == dict(recipe.rank_pattern)
    other = handle.lora_config(r=3, target_modules=["q_proj"])
    assert (other.r, other.lora_alpha, other.rank_pattern) == (3, recipe.lora_alpha, {})
    assert handle.lora_config(r=3).rank_pattern == {}  # one rank for all
    with pytest.raises(ConfigError, match=r"LoraConfig has no field rank; known: .*lora_alpha"):
        handle.lora_config(rank=3)


def test_all_linear_is_every_linear_layer_but_the_output_and_stas_own():
    from cases import make_qwen2_vl

    model = make_qwen2_vl()
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    found = inject_sta(model).lora_config(target_modules="all-linear")
    assert found.target_modules == linear - {"lm_head"}


@pytest.mark.parametrize("targets", [None, "all-linear", r"model\.visual\..*attn\.qkv|visual\..*attn\.qkv"], ids=str)
def test_a_second_lora_lies_beside_the_first(targets):
    peft = pytest.importorskip("peft")
    from cases import make_qwen2_vl

    asked = {} if targets is None else {"target_modules": targets}
    handle = inject_sta(make_qwen2_vl())
    expected = handle.lora_config(**asked).target_modules
    model = peft.get_peft_model(handle.model, handle.lora_config())
    config = get_sta(model).lora_config(**asked)
    assert config.target_modules == expected
    model.add_adapter("second", config)
    layers = [module for module in model.modules() if "second" in getattr(module, "lora_A", {})]
    assert layers
    assert all(isinstance(layer.base_layer, nn.Linear) for layer in layers)
    model.set_adapter("second")
    assert all(parameter.requires_grad for parameter in get_sta(model).parameters())


def test_lora_is_for_linear_layers_alone():
    from cases import make_qwen2_vl

    handle = inject_sta(make_qwen2_vl())
    with pytest.raises(ConfigError, match=r"target_modules names '\S+norm1', a LayerNorm; expected linear layers"):
        handle.lora_config(target_modules=["norm1"])
    with pytest.raises(ConfigError, match="target_parameters"):
        handle.lora_config(target_parameters=["experts.gate_up_proj"])


def test_the_recipe_s_numbers_are_those_of_the_settings():
    from cases import make_qwen2_vl

    from sta_adapter.injection.text_positions import use_positions_of
    from sta_adapter.training import TrainingConfig
    from sta_adapter.training.lora import lora_config

    model = use_positions_of(make_qwen2_vl(), None)
    settings = TrainingConfig(lora_rank=3, lora_alpha=5, lora_qkv_rank=7, lora_qkv_alpha=11, lora_dropout=0.25)
    for handle in (None, inject_sta(model)):
        found = lora_config(model, handle, settings)
        assert (found.r, found.lora_alpha, found.lora_dropout) == (3, 5, 0.25)
        assert (found.rank_pattern, found.alpha_pattern) == ({"attn.qkv": 7}, {"attn.qkv": 11})
