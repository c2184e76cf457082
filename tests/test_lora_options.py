"""LoRA's options: each that is supported is saved, loaded and merged, with the base as it was; any other is refused, with nothing changed."""

import dataclasses
import json
import re

import peft
import pytest
import torch
from cases import make_qwen2_vl, qwen2_vl_prompt, seeded
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_inject import assert_unchanged, state
from torch import nn

from sta_adapter import STAConfig, get_sta, inject_sta, load_sta
from sta_adapter.adapter.lora_options import SUPPORTED, LoraOptions, checked_options
from sta_adapter.adapter.lora_weights import LORA_CONFIG, LORA_WEIGHTS, lora_disabled, read_lora
from sta_adapter.adapter.push_check import read_checked
from sta_adapter.errors import CheckpointError, ConfigError
from sta_adapter.loading import load_adapter

KNOWN = {field.name for field in dataclasses.fields(LoraConfig)}
OPTIONS = {
    "r": {"r": 3},
    "lora_alpha": {"lora_alpha": 5},
    "lora_dropout": {"lora_dropout": 0.3},
    "target_modules": {"target_modules": r".*(q_proj|attn\.qkv)"},
    "all-linear": {"target_modules": "all-linear"},
    "exclude_modules": {"exclude_modules": ["attn.proj", "v_proj"]},
    "rank_pattern": {"r": 2, "rank_pattern": {r"blocks\.\d\.attn\.qkv": 4, "v_proj": 1}},
    "alpha_pattern": {"alpha_pattern": {"attn.qkv": 9}},
    "layers_to_transform": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "layers_pattern": {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
    "modules_to_save": {"modules_to_save": ["merger"]},
    "modules_to_save-targets": {"target_modules": ["q_proj", "mlp.0", "mlp.2"], "modules_to_save": ["merger"]},
    "modules_to_save-ends": {"modules_to_save": ["layernorm"]},
    "target_modules-sta": {"target_modules": r".*(to_qkv|q_proj)"},
    "bias": {"bias": "lora_only"},
    "bias-all": {"bias": "all"},
    "init_lora_weights": {"init_lora_weights": "gaussian"},
    "use_rslora": {"use_rslora": True},
    "use_dora": {"use_dora": True},
    "task_type": {"task_type": "CAUSAL_LM"},
}
OFFERED = [name for name, values in OPTIONS.items() if set(values) <= KNOWN]
# what switches on each option that is not supported, of any release of PEFT
REFUSED = {
    "megatron_config": {"a": 1},
    "trainable_token_indices": [1, 2],
    "loftq_config": {"loftq_bits": 4},
    "eva_config": {"rho": 2.0},
    "corda_config": {"a": 1},
    "lora_ga_config": {"a": 1},
    "velora_config": {"a": 1},
    "alora_invocation_tokens": [1],
    "use_qalora": True,
    "monteclora_config": {"a": 1},
    "layer_replication": [[0, 2]],
    "lora_bias": True,
    "target_parameters": ["q_proj.weight"],
    "use_bdlora": {"a": 1},
    "arrow_config": {"a": 1},
    "kasa_config": {"a": 1},
    "ensure_weight_tying": True,
    "fan_in_fan_out": True,
    "runtime_config": {"ephemeral_gpu_offload": True},
    "an_option_of_tomorrow": "on",
}


def trained(**options):
    """A model with STA and LoRA, every trained tensor random."""
    handle = inject_sta(seeded(make_qwen2_vl), STAConfig(init="normal"))
    model = get_peft_model(handle.model, handle.lora_config(**options))
    for parameter in (p for p in model.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(**qwen2_vl_prompt(3)).logits


@pytest.mark.parametrize("option", OFFERED)
def test_a_supported_option(option, tmp_path):
    model = trained(**OPTIONS[option])
    base = logits(seeded(make_qwen2_vl))
    expected = logits(model)
    assert not torch.allclose(expected, base, atol=1e-3)
    get_sta(model).save_pretrained(tmp_path)
    handle = load_sta(seeded(make_qwen2_vl), tmp_path)
    assert torch.equal(logits(handle.model), expected)
    again = tmp_path / "again"
    handle.save_pretrained(again)
    assert torch.equal(logits(load_sta(seeded(make_qwen2_vl), again).model), expected)
    with handle.disabled(), lora_disabled(handle.model):
        assert torch.equal(logits(handle.model), base)
    assert torch.equal(logits(handle.model), expected)
    assert torch.allclose(logits(handle.model.merge_and_unload()), expected, atol=1e-4)


def test_lora_on_the_output_layer(tmp_path):
    """PEFT saves that layer's own weight along."""
    model = trained(target_modules=["q_proj", "lm_head"])
    get_sta(model).save_pretrained(tmp_path)
    assert torch.equal(logits(load_sta(seeded(make_qwen2_vl), tmp_path).model), logits(model))
    assert LORA_WEIGHTS in read_checked(tmp_path)[2]  # and it can be published


PATTERNS = {
    "a choice": {"rank_pattern": {"k_proj|v_proj": 3}, "alpha_pattern": {"q_proj|v_proj": 9}},
    "rank and alpha by other names": {"rank_pattern": {"attn.qkv": 4}, "alpha_pattern": {"qkv": 32}},
    "one of the backbone's layers": {"alpha_pattern": {r"visual.*blocks\.0\.attn\.qkv": 9}},
    "from the start": {"alpha_pattern": {r"^.*visual.*qkv": 9}},
}
READINGS = {  # the pattern that gives a module's rank, and the one that gives its alpha
    "peft 0.13": lambda ranks, alphas, name: 2 * [found(r".*\.{}$", [*ranks, *alphas], name)],
    "peft 0.14": lambda ranks, alphas, name: [found(r".*\.{}$", keys, name) for keys in (ranks, alphas)],
    "since 0.15": lambda ranks, alphas, name: [found(r"(.*\.)?({})$", keys, name) for keys in (ranks, alphas)],
}


def found(form, keys, name):
    return next((key for key in keys if re.match(form.format(key), name)), name)


def lora_layers(model):
    layers = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    return {name: (layer.r["default"], layer.scaling["default"] * layer.r["default"]) for name, layer in layers.items()}


@pytest.mark.parametrize("patterns", PATTERNS.values(), ids=PATTERNS.keys())
def test_a_pattern_means_the_same_to_every_release(patterns):
    handle = inject_sta(seeded(make_qwen2_vl))
    asked = {
        "rank_pattern": handle.lora_config().rank_pattern,
        "alpha_pattern": {},
        "r": 2,
        "lora_alpha": 5,
        **patterns,
    }
    wanted = LoraOptions(asked)
    model = get_peft_model(handle.model, handle.lora_config(**asked))
    layers = lora_layers(model)
    assert layers == {name: (wanted.rank(name), wanted.alpha(name)) for name in layers}
    assert len(set(layers.values())) > 1
    config = model.peft_config["default"]
    for keys in READINGS.values():
        for name, expected in layers.items():
            rank, alpha = keys(config.rank_pattern, config.alpha_pattern, name)
            assert (config.rank_pattern.get(rank, 2), config.alpha_pattern.get(alpha, 5)) == expected


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=["q_proj", "v_proj", "qkv"], **PATTERNS["a choice"]),
        LoraConfig(r=2, target_modules=["q_proj", "attn.qkv"], **PATTERNS["rank and alpha by other names"]),
        LoraConfig(r=2, target_modules=["q_proj", "v_proj"], use_rslora=True),
    ],
    ids=["a choice", "rank and alpha by other names", "set by hand"],
)
def test_what_is_saved_is_what_computes(config, tmp_path):
    """Settings of one's own, which the installed PEFT may read otherwise than we do, and scales that were changed since."""
    handle = inject_sta(seeded(make_qwen2_vl), STAConfig(init="normal"))
    model = get_peft_model(handle.model, dataclasses.replace(config))
    for name, layer in model.named_modules():
        if config.use_rslora and name.endswith("layers.0.self_attn.q_proj"):
            layer.scale_layer(3.5)
        for parameter in getattr(layer, "lora_B", nn.Module()).parameters():
            nn.init.normal_(parameter, std=0.1)
    get_sta(model).save_pretrained(tmp_path)
    assert torch.equal(logits(load_sta(seeded(make_qwen2_vl), tmp_path).model), logits(model.eval()))


