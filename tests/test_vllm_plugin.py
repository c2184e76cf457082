"""The vLLM plug-in without vLLM: what is registered, digests, refusals, and STA in a stand-in of vLLM's tower."""

import dataclasses
import json
import subprocess
import sys
import types

import pytest
import torch
from safetensors.torch import save
from standins import fake_vllm
from standins.fake_vllm import DEPTH, HEADS, MODULE, NAME, WIDTH, engine_config

from sta_adapter import STAConfig
from sta_adapter.adapter.format import CONFIG, WEIGHTS
from sta_adapter.adapter.lora_options import OURS
from sta_adapter.adapter.lora_weights import LORA_CONFIG
from sta_adapter.adapter.save import make_description, write_adapter
from sta_adapter.attention import ClipLayout, TemporalAttention
from sta_adapter.backbones.frames import EachRow
from sta_adapter.errors import (
    CheckpointError,
    CompatibilityError,
    ConfigError,
    InjectionError,
    UnknownBackboneError,
    UnknownClipsError,
)
from sta_adapter.injection.backbone import EncoderCall, VLLMTower
from sta_adapter.injection.registry import get_backbone, in_vllm, list_backbones
from sta_adapter.integrations.vllm import models, register, registry
from sta_adapter.integrations.vllm.models import add_digest
from sta_adapter.integrations.vllm.refusals import check_encoder_settings, check_tower
from sta_adapter.integrations.vllm.request import adapter_digest, requested
from sta_adapter.integrations.vllm.serving import SERVED

GRID = [[3, 2, 2], [2, 2, 4]]


@pytest.fixture
def vllm(monkeypatch):
    models.serving_class.cache_clear()
    yield fake_vllm.install(monkeypatch)
    models.serving_class.cache_clear()


