"""inject_sta, get_sta and the handle: what they refuse, and that a refusal changes nothing."""

import dataclasses
import gc
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
from cases import clips_of, make_qwen2_vl, make_qwen2_vl_tower, merged_tokens, qwen2_vl_arguments, randomize, seeded
from test_hooks import Wrapped
from torch import nn
from toy import TOY, ToyEncoder, toy, toy_pixels  # noqa: F401

from sta_adapter import STAConfig, get_sta, inject_sta, list_backbones, load_sta, register_backbone
from sta_adapter.errors import (
    ConfigError,
    InjectionError,
    LayoutError,
    MissingExtraError,
    STAError,
    UnknownBackboneError,
)
from sta_adapter.injection.registry import unregister_backbone


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}, [
        len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()
    ]


def assert_unchanged(model, before):
    tensors, hooks = state(model)
    assert tensors.keys() == before[0].keys()
    assert all(torch.equal(tensors[k], before[0][k]) for k in tensors)
    assert hooks == before[1]


def test_a_foreign_model_gets_the_list_of_backbones():
    with pytest.raises(UnknownBackboneError, match=r"no backbone matches 'Linear'; known: .*qwen2_vl") as caught:
        inject_sta(nn.Linear(2, 2))
    assert isinstance(caught.value, STAError)
    assert isinstance(caught.value, LookupError)


def test_an_unknown_backbone_name():
    with pytest.raises(UnknownBackboneError, match=r"no backbone 'qwen9'; known: .*qwen2_vl"):
        inject_sta(nn.Linear(2, 2), backbone="qwen9")


def test_a_backbone_that_does_not_fit_the_model():
    with pytest.raises(UnknownBackboneError, match=r"'Linear' holds no encoder for backbone 'qwen2_vl'.*Qwen2Vision"):
        inject_sta(nn.Linear(2, 2), backbone="qwen2_vl")


def test_wrong_arguments(toy):  # noqa: F811
    with pytest.raises(InjectionError, match="takes a torch module, found str"):
        inject_sta("Qwen/Qwen2-VL-2B-Instruct")
    with pytest.raises(ConfigError, match="cfg is a dict; expected an STAConfig"):
        inject_sta(toy, {"head_scale": 1})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"layers": [1, 3, 8]}, r"layers \[3, 8\] don't exist: the encoder has 3 blocks, 0 to 2"),
        (
            {"token_order": "published"},
            "token_order='published' is for weights trained with the released Qwen2-VL code",
        ),
        ({"gamma_init": 0.0}, "gamma_init=0 and init='zero' leave the branch without any gradient"),
    ],
)
def test_settings_that_do_not_fit_the_model(toy, config, message):  # noqa: F811
    before = state(toy)
    with pytest.raises(ConfigError, match=message):
        inject_sta(toy, STAConfig(**config))
    assert_unchanged(toy, before)


def test_a_failure_half_way_is_undone(toy, monkeypatch):  # noqa: F811
    before = state(toy)
    monkeypatch.setattr(toy, "register_forward_pre_hook", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        inject_sta(toy)
    monkeypatch.undo()
    assert_unchanged(toy, before)


def test_a_name_that_is_taken(toy):  # noqa: F811
    toy.blocks[1].sta = nn.Identity()
    before = state(toy)
    with pytest.raises(InjectionError, match=r"blocks \[1\] have an attribute 'sta' already"):
        inject_sta(toy)
    assert_unchanged(toy, before)


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module


def named(name):
    """A wrapper with the name of one that needs a process group, or a package, to be made."""
    return type(name, (Wrapper,), {})


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (
            named("DistributedDataParallel"),
            "in DistributedDataParallel already.* Inject before wrapping the model in Dist",
        ),
        (
            named("FullyShardedDataParallel"),
            "in FullyShardedDataParallel already.* Inject before wrapping the model in Full",
        ),
        (named("FSDPModule"), r"in FSDPModule already.* Inject before fully_shard\(model\)"),
        (named("DeepSpeedEngine"), r"in DeepSpeedEngine already.* Inject before deepspeed\.initialize"),
        (nn.DataParallel, "wrapped in DataParallel already.* Inject and train with DistributedDataParallel"),
        (torch.compile, "wrapped in OptimizedModule already.* Inject into the original model, then torch.compile it"),
        (lambda m: (m.blocks[0].compile(), m)[1], "ToyBlock is compiled already. Inject first"),
    ],
    ids=["DDP", "FSDP", "FSDP2", "DeepSpeed", "DataParallel", "torch.compile", "module.compile"],
)
def test_after_wrapping(toy, wrap, message):  # noqa: F811
    wrapped = wrap(toy)
    before = state(toy)
    with pytest.raises(InjectionError, match=message):
        inject_sta(wrapped)
    assert_unchanged(toy, before)