def test_a_scale_that_no_file_holds(tmp_path):
    model = trained()
    next(module for module in model.modules() if hasattr(module, "lora_A")).scale_layer(0)
    with pytest.raises(CheckpointError, match=r"LoRA on \S+ is scaled by 0\.0 in this model, which can't be saved"):
        get_sta(model).save_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["lora", "d", "visual"])
def test_an_adapter_s_name_is_none_of_a_module_s(name, tmp_path):
    handle = inject_sta(seeded(make_qwen2_vl), STAConfig(init="normal"))
    model = get_peft_model(handle.model, handle.lora_config(modules_to_save=["merger"]), adapter_name=name)
    model.add_adapter("other", get_sta(model).lora_config())
    for parameter in (
        p for key, p in model.named_parameters() if f".{name}." in key and (p.requires_grad or "lora_" in key)
    ):
        nn.init.normal_(parameter, std=0.1)
    with pytest.warns(UserWarning, match=f"'{name}' is saved, which is at work; not saved: other"):
        get_sta(model).save_pretrained(tmp_path)
    assert torch.equal(logits(load_sta(seeded(make_qwen2_vl), tmp_path).model), logits(model.eval()))


def test_what_is_trained_whole_is_not_inside_sta():
    with pytest.raises(ConfigError, match=r"modules_to_save names 'norm'.*inside STA.*'language_model.norm'"):
        inject_sta(seeded(make_qwen2_vl)).lora_config(modules_to_save=["norm"])