def write(folder, seed=0, backbone="qwen2_5_vl", lora=None, **settings):
    config = STAConfig(**{"init": "normal", "head_scale": 1.0, **settings})
    torch.manual_seed(seed)
    blocks = {i: TemporalAttention(WIDTH, HEADS, WIDTH // HEADS, config, norm="rmsnorm") for i in range(DEPTH)}
    state = {
        f"blocks.{i}.{k}": v + torch.randn_like(v) / 4 for i, b in blocks.items() for k, v in b.state_dict().items()
    }
    encoder = {"width": WIDTH, "depth": DEPTH, "num_heads": HEADS, "head_dim": WIDTH // HEADS}
    write_adapter(folder, state, make_description(backbone, encoder, config, {"id": "a/base"}), lora)
    return folder


def start(config):
    """What vLLM does: the configuration, the model, its weights."""
    hf_config = config.model_config.hf_config
    sys.modules["vllm"].ModelRegistry.inspect_model_cls([NAME], types.SimpleNamespace(hf_config=hf_config))
    model = models.__getattr__(NAME)(vllm_config=config)
    torch.manual_seed(5)
    base = [(name, torch.randn_like(p) / 4) for name, p in model.named_parameters() if ".sta." not in name]
    loaded = model.load_weights(base)
    assert loaded == set(dict(model.named_parameters()))
    return model.eval()


def pixels(seed=0):
    return torch.randn(sum(t * h * w for t, h, w in GRID), 12, generator=torch.Generator().manual_seed(seed))


def by_hand(model, folder, config):
    """The tower of a model without hooks, with STA as the equations say."""
    from safetensors.torch import load_file

    layout = ClipLayout((t, h * w) for t, h, w in GRID)
    state = load_file(folder / WEIGHTS)
    x = model.visual.patch_embed.proj(pixels()).unsqueeze(1)
    for index, block in enumerate(model.visual.blocks):
        sta = TemporalAttention(WIDTH, HEADS, WIDTH // HEADS, config, norm="rmsnorm")
        sta.load_state_dict({k: state[f"blocks.{index}.{k}"] for k in sta.state_dict()})
        y = x + block.attn(block.norm1(x))
        z = y + sta(y.squeeze(1), layout).unsqueeze(1)
        normed = z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + 1e-6) * block.norm2.weight
        x = z + block.mlp(normed).tanh()
    return x.squeeze(1)


def test_each_architecture_of_the_backbones_is_registered_by_name(vllm):
    register()
    register()
    named = {a for name in list_backbones() if (tower := get_backbone(name).vllm) for a in tower.architectures}
    assert set(vllm.models) == named >= {"Qwen2VLForConditionalGeneration", NAME, "Qwen3VLMoeForConditionalGeneration"}
    assert {entry.module_name for entry in vllm.models.values()} == {registry.MODELS}
    assert all(entry.class_name == name for name, entry in vllm.models.items())
    assert not isinstance(vllm.inspect_model_cls.original, registry._Inspecting)


def test_the_package_is_found_by_vllm_and_imports_neither_vllm_nor_a_model():
    code = (
        "import sys; from importlib.metadata import entry_points\n"
        "found = [e for e in entry_points(group='vllm.general_plugins') if e.name == 'sta_adapter']\n"
        "assert found[0].load().__name__ == 'register'\n"
        "import sta_adapter.integrations.vllm.models, sta_adapter.integrations.vllm.registry\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('vllm', 'transformers', 'peft')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_tower_computes_what_the_equations_say(vllm, tmp_path):
    register()
    folder, settings = write(tmp_path / "a"), {"init": "normal", "head_scale": 1.0}
    model = start(engine_config(sta_adapter=str(folder)))
    plain = start(engine_config())
    with torch.inference_mode():
        expected = by_hand(plain, folder, STAConfig(**settings))
        found = model.visual(pixels(), grid_thw=GRID)
        assert (found - plain.visual(pixels(), grid_thw=GRID)).abs().max() > 0.1
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(model.visual(pixels(), grid_thw=torch.tensor(GRID)), expected)


def test_without_the_setting_the_model_is_vllms_own(vllm):
    register()
    config = engine_config()
    model = start(config)
    base = getattr(sys.modules[MODULE], NAME)
    plain = base(vllm_config=config).eval()
    plain.load_state_dict(model.state_dict())
    assert isinstance(model, base)
    assert not any(".sta" in name for name, _ in model.named_modules())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert torch.equal(model.visual(pixels(), grid_thw=GRID), plain.visual(pixels(), grid_thw=GRID))


def test_two_engines_and_reloads_keep_their_own_adapter(vllm, tmp_path):
    register()
    one, two = (start(engine_config(sta_adapter=str(write(tmp_path / name, seed)))) for seed, name in enumerate("ab"))
    with torch.inference_mode():
        first, second = (m.visual(pixels(), grid_thw=GRID) for m in (one, two))
        assert (first - second).abs().max() > 0.1
        for parameter in (p for n, p in one.named_parameters() if ".sta." in n):
            parameter.zero_()  # as a sleep that gives the memory away leaves it
        one.load_weights([])
        assert torch.equal(one.visual(pixels(), grid_thw=GRID), first)
        assert torch.equal(two.visual(pixels(), grid_thw=GRID), second)


def test_sta_comes_from_the_adapter_alone(vllm, tmp_path):
    """A base may hold tensors of STA; sent to a running engine, as a trainer does it, they would be without effect."""
    register()
    config = engine_config(sta_adapter=str(write(tmp_path / "a")))
    model = start(config)
    sent = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    again = models.__getattr__(NAME)(vllm_config=config)
    again.load_weights(list(sent.items()))
    found = dict(again.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(found[name], parameter if ".sta." in name else sent[name])
    with pytest.raises(CheckpointError, match=r"blocks\.0\.sta\.\S+ was sent to an engine that runs"):
        model.load_weights(list(sent.items()))
    name = next(name for name in sent if ".sta." in name)
    module, _, last = name.rpartition(".")
    for find in (lambda: model.get_parameter(name), lambda: model.get_submodule(module).get_parameter(last)):
        with pytest.raises(CheckpointError, match=r"blocks\.0\.sta\.\S+ was sent to an engine that runs"):
            find()  # as vLLM does in its kernel format, to write there
    assert model.get_submodule("visual.blocks.0") is model.visual.blocks[0]


def test_a_reload_of_other_files_is_refused(vllm, tmp_path):
    register()
    model = start(engine_config(sta_adapter=str(write(tmp_path / "a"))))
    write(tmp_path / "a", seed=1)
    with pytest.raises(CheckpointError, match=r"changed while the engine ran.*start a new engine"):
        model.load_weights([])


def test_weights_that_pass_by_load_weights_are_noticed(vllm, tmp_path):
    register()
    model = models.__getattr__(NAME)(vllm_config=engine_config(sta_adapter=str(write(tmp_path / "a"))))
    with pytest.raises(CheckpointError, match=r"passes by its load_weights.*load format"):
        model.visual(pixels(), grid_thw=GRID)


def test_blocks_of_another_shape_are_refused(vllm, tmp_path, monkeypatch):
    register()

    def post_norm(self, x):
        return self.norm2(x, residual=self.attn(self.norm1(x)))[0]

    monkeypatch.setattr(fake_vllm.Block, "forward", post_norm)
    with pytest.raises(InjectionError, match="does not fit Qwen2_5_VisionTransformer"):
        start(engine_config(sta_adapter=str(write(tmp_path / "a"))))


def test_vllms_reload_machinery_is_used_where_it_is_at_work(vllm, tmp_path):
    register()
    model = start(engine_config(sta_adapter=str(write(tmp_path / "a"))))
    kept = {}
    for name, parameter in model.named_parameters():
        if ".sta." in name:
            parameter.weight_loader = lambda parameter, values, name=name: kept.__setitem__(name, values)
    loaded = model.load_weights([])
    assert set(kept) == loaded
    assert all(".sta." in name for name in kept)


def test_identifiers_carry_the_digest_of_weights_and_settings(vllm, tmp_path):
    register()
    found = []
    for folder in (write(tmp_path / "a"), write(tmp_path / "b", seed=1), write(tmp_path / "c", rope_theta=500.0), None):
        config = engine_config(**({"sta_adapter": str(folder)} if folder else {}))
        model = start(config)
        info = types.SimpleNamespace(ctx=types.SimpleNamespace(model_config=config.model_config))
        processor = type(model)._processor_factory.processor(info, None)
        found.append(processor._get_mm_hashes({"video": ["x"], "image": ["given by the request"]}))
    names = [hashes["video"][0] for hashes in found]
    assert len(set(names)) == 4
    assert names[3] == "x"
    assert all(name.startswith("x-sta-") for name in names[:3])
    assert all("-sta-" in hashes["image"][0] for hashes in found[:3])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"sta_adaptor": "a"}, "no setting 'sta_adaptor'. Did you mean 'sta_adapter'"),
        ({"sta-adapter": "a"}, "Did you mean 'sta_adapter'"),
        ({"sta_merged_lora": "abc", "sta_adaptor": "a"}, "no setting 'sta_adaptor'. Did you mean 'sta_adapter'"),
        ({"sta_zzz": 1}, r"no setting 'sta_zzz'\. Known: sta_adapter"),
        ({"sta_adapter": 3}, "sta_adapter is 3, expected a folder or the id"),
        ({"sta_adapter": ""}, "sta_adapter is '', expected a folder or the id"),
        ({"sta_adapter": "a/b", "sta_adapter_any_base": "yes"}, "any_base is 'yes', expected bool"),
        ({"sta_adapter_revision": "v1"}, "sta_adapter_revision is given, but no sta_adapter"),
    ],
    ids=["typo", "dash", "merged", "far_off", "number", "empty", "flag", "alone"],
)
def test_settings_that_would_be_passed_over_are_errors(vllm, overrides, message):
    register()
    with pytest.raises(ConfigError, match=message):
        start(engine_config(**overrides))


def test_what_cannot_be_loaded_is_an_error_while_the_engine_is_configured(vllm, tmp_path):
    register()
    folder = write(tmp_path / "a")

    def configure(path, architecture=NAME, **more):
        hf_config = engine_config(sta_adapter=str(path), **more).model_config.hf_config
        vllm.inspect_model_cls([architecture], types.SimpleNamespace(hf_config=hf_config))

    configure(folder)
    with pytest.raises(CheckpointError, match="there is no folder"):
        configure(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no revision"):
        configure(folder, sta_adapter_revision="v1")
    with pytest.raises(
        InjectionError, match=r"for 'qwen2_5_vl', which vLLM runs as Qwen2_5_VL.*; the base is a Qwen2VL"
    ):
        configure(folder, "Qwen2VLForConditionalGeneration")
    with pytest.raises(InjectionError, match="the base is a TransformersMultiModalForCausalLM"):
        configure(folder, "TransformersMultiModalForCausalLM")
    with pytest.raises(
        UnknownBackboneError, match=r"'internvideo2' can't be served by vLLM; backbones that can: .*qwen2_vl"
    ):
        configure(write(tmp_path / "i", backbone="internvideo2"))
    vllm.register_model(NAME, "someone.else:Model")
    with pytest.raises(InjectionError, match=r"class in someone\.else, which another plug-in"):
        configure(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=f"{WEIGHTS} can't be read"):
        configure(folder)


@pytest.mark.parametrize("option", ["cudagraph_mm_encoder", "compile_mm_encoder"])
def test_a_compiled_or_captured_encoder_is_refused(vllm, tmp_path, option):
    register()
    config = engine_config(sta_adapter=str(write(tmp_path / "a")), compilation={option: True})
    with pytest.raises(InjectionError, match=f"leave {option} out"):
        start(config)


def test_branches_in_front_of_blocks_whose_hooks_do_not_run_are_refused(vllm, tmp_path):
    register()
    config = engine_config(sta_adapter=str(write(tmp_path / "a", order="before_spatial")))
    with pytest.raises(InjectionError, match="order='before_spatial', and vLLM calls the blocks"):
        start(config)


def test_another_base_is_refused(vllm, tmp_path):
    register()
    folder = write(tmp_path / "a")
    config = engine_config(sta_adapter=str(folder))
    config.model_config.hf_config._name_or_path = "another/base"
    with pytest.raises(CheckpointError, match="trained on 'a/base'; the model is 'another/base'"):
        start(config)
    config.model_config.hf_config.sta_adapter_any_base = True
    start(config)


def test_text_positions_that_vllm_does_not_have_are_refused(vllm, tmp_path):
    register()
    folder = write(tmp_path / "a")
    description = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**description, "positions": "original"}))
    start(engine_config(sta_adapter=str(folder)))
    (folder / CONFIG).write_text(json.dumps({**description, "positions": "rows-and-columns"}))
    with pytest.raises(CheckpointError, match=r"positions 'rows-and-columns', and vLLM numbers text by 'original'"):
        start(engine_config(sta_adapter=str(folder)))