def test_the_modules_follow_their_block(toy):  # noqa: F811
    toy.to(torch.bfloat16).eval()
    toy.blocks[1].to(torch.float64).train()
    handle = inject_sta(toy, STAConfig(gamma_init=1e-5))
    assert [m.to_qkv.weight.dtype for m in handle.blocks.values()] == [torch.bfloat16, torch.float64, torch.bfloat16]
    assert [m.training for m in handle.blocks.values()] == [False, True, False]
    assert [n for n, _ in handle.blocks[0].named_children()] == ["norm", "to_qkv", "to_out"]
    assert handle.blocks[0].gamma.unique().item() == pytest.approx(1e-5, rel=1e-2)


def test_the_branch_norms_as_the_block_does(toy):  # noqa: F811
    for block in toy.blocks:
        block.norm2 = nn.RMSNorm(16, eps=1e-4)
    assert {(type(m.norm), m.norm.eps) for m in inject_sta(toy).blocks.values()} == {(nn.RMSNorm, 1e-4)}


@pytest.mark.parametrize("bias", [True, False])
def test_the_branch_has_a_bias_where_the_backbone_says_so(bias):
    handle = inject_sta(ToyEncoder(), backbone=dataclasses.replace(TOY, name="other", qkv_bias=bias))
    assert {module.to_qkv.bias is not None for module in handle.blocks.values()} == {bias}


def test_modules_that_were_left_without_their_hooks(toy):  # noqa: F811
    handle = inject_sta(toy)
    toy.left = handle.blocks[0]
    handle.remove()
    with pytest.raises(InjectionError, match="this model has STA already"):
        inject_sta(toy)


class Quantised(nn.Module):
    """A 4-bit linear layer as bitsandbytes has it: packed bytes, and the dtype that it computes in."""

    def __init__(self, compute_dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(500, dtype=torch.uint8), requires_grad=False)
        self.compute_dtype = compute_dtype


def test_a_quantised_block_gives_its_compute_dtype(toy):  # noqa: F811
    toy.blocks[0].mlp = nn.Sequential(Quantised(torch.bfloat16), Quantised(torch.bfloat16))
    toy.blocks[1].mlp[0].weight = nn.Parameter(torch.zeros(900, 9, dtype=torch.int8), requires_grad=False)
    toy.blocks[2].mlp[0].weight = nn.Parameter(torch.zeros(900, 9).to(torch.float8_e4m3fn), requires_grad=False)
    handle = inject_sta(toy)
    assert [m.to_qkv.weight.dtype for m in handle.blocks.values()] == [torch.bfloat16, torch.float32, torch.float32]


def test_an_offloaded_block_gives_the_device_that_it_runs_on(toy):  # noqa: F811
    """accelerate keeps its weights on the meta device."""
    for block in toy.blocks[:2]:
        block.to("meta")
    for block in toy.blocks[1:]:
        block._hf_hook = SimpleNamespace(execution_device="cpu" if block is toy.blocks[1] else "meta")
    handle = inject_sta(toy)
    assert [m.to_qkv.weight.device.type for m in handle.blocks.values()] == ["meta", "cpu", "cpu"]


def test_weights_that_would_come_out_without_values_are_refused(toy):  # noqa: F811
    """accelerate's context takes whatever is made within it to the meta device; the first forward ended in torch's error."""
    from accelerate import init_empty_weights

    before = list(toy.state_dict())
    with (
        init_empty_weights(),
        pytest.raises(InjectionError, match=r"meta device.*init_empty_weights\(\)\? Leave it out"),
    ):
        inject_sta(toy)
    assert list(toy.state_dict()) == before
    inject_sta(toy)


@pytest.mark.parametrize("first", ["offloaded", "injected"])
def test_training_sta_whose_weights_are_offloaded_is_told(toy, first, recwarn):  # noqa: F811
    """accelerate accumulates the gradients of weights that it drops."""
    accelerate = pytest.importorskip("accelerate")
    if first == "offloaded":
        accelerate.cpu_offload(toy, torch.device("cpu"))
    handle = inject_sta(toy).freeze_base()
    if first == "injected":
        accelerate.cpu_offload(toy, torch.device("cpu"))
    toy.train()(toy_pixels(((4, 2),))).sum().backward()
    trained = all(parameter.grad is not None for parameter in handle.parameters())
    told = [warning for warning in recwarn if "STA's weights are offloaded by accelerate" in str(warning.message)]
    assert (trained, len(told)) == ((True, 0) if first == "offloaded" else (False, 1))