def test_names_of_another_release_leave_few_patterns(tmp_path):
    """A file holds a limited number of them, and a model has more layers."""
    get_sta(
        trained(rank_pattern={"attn.qkv": 3}, alpha_pattern={"attn.qkv": 7, "layers.0.self_attn.q_proj": 2})
    ).save_pretrained(tmp_path)
    state = load_file(tmp_path / LORA_WEIGHTS)
    (tmp_path / LORA_WEIGHTS).unlink()
    parts = {"model.visual.": "visual.", "model.language_model.": "model."}  # before transformers 4.52, and since
    if not any(".model.model.visual." in key for key in state):
        parts = {older: newer for newer, older in parts.items()}
    start = re.compile(rf"(?<=^base_model\.model\.)({'|'.join(parts)})")
    other = {start.sub(lambda match: parts[match[1]], key): tensor for key, tensor in state.items()}
    assert not set(other) & set(state)
    save_file(other, tmp_path / LORA_WEIGHTS, {"format": "pt"})
    loaded = load_sta(seeded(make_qwen2_vl), tmp_path).model
    found = loaded.peft_config["default"]
    assert found.rank_pattern == {"qkv": 3, "0.self_attn.q_proj": found.r}
    assert found.alpha_pattern == {"qkv": 7, "0.self_attn.q_proj": 2}


def test_a_base_that_cant_be_had_is_not_guessed():
    """Where the biases were trained in this process, nobody has kept what they were."""
    with (
        pytest.raises(CheckpointError, match=r"biases were trained \(bias='all'\); load the base anew"),
        lora_disabled(trained(bias="all")),
    ):
        pass


def test_every_supported_option_has_a_case():
    assert {name for values in OPTIONS.values() for name in values} == set(SUPPORTED)


def test_no_option_of_peft_is_left_out():
    known = {"peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"}
    assert {*SUPPORTED, *REFUSED, *known, "megatron_core", "qalora_group_size"} >= KNOWN


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_another_option_is_refused_when_it_is_set_up(name):
    handle = inject_sta(seeded(make_qwen2_vl))
    before = state(handle.model)
    with pytest.raises(ConfigError, match=rf"LoRA's settings sets {name}|LoraConfig has no field {name}"):
        handle.lora_config(**{name: REFUSED[name]})
    assert_unchanged(handle.model, before)