def test_an_engine_without_a_tower_is_refused(vllm, tmp_path, monkeypatch):
    register()
    monkeypatch.setattr(fake_vllm, "Qwen2_5_VisionTransformer", torch.nn.Identity)
    with pytest.raises(InjectionError, match=r"this engine has no vision encoder.*limit_mm_per_prompt"):
        start(engine_config(sta_adapter=str(write(tmp_path / "a"))))


class Absent(torch.nn.Module):
    """What vLLM leaves of a tower that isn't built."""


@pytest.mark.parametrize("elsewhere", [{"stages": 2}, {"sent": True}], ids=["first_stage", "another_engine"])
def test_an_engine_that_gets_features_from_elsewhere_needs_no_tower(vllm, tmp_path, monkeypatch, elsewhere):
    """Its identifiers are those of what has the tower; LoRA that belongs to the STA is taken."""
    register()
    monkeypatch.setattr(fake_vllm, "Qwen2_5_VisionTransformer", Absent)
    monkeypatch.setattr(
        sys.modules["vllm.distributed"], "get_pp_group", lambda: types.SimpleNamespace(is_first_rank=False)
    )
    SERVED.clear()  # of engines of other tests
    folder = write(tmp_path / "a", lora=lora_files())
    config = engine_config(types.SimpleNamespace(), **elsewhere, sta_adapter=str(folder))
    model = start(config)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    info = types.SimpleNamespace(ctx=types.SimpleNamespace(model_config=config.model_config))
    hashes = type(model)._processor_factory.processor(info, None)._get_mm_hashes({"video": ["x"]})
    assert hashes == {"video": [f"x-sta-{adapter_digest(folder)}"]}
    assert sys.modules["vllm.lora.peft_helper"].PEFTHelper.from_local_dir(str(folder), 512) == str(folder)