@pytest.mark.parametrize("load", [False, True], ids=["injected", "loaded"])
def test_what_went_in_under_inference_mode_trains_outside_of_it(toy, load, tmp_path):  # noqa: F811
    if load:
        handle = inject_sta(toy.to(torch.bfloat16), STAConfig(init="normal"))
        handle.save_pretrained(tmp_path)
        handle.remove()
    with torch.inference_mode():
        handle = load_sta(toy, tmp_path, is_trainable=True) if load else inject_sta(toy)
    handle.freeze_base()
    with torch.autocast("cpu", torch.bfloat16):
        toy(toy_pixels(((4, 2),))).sum().backward()
    assert all(parameter.grad is not None for parameter in handle.parameters())


def test_normal_initialisation(toy):  # noqa: F811
    handle = inject_sta(toy, STAConfig(init="normal", head_scale=8))
    for module in handle.blocks.values():
        assert module.to_out.weight.std().item() == pytest.approx(0.02, rel=0.2)
        assert module.to_qkv.weight.std().item() == pytest.approx(0.02, rel=0.2)
        assert module.num_heads == 16


@pytest.mark.parametrize(("scale", "heads"), [(0.25, 1), (0.01, 1), (0.5, 1), (1.0, 2), (1.3, 3)])
def test_number_of_heads(toy, scale, heads):  # noqa: F811
    assert {m.num_heads for m in inject_sta(toy, STAConfig(head_scale=scale)).blocks.values()} == {heads}


def test_odd_head_size_with_rope(toy, monkeypatch):  # noqa: F811
    import toy as module

    monkeypatch.setattr(module, "HEADS", 16)
    before = state(toy)
    with pytest.raises(ConfigError, match="RoPE needs an even head size, this encoder's is 1"):
        inject_sta(toy)
    assert_unchanged(toy, before)
    assert inject_sta(toy, STAConfig(rope_theta=None)).num_parameters() > 0


def test_the_copy_of_an_encoder_that_peft_trains_is_taken(toy):  # noqa: F811
    model = nn.Sequential(Wrapped(toy))
    handle = inject_sta(model)
    assert handle.encoder is model[0].modules_to_save["default"]
    assert not [key for key in toy.state_dict() if ".sta." in key]


def test_get_sta(toy):  # noqa: F811
    assert get_sta(toy) is None
    handle = inject_sta(toy)
    assert get_sta(toy) is handle
    assert get_sta(nn.Sequential(toy)) is handle
    assert repr(handle).startswith("STAHandle(backbone='toy', blocks=3, parameters=")
    two = nn.ModuleList([toy, ToyEncoder()])
    inject_sta(two[1])
    with pytest.raises(InjectionError, match="holds 2 encoders with STA"):
        get_sta(two)


def test_a_model_with_encoders_of_several_kinds(toy, tmp_path):  # noqa: F811
    """STA would go into the one whose backbone's name comes first, a frozen teacher beside the model's own for one."""
    register_backbone(dataclasses.replace(TOY, name="other", encoder_classes=("OtherEncoder",)))
    model = nn.ModuleList([toy, OtherEncoder()])
    before = state(model)
    try:
        with pytest.raises(
            InjectionError, match=r"OtherEncoder \(backbone 'other'\) and ToyEncoder \('toy'\); pass the one"
        ):
            inject_sta(model)
        assert_unchanged(model, before)
        handle = inject_sta(model, backbone="toy")
        handle.save_pretrained(tmp_path)
        handle.remove()
        assert load_sta(model, tmp_path).encoder is toy
        get_sta(model).remove()
        model[1].within = nn.ModuleList([toy, ToyEncoder()])
        assert inject_sta(nn.ModuleList([model[1]])).encoder is model[1]
    finally:
        unregister_backbone("other")


class OtherEncoder(nn.Module):
    """Of no kinship with the toy."""

    def __init__(self):
        super().__init__()
        self.blocks = ToyEncoder().blocks


def test_layers(toy):  # noqa: F811
    handle = inject_sta(toy, STAConfig(layers=[2, 0]))
    assert list(handle.blocks) == [0, 2]
    assert not hasattr(toy.blocks[1], "sta")


def test_a_removed_handle(toy):  # noqa: F811
    handle = inject_sta(toy)
    handle.remove()
    assert not [key for key in toy.state_dict() if ".sta." in key]
    assert handle.blocks == {}
    assert handle.num_parameters() == 0
    assert "removed" in repr(handle)
    for use in (handle.disable, handle.enable, handle.disabled, handle.freeze_base, handle.lora_config):
        with pytest.raises(InjectionError, match="has been removed"):
            use()