WRONG = [
    ("r", 0), ("r", 400_000), ("r", 2.0), ("r", True), ("r", None), ("r", 10**4000),
    ("lora_alpha", float("nan")), ("lora_alpha", float("inf")), ("lora_alpha", 0), ("lora_alpha", "8"), ("lora_alpha", 10**400),
    ("lora_dropout", 1.0), ("lora_dropout", -0.1), ("lora_dropout", None),
    ("target_modules", 3.5), ("target_modules", [["a"]]), ("target_modules", "(a+)+$"), ("target_modules", [""]),
    ("exclude_modules", "("), ("exclude_modules", 3), ("rank_pattern", {"(a*)*": 3}), ("rank_pattern", {"a": 10**9}),
    ("rank_pattern", ["a"]), ("alpha_pattern", {"a": float("nan")}), ("alpha_pattern", {"a": "b"}),
    ("layers_to_transform", [-1]), ("layers_to_transform", 10**9), ("layers_pattern", "(a+)+"), ("layers_pattern", [["a"]]),
    ("layers_pattern", "layers"),
    ("modules_to_save", ["(a+)+"]), ("modules_to_save", "sta"), ("bias", "some"), ("bias", True),
    ("init_lora_weights", "pissa"), ("init_lora_weights", "pissa_niter_4"), ("init_lora_weights", "olora"),
    ("init_lora_weights", "eva"), ("init_lora_weights", "loftq"), ("init_lora_weights", "corda"),
    ("init_lora_weights", "orthogonal"), ("init_lora_weights", 1),
    ("use_rslora", 1), ("use_dora", "yes"), ("task_type", "SEQ_CLS"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"), WRONG, ids=lambda value: str(value)[:12] if not isinstance(value, int) else ""
)
def test_values_out_of_range_are_refused(name, value):
    handle = inject_sta(seeded(make_qwen2_vl))
    if name in KNOWN:
        with pytest.raises(ConfigError, match=r"LoRA's settings"):
            handle.lora_config(**{name: value})
    with pytest.raises(CheckpointError, match="here"):
        checked_options({"peft_type": "LORA", "target_modules": ["a"], name: value}, "here")


def test_a_refusal_says_what_is_expected():
    with pytest.raises(CheckpointError, match=r"lora_dropout.*1\.0.*expected a number from 0 to below 1"):
        checked_options({"peft_type": "LORA", "target_modules": ["a"], "lora_dropout": 1.0}, "here")
    with pytest.raises(CheckpointError, match="r is a number of thousands of digits, expected a whole number"):
        checked_options({"peft_type": "LORA", "target_modules": ["a"], "r": 10**5000}, "here")


def test_layers_go_with_names():
    """PEFT has an error of its own for it, which would come when an adapter is loaded."""
    with pytest.raises(
        ConfigError, match="layers_to_transform goes with names of modules, and target_modules is a pattern"
    ):
        inject_sta(seeded(make_qwen2_vl)).lora_config(target_modules=".*q_proj", layers_to_transform=[1])
    with pytest.raises(CheckpointError, match="here: layers_to_transform goes with names"):
        checked_options({"peft_type": "LORA", "target_modules": ".*q", "layers_to_transform": 1}, "here")
    checked_options({"peft_type": "LORA", "target_modules": ["q"], "layers_to_transform": 1}, "here")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["patch_embed.proj"], "a Conv3d; expected linear"),
        (["blocks.0"], "expected linear"),
        (["nothing"], "no module"),
    ],
    ids=["convolution", "block", "nothing"],
)
def test_targets_that_are_no_linear_layers(names, message):
    with pytest.raises(ConfigError, match=f"target_modules names .*{message}"):
        inject_sta(seeded(make_qwen2_vl)).lora_config(target_modules=names)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    get_sta(trained(r=2)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base():
    return seeded(make_qwen2_vl)


def edited(saved, folder, **fields):
    """A copy of the adapter with other LoRA settings."""
    for path in saved.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    settings = json.loads((saved / LORA_CONFIG).read_text())
    (folder / LORA_CONFIG).write_text(json.dumps({**settings, **fields}))
    return folder


ON_DISK = [*((name, value) for name, value in WRONG if value != 10**4000), *REFUSED.items(), ("peft_type", "XLORA")]


@pytest.mark.parametrize(("name", "value"), [*ON_DISK, ("r", 3), ("use_dora", True), ("target_modules", ["q_proj"])],
                         ids=lambda value: str(value)[:12])  # fmt: skip
def test_a_refused_adapter_leaves_the_model_as_it_was_to_the_bit(saved, tmp_path, base, name, value):
    before = state(base)
    attributes = set(vars(base))
    edited(saved, tmp_path, **{name: value})
    for load in (load_sta, load_adapter):
        with pytest.raises(CheckpointError):
            load(base, tmp_path)
        assert_unchanged(base, before)
        assert set(vars(base)) == attributes
    (tmp_path / "sta_config.json").unlink()  # the same for LoRA without STA
    with pytest.raises(CheckpointError):
        load_adapter(base, tmp_path)
    assert_unchanged(base, before)


def test_fields_that_say_only_where_lora_comes_from_are_passed_over(saved, tmp_path):
    fields = {
        "revision": "main", "peft_version": "0.1", "base_model_name_or_path": "org/base", "inference_mode": False,
        "megatron_core": "core", "qalora_group_size": 4, "auto_mapping": {"base_model_class": "Other"},
    }  # fmt: skip
    expected = logits(load_sta(seeded(make_qwen2_vl), saved).model)
    edited(saved, tmp_path, **fields)
    assert torch.equal(logits(load_sta(seeded(make_qwen2_vl), tmp_path).model), expected)


def test_ranks_are_compared_before_anything_is_built(saved, tmp_path, base, monkeypatch):
    edited(saved, tmp_path, r=8192)
    monkeypatch.setattr(peft, "get_peft_model", lambda *args, **_: pytest.fail("LoRA was built"))
    with pytest.raises(CheckpointError, match=r"lora_A.weight has the shape \(2, 64\), expected \(8192, 64\)"):
        load_sta(base, tmp_path)


def test_a_failure_inside_peft_is_undone(saved, base, monkeypatch):
    before = state(base)
    attributes = set(vars(base))
    make = peft.get_peft_model

    def fail(*args, **kwargs):
        make(*args, **kwargs)
        raise KeyError("inside")

    monkeypatch.setattr(peft, "get_peft_model", fail)
    with pytest.raises(CheckpointError, match=r"peft can't load the LoRA weights.*inside"):
        load_sta(base, saved)
    assert_unchanged(base, before)
    assert set(vars(base)) == attributes


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_a_pickle_is_never_opened(saved, tmp_path, base, name):
    edited(saved, tmp_path)
    (tmp_path / "sta_config.json").unlink()
    (tmp_path / LORA_WEIGHTS).rename(tmp_path / name)
    with pytest.raises(CheckpointError, match="pickled weights are never read"):
        load_adapter(base, tmp_path)


def test_lora_on_a_model_that_has_it(saved):
    model = trained(r=2)
    get_sta(model).remove()
    with pytest.raises(CheckpointError, match="has LoRA already"):
        load_sta(model, saved)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    fields=st.dictionaries(
        st.sampled_from([*SUPPORTED, *REFUSED]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**30),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
            max_leaves=6,
        ),
        max_size=3,
    )
)
def test_whatever_stands_in_the_settings(saved, tmp_path, fields):
    """They are ours or refused; none is an error of another kind."""
    edited(saved, tmp_path, **fields)
    try:
        read_lora(tmp_path)
    except CheckpointError:
        return
    assert not set(fields) - set(SUPPORTED) or not any(fields[name] for name in set(fields) - set(SUPPORTED))