def test_the_first_stage_of_a_pipeline_needs_a_tower(vllm, tmp_path, monkeypatch):
    register()
    monkeypatch.setattr(fake_vllm, "Qwen2_5_VisionTransformer", Absent)
    with pytest.raises(InjectionError, match="this engine has no vision encoder"):
        start(engine_config(stages=2, sta_adapter=str(write(tmp_path / "a"))))


def lora_files(modules_to_save=None, targets=("q_proj",)):
    fields = {"peft_type": "LORA", "modules_to_save": modules_to_save, "target_modules": list(targets)}
    keys = [f"base_model.model.model.{t}.lora_A.weight" for t in targets]
    weights = save({key: torch.zeros(1, 1) for key in keys})
    return {"adapter_config.json": json.dumps(fields).encode(), "adapter_model.safetensors": weights}


def test_lora_is_read_beside_its_own_sta_alone(vllm, tmp_path):
    register()
    register()
    SERVED.clear()  # of engines of other tests
    read = sys.modules["vllm.lora.peft_helper"].PEFTHelper.from_local_dir
    mine, other = (write(tmp_path / name, seed, lora=lora_files()) for seed, name in enumerate(("mine", "other")))
    fields = (mine / LORA_CONFIG).read_bytes()
    bare = tmp_path / "bare"  # LoRA's files alone, without the STA that they belong to
    bare.mkdir()
    (bare / LORA_CONFIG).write_bytes(json.dumps({**json.loads(fields), OURS: "in sta_adapter.safetensors"}).encode())
    for folder in (mine, bare):
        with pytest.raises(CheckpointError, match="were trained with STA, and this engine serves none"):
            read(str(folder), 512)
    lora = types.SimpleNamespace(enable_tower_connector_lora=True)
    model = start(engine_config(sta_adapter=str(mine), lora_config=lora))
    assert (read(str(mine), 512), read(str(bare), longest=512)) == (str(mine), str(bare))
    with pytest.raises(CheckpointError, match="serves another one: start it with hf_overrides"):
        read(str(other), 512)
    (bare / LORA_CONFIG).write_bytes(fields)
    assert list(SERVED) == [model]
    assert read(str(bare), 512) == str(bare)  # LoRA that knows nothing of STA
    assert read(str(tmp_path / "none"), 512) == str(tmp_path / "none")  # of which vLLM says that it is missing