def test_the_model_is_freed(toy):  # noqa: F811
    model = ToyEncoder()
    inject_sta(model)
    model(toy_pixels(((4, 2),))).sum().backward()
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("lengths", [[], [0], [4, -1], [1.5], "44", 8, [None]])
def test_bad_clip_lengths(toy, lengths):  # noqa: F811
    handle = inject_sta(toy)
    with pytest.raises(LayoutError, match="expected the number of frames of each clip"):
        handle.clips(lengths)


def test_freeze_base_and_back(toy):  # noqa: F811
    handle = inject_sta(toy)
    assert handle.freeze_base() is handle
    assert {n for n, p in toy.named_parameters() if p.requires_grad} == {
        n for n, _ in toy.named_parameters() if ".sta." in n
    }
    assert handle.num_parameters() == sum(p.numel() for p in toy.parameters() if p.requires_grad)


def test_freeze_base_freezes_what_is_around_the_encoder(toy):  # noqa: F811
    around = nn.Sequential(toy, nn.Linear(16, 4))
    handle = inject_sta(around).freeze_base()
    assert sum(p.numel() for p in around.parameters() if p.requires_grad) == handle.num_parameters()


def test_lora_config_of_qwen2_vl_is_the_published_recipe():
    peft = pytest.importorskip("peft")
    model = seeded(make_qwen2_vl)
    handle = inject_sta(model)
    config = handle.lora_config()
    assert (config.r, config.lora_alpha, config.rank_pattern, config.alpha_pattern) == (
        16,
        16,
        {"attn.qkv": 32},
        {"attn.qkv": 32},
    )
    assert config.modules_to_save == ["sta"]
    assert getattr(config, "exclude_modules", None) is None
    assert handle.lora_config(r=4, lora_alpha=8).rank_pattern == {}
    with pytest.raises(ConfigError, match=r"LoraConfig has no field rank; known: .*lora_alpha"):
        handle.lora_config(rank=4)
    wrapped = peft.get_peft_model(model, config)
    adapted = {n.split(".lora_A")[0] for n, _ in wrapped.named_modules() if n.endswith("lora_A")}
    for name in (
        "attn.qkv",
        "attn.proj",
        "mlp.fc1",
        "mlp.fc2",
        "self_attn.q_proj",
        "self_attn.o_proj",
        "mlp.down_proj",
    ):
        assert any(n.endswith(name) for n in adapted), name
    assert not any(".sta" in n for n in adapted)
    ranks = {n: m.weight.shape[0] for n, m in wrapped.named_modules() if n.endswith("lora_A.default")}
    assert {r for n, r in ranks.items() if "attn.qkv" in n} == {32}
    assert {r for n, r in ranks.items() if "attn.qkv" not in n} == {16}
    trained = {n for n, p in wrapped.named_parameters() if p.requires_grad}
    assert all("lora_" in n or "sta.modules_to_save" in n for n in trained)


def test_lora_config_without_a_recipe(toy):  # noqa: F811
    pytest.importorskip("peft")
    handle = inject_sta(toy)
    with pytest.raises(ConfigError, match="backbone 'toy' has no LoRA recipe; pass target_modules"):
        handle.lora_config()
    assert handle.lora_config(target_modules=["attn"]).modules_to_save == ["sta"]


def test_lora_config_without_peft(toy, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"stage two needs peft: pip install 'sta-adapter\[train\]'"):
        inject_sta(toy).lora_config(target_modules=["attn"])


def test_all_linear_leaves_sta_alone(toy):  # noqa: F811
    peft = pytest.importorskip("peft")
    from inspect import signature

    if "exclude_modules" not in signature(peft.LoraConfig).parameters:
        pytest.skip("this version of peft can't exclude modules")
    handle = inject_sta(toy)
    wrapped = peft.get_peft_model(toy, handle.lora_config(target_modules=r".*(attn|mlp\.[02]|to_qkv|to_out)"))
    assert not any("lora" in n for m in get_sta(wrapped).blocks.values() for n, _ in m.named_parameters())
    assert any("lora" in n for n, _ in wrapped.named_parameters())


def test_ln_tuning_beside_sta():
    peft = pytest.importorskip("peft")
    model = seeded(make_qwen2_vl_tower)
    handle = inject_sta(model)
    for module in handle.blocks.values():
        randomize(module)
    clips = clips_of(4, 2)
    expected = merged_tokens(model(**qwen2_vl_arguments(clips)), clips)
    wrapped = peft.get_peft_model(model, peft.LNTuningConfig(target_modules=["norm2"], modules_to_save=["sta"]))
    found = merged_tokens(model(**qwen2_vl_arguments(clips)), clips)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))
    handle = get_sta(wrapped)
    merged_tokens(model(**qwen2_vl_arguments(clips)), clips)[0].square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in handle.parameters())


def test_list_backbones_is_sorted():
    assert list_backbones() == sorted(list_backbones())
    assert "qwen2_vl" in list_backbones()