def test_lora_weights_that_nobody_serves_are_refused(vllm, tmp_path, monkeypatch):
    register()
    lora = types.SimpleNamespace(enable_tower_connector_lora=False)
    folder = str(write(tmp_path / "a", lora=lora_files(["sta"])))
    with pytest.raises(CheckpointError, match=r"LoRA weights that nobody serves.*--merge-lora BASE"):
        start(engine_config(sta_adapter=folder))
    with pytest.raises(CheckpointError, match=r"takes no LoRA that trains whole modules.*sta-adapter export"):
        start(engine_config(sta_adapter=folder, lora_config=lora))
    folder = str(write(tmp_path / "b", lora=lora_files(targets=("q_proj", "visual.blocks.0.attn.qkv"))))
    with pytest.raises(CheckpointError, match="--enable-tower-connector-lora"):
        start(engine_config(sta_adapter=folder, lora_config=lora))
    start(engine_config(sta_adapter=folder, lora_config=types.SimpleNamespace(enable_tower_connector_lora=True)))
    monkeypatch.setattr(fake_vllm.Model, "supports_tower_connector_lora", False)
    with pytest.raises(
        CheckpointError, match=r"vLLM leaves those of \w+ out\. Merge them into the base.*--merge-lora BASE"
    ):
        start(engine_config(sta_adapter=folder, lora_config=types.SimpleNamespace(enable_tower_connector_lora=True)))
    (tmp_path / "b" / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_config\.json is missing"):
        start(engine_config(sta_adapter=folder))


def test_frames_that_would_be_split_among_ranks_are_refused(vllm, tmp_path):
    register()
    folder = write(tmp_path / "a", backbone="llava_onevision")
    with pytest.raises(
        InjectionError, match="mm_encoder_tp_mode='data' gives the frames of one clip to different ranks"
    ):
        check_encoder_settings(
            requested(engine_config(sta_adapter=str(folder)).model_config.hf_config), engine_config(tp_mode="data")
        )
    start(engine_config(sta_adapter=str(write(tmp_path / "b")), tp_mode="data"))


def test_a_tower_in_vllm_is_the_backbones_but_for_what_it_declares():
    spec = dataclasses.replace(get_backbone("clip"), vllm=VLLMTower({"Model": "module:Model"}))
    assert in_vllm(spec) == dataclasses.replace(spec, is_variant=True)
    changed = dataclasses.replace(spec, vllm=VLLMTower({"Model": "module:Model"}, {"norm": "norm2"}))
    assert in_vllm(changed) == dataclasses.replace(changed, norm="norm2", is_variant=True)


def test_clips_of_models_that_get_frames_as_a_batch_are_told_by_vllms_methods():
    llava, internvl = (in_vllm(get_backbone(name)).clip_source.methods for name in ("llava_onevision", "internvl"))
    frames = [torch.zeros(4, 3, 2, 2), torch.zeros(2, 3, 2, 2)]
    assert llava["_process_video_pixels"](None, {"inputs": {"pixel_values_videos": frames}}) == (4, 2)
    assert llava["_process_video_pixels"](None, {"inputs": {"pixel_values_videos": torch.zeros(2, 3, 3, 4, 4)}}) == (
        3,
        3,
    )
    assert isinstance(llava["_process_image_pixels"](None, {}), EachRow)
    tell = internvl["_process_vision_input"]
    videos = {"type": "pixel_values_videos", "num_patches": torch.tensor([4, 2])}
    assert tell(None, {"image_input": videos}) == (4, 2)
    assert isinstance(tell(None, {"image_input": {"type": "pixel_values", "num_patches": [5]}}), EachRow)
    assert tell(None, {"image_input": {"type": "video_embeds"}}) is None


def test_rows_that_nobody_tells_of_are_no_clip_in_vllm():
    call = EncoderCall(torch.nn.Module(), {"pixel_values": torch.zeros(4, 3, 8, 8)}, None)
    for name in ("llava_onevision", "internvl"):
        with pytest.raises(UnknownClipsError, match="the 4 rows"):
            in_vllm(get_backbone(name)).layout(call)


def test_the_merged_base_and_its_sta_belong_together(vllm, tmp_path):
    register()
    folder = write(tmp_path / "sta")
    start(engine_config(sta_adapter=str(folder)))
    with pytest.raises(CheckpointError, match="LoRA weights of another adapter merged into it"):
        start(engine_config(sta_adapter=str(folder), sta_merged_lora="abc"))
    description = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**description, "sta_merged_lora": "abc"}))
    with pytest.raises(CheckpointError, match=r"this model has none\. Use the base that"):
        start(engine_config(sta_adapter=str(folder)))
    start(engine_config(sta_adapter=str(folder), sta_merged_lora="abc"))


class TestChangedSeams:
    def test_of_the_registry(self, vllm):
        vllm.inspect_model_cls = lambda names: None
        with pytest.raises(CompatibilityError, match="inspect_model_cls takes names"):
            register()
        sys.modules["vllm"].ModelRegistry = object()
        with pytest.raises(CompatibilityError, match=r"has no register_model.*tested with 0\.32"):
            register()

    def test_of_the_model_class(self, vllm, monkeypatch):
        base = getattr(sys.modules[MODULE], NAME)
        monkeypatch.setattr(base, "load_weights", lambda self, weights, strict: None)
        with pytest.raises(CompatibilityError, match="load_weights takes other arguments"):
            models.__getattr__(NAME)
        monkeypatch.setattr(base, "__init__", lambda self, config: None)
        with pytest.raises(CompatibilityError, match="not built from a vllm_config"):
            models.__getattr__(NAME)
        monkeypatch.delattr(sys.modules[MODULE], NAME)
        with pytest.raises(CompatibilityError, match="there is no vllm"):
            models.__getattr__(NAME)
        with pytest.raises(AttributeError, match="has no attribute 'Other'"):
            models.__getattr__("Other")

    def test_of_the_identifiers(self, vllm, monkeypatch):
        monkeypatch.setattr(getattr(sys.modules[MODULE], NAME), "_processor_factory", None)
        with pytest.raises(CompatibilityError, match="no _processor_factory"):
            models.__getattr__(NAME)
        with pytest.raises(CompatibilityError, match="no _get_mm_hashes"):
            add_digest(object(), "abc")
        processor = types.SimpleNamespace(_get_mm_hashes=lambda inputs: None)
        add_digest(processor, "abc")
        with pytest.raises(CompatibilityError, match="_get_mm_hashes gave a NoneType"):
            processor._get_mm_hashes({})

    def test_of_the_order_in_which_an_engine_is_configured(self, vllm, tmp_path):
        """A processor that is made before the base is looked at."""
        config = engine_config(sta_adapter=str(write(tmp_path / "a")))
        info = types.SimpleNamespace(ctx=types.SimpleNamespace(model_config=config.model_config))
        processor = models.__getattr__(NAME)._processor_factory.processor(info, None)
        assert processor._get_mm_hashes({"video": ["x"]})["video"][0].startswith("x-sta-")

    @pytest.mark.parametrize("backbone", ["llava_onevision", "internvl"])
    def test_of_the_methods_that_tell_clips(self, tmp_path, backbone):
        spec = in_vllm(get_backbone(backbone))
        tower = type(spec.encoder_classes[0], (torch.nn.Module,), {})()
        tower.encoder = torch.nn.Module()
        model = type(spec.clip_source.model_classes[0], (torch.nn.Module,), {})()
        model.tower = tower
        with pytest.raises(CompatibilityError, match=r"has no _process_\w+, whose calls tell the clips"):
            check_tower(types.SimpleNamespace(backbone=spec), model)

    def test_of_the_settings(self, vllm, tmp_path):
        register()
        config = engine_config(sta_adapter=str(write(tmp_path / "a")))
        del config.compilation_config.compile_mm_encoder
        with pytest.raises(CompatibilityError, match="has no compile_mm_encoder"):
            start(config)
