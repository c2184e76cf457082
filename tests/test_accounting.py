"""Every tensor that was trained, and every tensor in a file, is accounted for: it is saved and loaded, or there is an error that says which."""

import contextlib
import copy
import json
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import peft
import pytest
import torch
from cases import clips_of, make_qwen2_vl, qwen2_vl_arguments, qwen2_vl_prompt, seeded
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save, save_file
from test_lora_options import logits, trained
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.optim.swa_utils import AveragedModel

from sta_adapter import STAConfig, get_sta, inject_sta, load_sta
from sta_adapter.adapter.format import CONFIG, WEIGHTS
from sta_adapter.adapter.lora_weights import LORA_CONFIG, LORA_WEIGHTS
from sta_adapter.adapter.push_check import read_checked
from sta_adapter.demo import TINY_BASE
from sta_adapter.errors import CheckpointError, ConfigError, InjectionError, STAWarning
from sta_adapter.injection.load import watch_peft
from sta_adapter.loading import load_adapter, load_model
from sta_adapter.training.checkpoints import load_trained, trained_state

OTHER = STAConfig(init="normal", causal=True, gamma_init=0.5, layers=[0, 2], rope_theta=50.0)


def randomize(model):
    """Every tensor that trains gets other numbers."""
    for parameter in (p for p in model.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def rename(folder, *pairs):
    """The names of another release of transformers in LoRA's two files."""
    state = load_file(folder / LORA_WEIGHTS)

    def renamed(name):
        for old, new in pairs:
            if name.startswith(old):
                return new + name[len(old) :]
        return name

    state = {"base_model.model." + renamed(k.removeprefix("base_model.model.")): v for k, v in state.items()}
    save_file(state, folder / LORA_WEIGHTS, {"format": "pt"})
    settings = json.loads((folder / LORA_CONFIG).read_text())
    if isinstance(settings["target_modules"], list):
        settings["target_modules"] = [renamed(name) for name in settings["target_modules"]]
    for name in ("rank_pattern", "alpha_pattern"):
        settings[name] = {renamed(key): value for key, value in settings[name].items()}
    (folder / LORA_CONFIG).write_text(json.dumps(settings))


def tensors(file):
    """What a file holds, to compare."""
    return {name: tensor.tolist() for name, tensor in load_file(file).items()}


NEW_TO_OLD = (("model.visual.", "visual."), ("model.language_model.", "model."))
OLD_TO_NEW = (("visual.", "model.visual."), ("model.", "model.language_model."))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": "full names", "rank_pattern": "full names"},
        {"bias": "all"},
        {"modules_to_save": ["merger"]},
    ],
    ids=["recipe", "full names", "biases", "modules"],
)
@pytest.mark.parametrize("with_sta", [True, False], ids=["sta", "baseline"])
def test_an_adapter_of_another_release(options, with_sta, tmp_path):
    model = seeded(make_qwen2_vl)
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and "q_proj" in name]
    options = dict(options)
    if "rank_pattern" in options:
        options |= {"target_modules": names, "rank_pattern": {names[0]: 3}, "alpha_pattern": {names[-1]: 5}}
    handle = inject_sta(model, OTHER) if with_sta else None
    if handle is not None:
        config = handle.lora_config(**options)
    else:
        config = LoraConfig(**{"target_modules": ["q_proj", "v_proj", "attn.qkv"], **options})
    peft_model = randomize(get_peft_model(model, config))
    expected = logits(peft_model)
    (get_sta(peft_model) or peft_model).save_pretrained(tmp_path)
    rename(tmp_path, *(NEW_TO_OLD if names[0].startswith("model.language_model.") else OLD_TO_NEW))
    loaded = load_adapter(seeded(make_qwen2_vl), tmp_path)
    assert torch.equal(logits(loaded), expected)
    assert (get_sta(loaded) is not None) == with_sta


def test_names_of_nobody_are_an_error(tmp_path):
    get_sta(trained(r=2)).save_pretrained(tmp_path)
    rename(tmp_path, ("model.visual.", "model.eyes."), ("visual.", "eyes."))
    with pytest.raises(CheckpointError, match=r"names modules that this model lacks.*release of transformers"):
        load_sta(seeded(make_qwen2_vl), tmp_path)
    description = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**description, "transformers_version": "9.8.7"}))
    with pytest.raises(CheckpointError, match=r"The adapter was saved on transformers 9\.8\.7; this is \d"):
        load_sta(seeded(make_qwen2_vl), tmp_path)


@pytest.mark.parametrize(
    "load",
    [
        load_adapter,
        lambda model, folder: load_sta(model, folder).model,
        lambda model, folder: PeftModel.from_pretrained(model, folder),  # as it is then, see `watch_peft`
    ],
    ids=["load_adapter", "load_sta", "peft"],
)
def test_what_peft_itself_saved_is_loaded_as_what_it_is(load, tmp_path):
    handle = inject_sta(seeded(make_qwen2_vl), OTHER)
    model = randomize(get_peft_model(handle.model, handle.lora_config()))
    model.save_pretrained(tmp_path)
    assert not (tmp_path / CONFIG).exists()
    loaded = load(seeded(make_qwen2_vl), tmp_path)
    assert get_sta(loaded).config == OTHER
    assert torch.equal(logits(loaded), logits(model))
    get_sta(loaded).save_pretrained(tmp_path / "ours")
    assert (tmp_path / "ours" / WEIGHTS).exists()


def test_sta_without_its_settings_is_an_error(tmp_path):
    """LoraConfig by hand, saved by PEFT: what STA computed can't be known."""
    handle = inject_sta(seeded(make_qwen2_vl), OTHER)
    get_peft_model(handle.model, LoraConfig(target_modules=["q_proj"], modules_to_save=["sta"])).save_pretrained(
        tmp_path
    )
    for load in (load_adapter, load_sta):
        with pytest.raises(CheckpointError, match=r"STA's settings|has no format_version"):
            load(seeded(make_qwen2_vl), tmp_path)


@pytest.mark.parametrize(
    ("key", "remedy"),
    [("visual.blocks.0.sta.norm.weight", "load_sta, --adapter"), ("visual.blocks.0.temp_attn.qkv.bias", "sta-adapter convert")],
    ids=["ours", "the published code's"],
)  # fmt: skip
def test_sta_among_a_whole_models_weights_is_told_of(key, remedy, tmp_path):
    """As transformers' trainer saves a model, and the published code its own."""
    seeded(make_qwen2_vl).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", STAWarning)
        base = load_model(tmp_path, device="cpu")
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    file.unlink()  # what was loaded may still lie in the old one
    save_file({**state, key: torch.ones(32)}, file, {"format": "pt"})
    with pytest.warns(STAWarning, match=f"hold STA .*loaded without it: give its adapter as .*{remedy}"):
        model = load_model(tmp_path, device="cpu")
    assert get_sta(model) is None
    assert torch.equal(logits(model), logits(base))


def test_pefts_own_loader_brings_sta_back(tmp_path):
    model = trained(r=2)
    get_sta(model).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(seeded(make_qwen2_vl), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    refusing = contextlib.suppress(TypeError)  # PEFT before 0.14, of the entry that says that STA belongs to it
    with pytest.warns(STAWarning, match="holds STA, which PEFT does not load"), refusing:
        PeftModel.from_pretrained(seeded(make_qwen2_vl), tmp_path, adapter_name="second")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_trainable": True},
        {"is_trainable": False, "low_cpu_mem_usage": False},
        {"adapter_name": "default"},
        {"offload_folder": "off", "torch_device": "cpu", "max_memory": None},
    ],
    ids=str,
)
def test_pefts_own_loader_takes_what_load_sta_takes(options, tmp_path):
    get_sta(trained(r=2)).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", STAWarning)
        loaded = PeftModel.from_pretrained(seeded(make_qwen2_vl), tmp_path, **options)
    assert all(p.requires_grad is options.get("is_trainable", False) for p in get_sta(loaded).parameters())


@pytest.mark.parametrize("options", [{"subfolder": "inner"}, {"revision": "main", "subfolder": "inner"}], ids=str)
def test_pefts_own_loader_finds_sta_in_a_subfolder(options, tmp_path):
    model = trained(r=2)
    get_sta(model).save_pretrained(tmp_path / "inner")
    loaded = PeftModel.from_pretrained(seeded(make_qwen2_vl), tmp_path, **options)
    assert torch.equal(logits(loaded), logits(model))


def trains(model):
    """LoRA's names; the names of layers for what else trains, such as STA."""
    return {name.split(".")[-2] for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_pefts_loader_with_other_options_brings_lora_alone_and_says_so(tmp_path):
    get_sta(trained(r=2)).save_pretrained(tmp_path)
    model = seeded(make_qwen2_vl)
    refusing = contextlib.suppress(TypeError)  # PEFT before 0.14, of the entry that says that STA belongs to it
    with pytest.warns(STAWarning, match="holds STA, which PEFT does not load"), refusing:
        assert trains(PeftModel.from_pretrained(model, tmp_path, "second", is_trainable=True)) == {"second"}


def test_pefts_loader_leaves_lora_alone_as_it_was(tmp_path):
    get_peft_model(seeded(make_qwen2_vl), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(seeded(make_qwen2_vl), tmp_path, adapter_name="mine", is_trainable=True)
    assert get_sta(loaded) is None
    assert trains(loaded) == {"mine"}


@pytest.mark.parametrize(
    "save", [lambda m, f: get_sta(m).save_pretrained(f), lambda m, f: m.save_pretrained(f)], ids=["ours", "PEFT's"]
)
def test_pefts_loader_takes_no_sta_of_other_settings_than_the_models(save, tmp_path):
    handle = inject_sta(seeded(make_qwen2_vl), STAConfig(causal=True, init="normal"))
    model = randomize(get_peft_model(handle.model, handle.lora_config(r=2)))
    save(model, tmp_path)
    refusing = contextlib.suppress(TypeError)  # PEFT before 0.14, of the entry that says that STA belongs to it
    other = inject_sta(seeded(make_qwen2_vl)).model
    with pytest.raises(
        CheckpointError, match="trained with other settings than the model's: causal True, in the model False"
    ):
        PeftModel.from_pretrained(other, tmp_path)
    alike = inject_sta(seeded(make_qwen2_vl), STAConfig(causal=True, attention="eager")).model
    with refusing:
        torch.testing.assert_close(logits(PeftModel.from_pretrained(alike, tmp_path)), logits(model))


def test_pefts_loader_is_watched_also_where_peft_is_imported_later(tmp_path):
    get_sta(trained(r=2)).save_pretrained(tmp_path)
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from cases import make_qwen2_vl, seeded
from sta_adapter import get_sta, inject_sta
model = inject_sta(seeded(make_qwen2_vl)).remove()
assert "peft" not in sys.modules
from peft import PeftModel
assert get_sta(PeftModel.from_pretrained(model, {str(tmp_path)!r})) is not None
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_pefts_loader_is_watched_once():
    watch_peft()
    watched = vars(PeftModel)["from_pretrained"]
    watch_peft()
    assert vars(PeftModel)["from_pretrained"] is watched


WHOLE = {
    "STA first": lambda model: (
        inject_sta(model, OTHER)
        and get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["visual"]))
    ),
    "our LoRA": lambda model: get_peft_model(model, inject_sta(model, OTHER).lora_config(modules_to_save=["visual"])),
    "STA second": lambda model: (
        inject_sta(
            get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["visual"])), OTHER
        ).model
    ),
    "STA second, named first": lambda model: (
        inject_sta(
            get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["sta", "visual"])), OTHER
        ).model
    ),
}


@pytest.mark.skipif(
    not hasattr(peft.utils.other, "AuxiliaryTrainingWrapper"),
    reason="this PEFT hides the attributes of what it trains whole, which Qwen2-VL asks its encoder for, with STA or without",
)
@pytest.mark.parametrize("wrap", WHOLE.values(), ids=WHOLE)
def test_a_vision_encoder_that_peft_trains_whole(wrap, tmp_path):
    model = wrap(seeded(make_qwen2_vl))
    handle = get_sta(model)
    handle.freeze_base()
    assert all(parameter.requires_grad for parameter in handle.parameters())
    assert not any(".original_module." in name for name, p in model.named_parameters() if p.requires_grad)
    for name, parameter in model.named_parameters():
        if ".modules_to_save." in name or ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    handle.save_pretrained(tmp_path)
    loaded = load_sta(seeded(make_qwen2_vl), tmp_path, is_trainable=True)
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert torch.equal(logits(loaded.model), logits(model))
    loaded.remove()
    assert not any(".sta." in name for name in loaded.model.state_dict())
    with loaded.model.disable_adapter():
        assert torch.equal(logits(loaded.model), logits(seeded(make_qwen2_vl)))


def test_sta_that_went_in_after_peft_had_looked_for_it(tmp_path):
    """PEFT trains it by no copy then; the file must not say that it does."""
    model = get_peft_model(seeded(make_qwen2_vl), LoraConfig(target_modules=["q_proj"], modules_to_save=["sta"]))
    inject_sta(model, OTHER).save_pretrained(tmp_path)
    assert torch.equal(logits(load_sta(seeded(make_qwen2_vl), tmp_path).model), logits(model))


def test_the_handle_of_an_encoder_that_peft_has_copied_is_not_saved(tmp_path):
    handle = inject_sta(seeded(make_qwen2_vl))
    get_peft_model(handle.model, LoraConfig(target_modules=["q_proj"], modules_to_save=["visual"]))
    with pytest.raises(InjectionError, match=r"trains a copy of it.*go on with get_sta\(peft_model\)"):
        handle.save_pretrained(tmp_path)


def test_a_vision_encoder_that_peft_trains_in_part():
    handle = inject_sta(seeded(make_qwen2_vl))
    with pytest.raises(ConfigError, match=r"names what holds STA of the blocks \[1\] alone; name the whole encoder"):
        handle.lora_config(modules_to_save=["blocks.1"])


@pytest.mark.parametrize("trains_sta", [False, True], ids=["frozen", "trained"])
def test_lora_on_stas_own_layers(trains_sta, tmp_path):
    handle = inject_sta(seeded(make_qwen2_vl), STAConfig(init="normal"))
    model = get_peft_model(handle.model, LoraConfig(target_modules=["to_qkv", "to_out", "q_proj"], r=2))
    if trains_sta:
        for name, parameter in model.named_parameters():
            if ".sta." in name:
                parameter.requires_grad_(True)
    expected = logits(randomize(model))
    get_sta(model).save_pretrained(tmp_path)
    assert not any("lora" in key or "base_layer" in key for key in load_file(tmp_path / WEIGHTS))
    loaded = load_sta(seeded(make_qwen2_vl), tmp_path, is_trainable=True)
    assert torch.equal(logits(loaded.model.eval()), expected)
    assert any("lora_" in name and p.requires_grad for name, p in loaded.model.named_parameters() if ".sta." in name)
    loaded.model.merge_adapter()
    with pytest.raises(CheckpointError, match="LoRA is merged into STA's own layers, in 3 blocks"):
        loaded.save_pretrained(tmp_path / "merged")
    loaded.model.unmerge_adapter()


def test_a_module_that_peft_trains_as_a_copy_since_before_sta(tmp_path):
    model = get_peft_model(seeded(make_qwen2_vl), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    handle = inject_sta(model)
    for parameter in handle.parameters():
        parameter.requires_grad_(True)
    expected = logits(randomize(model))
    handle.save_pretrained(tmp_path)
    assert torch.equal(logits(load_sta(seeded(make_qwen2_vl), tmp_path).model), expected)


def test_lora_merged_elsewhere_is_saved_as_it_is(tmp_path):
    model = trained(r=2)
    expected = logits(model)
    model.merge_adapter()
    get_sta(model).save_pretrained(tmp_path)
    assert torch.allclose(logits(load_sta(seeded(make_qwen2_vl), tmp_path).model), expected, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lora_that_was_merged_and_taken_out_again_is_saved(dtype, tmp_path):
    """The base's numbers are rounded by that; the adapter is as it was."""
    model = trained(r=2).to(dtype)
    handle = get_sta(model)
    handle.save_pretrained(tmp_path / "before")
    model.merge_adapter()
    model.unmerge_adapter()
    handle.save_pretrained(tmp_path / "after")
    for name in (WEIGHTS, LORA_WEIGHTS):
        assert tensors(tmp_path / "after" / name) == tensors(tmp_path / "before" / name)
    layer = next(module for name, module in model.named_modules() if name.endswith("q_proj")).base_layer
    layer.weight.data[0, 0] += 0.5
    with pytest.raises(CheckpointError, match="1 of the base model's tensors have changed since STA was injected"):
        handle.save_pretrained(tmp_path / "after")


@pytest.mark.parametrize("of", ["handle", "model"])
def test_lora_that_was_merged_for_good_is_not_lost_silently(of, tmp_path):
    model = trained(r=2)
    handle = get_sta(model)
    merged = model.merge_and_unload()
    handle = handle if of == "handle" else get_sta(merged)
    with pytest.raises(
        CheckpointError, match=r"of the base model's tensors have changed since STA was injected.*LoRA was merged"
    ):
        handle.save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    handle.save_pretrained(tmp_path / "a", base_changed=True)
    assert not (tmp_path / "a" / LORA_CONFIG).exists()
    with pytest.raises(CheckpointError, match=r"pass base_changed=True"):
        handle.push_to_hub("user/a", dry_run=True)
    assert LORA_CONFIG not in handle.push_to_hub("user/a", dry_run=True, base_changed=True).files


def test_lora_that_was_thrown_away_leaves_the_base(tmp_path):
    get_sta(trained(r=2).unload()).save_pretrained(tmp_path)
    assert not (tmp_path / LORA_CONFIG).exists()


def test_other_weights_that_were_trained(tmp_path):
    handle = inject_sta(seeded(make_qwen2_vl))
    optimizer = torch.optim.SGD(handle.model.parameters(), lr=0.1)
    outputs = handle.model.train()(**qwen2_vl_prompt(3))
    outputs.logits.square().mean().backward()
    optimizer.step()
    with pytest.raises(
        CheckpointError, match=r"^\d+ of the base model's tensors have changed since STA was injected, the first is"
    ):
        handle.save_pretrained(tmp_path)


@pytest.mark.parametrize("change", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.bfloat16(), lambda m: m.double(),
                                    lambda m: m.half().float()], ids=["copy", "pickle", "bf16", "double", "half and back"])  # fmt: skip
def test_the_same_weights_otherwise_kept(change, tmp_path):
    model = seeded(make_qwen2_vl)
    inject_sta(model)
    get_sta(change(model)).save_pretrained(tmp_path)


def test_embeddings_that_were_trained_after_more_tokens_came_in(tmp_path):
    model = load_model(TINY_BASE)
    handle = inject_sta(model)
    model.resize_token_embeddings(520)
    handle.save_pretrained(tmp_path)
    with torch.no_grad():
        model.get_input_embeddings().weight += 1
    with pytest.raises(
        CheckpointError, match=r"^1 of the base model's tensors have changed .* first is \S+embed_tokens"
    ):
        handle.save_pretrained(tmp_path)


def test_embeddings_of_more_tokens_than_the_base_has_are_not_lost_silently_without_lora(tmp_path):
    model = load_model(TINY_BASE)
    model.resize_token_embeddings(520)
    with pytest.warns(
        STAWarning, match=r"embeddings of other tokens than its base, and an adapter without LoRA holds none"
    ):
        inject_sta(model).save_pretrained(tmp_path / "sta")
    get_sta(model).remove().save_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("error", STAWarning)
        load_sta(load_model(tmp_path / "base"), tmp_path / "sta").save_pretrained(tmp_path / "again")


def test_embeddings_of_more_tokens_than_the_base_has_are_saved_with_lora(tmp_path):
    ids = torch.tensor([[10, 11, 515, 12]])
    model = load_model(TINY_BASE)
    model.resize_token_embeddings(520)
    torch.nn.init.normal_(
        model.get_input_embeddings().weight.data[512:]
    )  # on transformers 4.47 they begin alike in each model
    handle = inject_sta(model)
    lora = get_peft_model(handle.model, handle.lora_config())
    get_sta(lora).save_pretrained(tmp_path)
    larger = load_model(TINY_BASE)
    larger.resize_token_embeddings(520)
    assert not torch.equal(larger(input_ids=ids).logits, lora.eval()(input_ids=ids).logits)
    loaded = load_sta(larger, tmp_path).model
    assert torch.equal(loaded(input_ids=ids).logits, lora(input_ids=ids).logits)
    with pytest.raises(CheckpointError, match=r"resize_token_embeddings\(520\)"):
        load_sta(load_model(TINY_BASE), tmp_path)


def test_the_initialisation_of_transformers_leaves_sta_as_it_is():
    model = load_model(TINY_BASE)
    handle = inject_sta(model, STAConfig(init="normal"))
    before = [parameter.clone() for parameter in handle.parameters()]
    model.init_weights()
    assert all(map(torch.equal, before, handle.parameters()))


def test_lora_from_which_sta_was_removed_is_lora_alone(tmp_path):
    handle = inject_sta(seeded(make_qwen2_vl))
    lora = randomize(get_peft_model(handle.model, handle.lora_config(modules_to_save=["merger"])))
    get_sta(lora).remove()
    lora.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(seeded(make_qwen2_vl), tmp_path)
    assert get_sta(loaded) is None
    assert torch.equal(loaded(**qwen2_vl_prompt(3)).logits, lora(**qwen2_vl_prompt(3)).logits)
    assert get_sta(load_adapter(seeded(make_qwen2_vl), tmp_path)) is None


def test_one_of_two_adapters(tmp_path):
    model = trained(r=2)
    model.add_adapter("second", LoraConfig(target_modules=["q_proj"]))
    with pytest.warns(UserWarning, match="of 2 PEFT adapters in this model 'default' is saved.*not saved: second"):
        get_sta(model).save_pretrained(tmp_path)
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(CheckpointError, match="2 of PEFT's adapters are active"):
        get_sta(model).save_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            lambda: IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
            "peft_type is 'IA3'",
        ),
        (lambda: LoraConfig(target_modules=["q_proj"], init_lora_weights="olora"), "init_lora_weights is 'olora'"),
        (lambda: LoraConfig(target_modules=["q_proj", "embed_tokens"]), "LoRA is on a layer of class Embedding"),
        (
            lambda: LoraConfig(target_modules=["q_proj"], target_parameters=["to_qkv.weight"], modules_to_save=["sta"]),
            "target_parameters has put LoRA on parameters of .*trained whole.*leave these out",
        ),
        (
            lambda: LoraConfig(target_modules=["q_proj"], target_parameters=["to_qkv.weight"], bias="all"),
            "target_parameters has put LoRA on parameters of .*bias.*leave these out",
        ),
    ],
    ids=["another method", "another start", "another layer", "on parts of a whole", "beside a bias"],
)
def test_what_peft_trains_and_we_cant_save_is_said_at_the_start(config, message, tmp_path):
    if "target_parameters" in message and "target_parameters" not in LoraConfig.__dataclass_fields__:
        pytest.skip("this release of PEFT has no LoRA on parameters")
    handle = inject_sta(seeded(make_qwen2_vl))
    model = get_peft_model(handle.model, config()).train()
    with pytest.warns(STAWarning, match=f"can't save what is trained here: .*{message}"):
        model(**qwen2_vl_prompt(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error", STAWarning)
        model(**qwen2_vl_prompt(3))  # said once
    with pytest.raises(CheckpointError, match=message):
        get_sta(model).save_pretrained(tmp_path)


def unfreeze(handle):
    handle.model.requires_grad_(True)


def cut_a_row(handle):
    layer = handle.model.get_output_embeddings()
    layer.weight = torch.nn.Parameter(layer.weight[:, :-1].detach(), requires_grad=False)
    handle.model.lm_head.forward = lambda x: torch.nn.functional.linear(x[..., :-1], layer.weight)


def merge(handle):
    with torch.no_grad():
        handle.model.get_output_embeddings().weight.mul_(2)


@pytest.mark.parametrize(
    ("change", "at_first", "at_last"),
    [
        (
            unfreeze,
            "tensors would be trained, the first is .*, and an adapter stores none .* pass base_changed=True",
            None,
        ),
        (cut_a_row, "1 of the base model's tensors are gone or have another shape", "gone or have another shape"),
        (merge, "1 of the base model's tensors have changed since STA was injected", "have changed since STA"),
    ],
    ids=["trained along", "cut", "merged"],
)
def test_a_base_that_no_adapter_holds_is_told_of_at_the_first_step(change, at_first, at_last, tmp_path):
    """Else saving refuses it after hours of training, and a script ends with nothing."""
    handle = inject_sta(seeded(make_qwen2_vl), STAConfig(init="normal")).freeze_base()
    change(handle)
    optimizer = torch.optim.SGD([p for p in handle.model.parameters() if p.requires_grad], lr=1.0)
    with pytest.warns(STAWarning, match=f"can't save what is trained here: .*{at_first}"):
        handle.model.train()(**qwen2_vl_prompt(3)).logits.square().mean().backward()
    optimizer.step()
    with pytest.raises(CheckpointError, match=at_last or "have changed since STA"):
        handle.save_pretrained(tmp_path)
    handle.save_pretrained(tmp_path, base_changed=True)


def test_trained_prompts_are_not_lost_silently_when_an_adapter_is_saved(tmp_path):
    """They change no layer: an adapter of STA alone was written, and on loading the model said something else."""
    handle = inject_sta(seeded(make_qwen2_vl))
    sizes = {"num_layers": 2, "token_dim": 32, "num_attention_heads": 4, "num_transformer_submodules": 1}
    model = get_peft_model(handle.model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, **sizes))
    with pytest.raises(CheckpointError, match="peft_type is 'PREFIX_TUNING', expected 'LORA'"):
        get_sta(model).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_mix_of_adapters_is_not_made_without_their_sta():
    model = trained(r=2)
    for name in ("second", "third"):
        model.add_adapter(name, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match=r"adapter 'default' has STA of its own, and a mix .* would have none"):
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "mix", combination_type="cat")
    model.add_weighted_adapter(["second", "third"], [1.0, 1.0], "mix", combination_type="cat")
    assert set(model.peft_config) == {"default", "second", "third", "mix"}


def test_a_state_with_the_names_of_another_release():
    """As transformers' trainer loads a checkpoint, with strict=False."""
    model = seeded(make_qwen2_vl)
    handle = inject_sta(model, STAConfig(init="normal"))
    saved = {key: value.clone() for key, value in model.state_dict().items()}
    pairs = NEW_TO_OLD if any(key.startswith("model.visual.") for key in saved) else OLD_TO_NEW
    other = {}
    for key, value in saved.items():
        old, new = next(((o, n) for o, n in pairs if key.startswith(o)), ("", ""))
        other[new + key.removeprefix(old)] = value
    for parameter in handle.parameters():
        torch.nn.init.zeros_(parameter)
    model.load_state_dict(other, strict=False)
    assert all(torch.equal(model.state_dict()[key], saved[key]) for key in saved if ".sta." in key)
    with pytest.raises(RuntimeError, match="1 tensors of STA have no place in the model"):
        model.load_state_dict({"visual.blocks.99.sta.norm.weight": torch.ones(32)}, strict=False)
    handle.remove()
    model.load_state_dict({"visual.blocks.99.sta.norm.weight": torch.ones(32)}, strict=False)


def test_a_model_that_accelerate_offloads(tmp_path):
    """Its weights lie on the meta device between forwards; STA's and LoRA's must not, or they have no values."""
    accelerate = pytest.importorskip("accelerate")
    model = trained(r=2)
    get_sta(model).save_pretrained(tmp_path)
    base = seeded(make_qwen2_vl)
    accelerate.cpu_offload(base, execution_device="cpu")
    handle = load_sta(base, tmp_path)
    assert torch.equal(logits(handle.model), logits(model))
    handle.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load_sta(seeded(make_qwen2_vl), tmp_path / "again").model), logits(model))


def test_a_model_without_weights(tmp_path):
    inject_sta(seeded(make_qwen2_vl)).save_pretrained(tmp_path)
    model = seeded(make_qwen2_vl).to("meta")
    with pytest.raises(CheckpointError, match="on the meta device: load them first"):
        load_sta(model, tmp_path)
    assert get_sta(model) is None


def test_pefts_loader_takes_no_sta_of_other_blocks_than_the_models(tmp_path):
    """Of tensors that have no place PEFT says nothing."""
    handle = inject_sta(seeded(make_qwen2_vl), STAConfig(gamma_init=0.5, init="normal"))
    get_sta(randomize(get_peft_model(handle.model, handle.lora_config(r=2)))).save_pretrained(tmp_path)
    for settings, differs in (
        ({"gamma_init": 0.5, "layers": [0]}, r"unexpected blocks\.1\."),
        ({}, r"blocks\.0\.gamma"),
    ):
        other = inject_sta(seeded(make_qwen2_vl), STAConfig(**settings)).model
        with pytest.raises(CheckpointError, match=f"does not fit the model: .*{differs}"):
            PeftModel.from_pretrained(other, tmp_path)


def test_pefts_loader_takes_no_lora_alone_onto_another_sta(tmp_path):
    """Of an adapter whose LoRA weights have no copies of STA, as vLLM needs them."""
    from sta_adapter.integrations.vllm.export import export_adapter

    model = trained(r=2)
    get_sta(model).save_pretrained(tmp_path / "a")
    export_adapter(tmp_path / "a", tmp_path / "b")
    refusing = contextlib.suppress(TypeError)  # PEFT before 0.14, of the entry that says that STA belongs to it
    handle = inject_sta(seeded(make_qwen2_vl), get_sta(model).config)
    with pytest.raises(CheckpointError, match="trained beside another STA than the model's, and PEFT loads them alone"):
        PeftModel.from_pretrained(handle.model, tmp_path / "b")
    for index, module in handle.blocks.items():
        module.load_state_dict(get_sta(model).blocks[index].state_dict())
    with refusing:
        assert torch.equal(logits(PeftModel.from_pretrained(handle.model, tmp_path / "b")), logits(model))


def test_a_second_adapter_by_pefts_own_loader(tmp_path):
    model = trained(r=2)
    get_sta(model).save_pretrained(tmp_path / "a")
    handle = inject_sta(seeded(make_qwen2_vl), STAConfig(causal=True))
    get_sta(get_peft_model(handle.model, handle.lora_config(r=2))).save_pretrained(tmp_path / "b")
    loaded = load_sta(seeded(make_qwen2_vl), tmp_path / "a").model
    with pytest.raises(CheckpointError, match=r"trained with other settings than the model's: .*causal True"):
        loaded.load_adapter(tmp_path / "b", "second")
    assert list(loaded.peft_config) == ["default"]
    refusing = contextlib.suppress(TypeError)  # PEFT before 0.14, of the entry that says that STA belongs to it
    with pytest.raises(CheckpointError, match=r"trained with other settings than the model's: .*causal True"):
        loaded.load_adapter(tmp_path / "b", "default")  # in the place of the first
    with refusing:
        loaded.load_adapter(tmp_path / "a", "second")
        loaded.set_adapter("second")
        assert torch.equal(logits(loaded), logits(model))
    lora = get_peft_model(seeded(make_qwen2_vl), LoraConfig(target_modules=["q_proj"]))
    with pytest.warns(STAWarning, match="holds STA, which PEFT does not load"), refusing:
        lora.load_adapter(tmp_path / "a", "second")


def test_an_adapter_in_the_place_of_another_has_its_own_sta(tmp_path):
    """PEFT's loader brings it; its hotswap, for LoRA alone, says so."""
    from sta_adapter.integrations.vllm.export import export_adapter

    hotswap = pytest.importorskip("peft.utils.hotswap")
    first, second = trained(r=2), randomize(trained(r=2))
    for name, model in (("a", first), ("b", second)):
        get_sta(model).save_pretrained(tmp_path / name)
    loaded = load_sta(seeded(make_qwen2_vl), tmp_path / "a").model
    before = logits(loaded)
    with pytest.raises(CheckpointError, match=r"hotswap changes LoRA's weights alone, and STA's are among these"):
        hotswap.hotswap_adapter(loaded, str(tmp_path / "b"), "default")
    assert torch.equal(logits(loaded), before)
    loaded.load_adapter(tmp_path / "b", "default")
    assert torch.equal(logits(loaded), logits(second))
    export_adapter(tmp_path / "a", tmp_path / "apart")  # STA is beside LoRA's weights
    for load in (
        lambda: loaded.load_adapter(tmp_path / "apart", "default"),
        lambda: hotswap.hotswap_adapter(loaded, str(tmp_path / "apart"), "default"),
    ):
        with pytest.raises(CheckpointError, match="were trained beside another STA than the model's"):
            load()
    assert torch.equal(logits(loaded), logits(second))


class Around(torch.nn.Module):
    """A module of one's own around a model."""

    def __init__(self, model):
        super().__init__()
        self.head, self.model = torch.nn.Linear(2, 2), model


WRAPPERS = {"average": AveragedModel, "module": Around, "compiled": torch.compile}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_the_handle_of_a_wrapped_model_saves_what_its_own_does(wrap, tmp_path):
    model = trained(r=2)
    model.get_base_model().config._name_or_path = "user/base"
    get_sta(model).save_pretrained(tmp_path / "plain")
    wrapped = wrap(model)
    get_sta(wrapped).save_pretrained(tmp_path / "wrapped")
    for name, read in (
        (CONFIG, Path.read_text),
        (LORA_CONFIG, Path.read_text),
        (WEIGHTS, tensors),
        (LORA_WEIGHTS, tensors),
    ):
        assert read(tmp_path / "wrapped" / name) == read(tmp_path / "plain" / name)
    with torch.no_grad():
        next(p for name, p in wrapped.named_parameters() if "lm_head" in name).add_(1)
    with pytest.raises(CheckpointError, match="1 of the base model's tensors have changed since STA was injected"):
        get_sta(wrapped).save_pretrained(tmp_path / "wrapped")


@pytest.mark.parametrize("whole", [False, True], ids=["part", "part and whole"])
def test_lora_that_was_put_on_a_part_by_itself_is_not_lost_silently(whole, tmp_path):
    """As InternVL's own training code does it."""
    handle = inject_sta(seeded(make_qwen2_vl), STAConfig(init="normal"))
    model, decoder = handle.model, handle.model.get_decoder()
    parent, name = next((m, n) for m in model.modules() for n, child in m.named_children() if child is decoder)
    setattr(parent, name, get_peft_model(decoder, LoraConfig(target_modules=["q_proj"])))
    if whole:
        model = get_peft_model(model, handle.lora_config(target_modules=["lm_head"]))
        handle = get_sta(model)
    told = rf"LoRA was put on \S*{name} by itself, .* so that it would be lost\. Put it on the whole model"
    if not whole:
        with pytest.warns(STAWarning, match=f"can't save what is trained here: {told}"):
            model.train()(**qwen2_vl_prompt(3))
    with pytest.raises(CheckpointError, match=told):
        handle.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    if not whole:
        handle.save_pretrained(tmp_path, base_changed=True)
        assert not (tmp_path / LORA_CONFIG).exists()


@pytest.mark.parametrize("part", ["encoder", "blocks"])
def test_a_model_with_activation_checkpointing_around_its_parts(part, tmp_path):
    """As FSDP's users put it in: names of parameters are others than those in states and files."""
    handle = inject_sta(seeded(make_qwen2_vl), STAConfig(init="normal")).freeze_base()
    model, expected = handle.model, trained_state(handle.model)
    saved = {key: value.clone() for key, value in model.state_dict().items()}
    (tmp_path / "trained.safetensors").write_bytes(save(expected))
    parts = [handle.encoder] if part == "encoder" else list(handle.encoder.blocks)
    apply_activation_checkpointing(model, check_fn=lambda module: any(module is part for part in parts))
    assert any("_checkpoint_wrapped_module" in name for name, _ in model.named_parameters())
    for load in (lambda: model.load_state_dict(saved), lambda: load_trained(model, tmp_path)):
        for parameter in handle.parameters():
            torch.nn.init.zeros_(parameter)
        load()
        found = trained_state(model)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    with torch.no_grad():
        handle.encoder.blocks[0].mlp.fc1.weight.add_(1)
    with pytest.raises(CheckpointError, match="1 of the base model's tensors have changed since STA was injected"):
        handle.save_pretrained(tmp_path)


@pytest.mark.parametrize("settings", ["ours", "by hand"])
@pytest.mark.parametrize("before", ["STA", "STA and LoRA"])
def test_an_adapter_that_peft_saved_over_is_not_mixed_with_its_sta(before, settings, tmp_path):
    """As `Trainer.save_model` does in stage two, in the folder of an earlier adapter: the STA that lay there was loaded with the new LoRA."""
    first = inject_sta(seeded(make_qwen2_vl), STAConfig(init="normal"))
    (first if before == "STA" else get_sta(get_peft_model(first.model, first.lora_config()))).save_pretrained(tmp_path)
    handle = inject_sta(seeded(make_qwen2_vl), STAConfig(init="normal"))
    by_hand = LoraConfig(target_modules=["q_proj"], modules_to_save=["sta"])
    model = randomize(get_peft_model(handle.model, handle.lora_config() if settings == "ours" else by_hand))
    model.save_pretrained(tmp_path)
    for read in (lambda: load_sta(seeded(make_qwen2_vl), tmp_path), lambda: read_checked(tmp_path)):
        with pytest.raises(
            CheckpointError, match=r"holds two adapters: PEFT saved .* Delete sta_adapter.safetensors and"
        ):
            read()
    get_sta(model).save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)  # the same once more, as by a trainer at its end
    assert torch.equal(logits(load_sta(seeded(make_qwen2_vl), tmp_path).model), logits(model))
    assert read_checked(tmp_path)[1] == handle.num_parameters()


FROZEN = {
    "PEFT": lambda handle: get_peft_model(handle.model, LoraConfig(target_modules=["q_proj"])),
    "the encoder frozen last": lambda handle: (handle.freeze_base(), handle.encoder.requires_grad_(False), handle.model.lm_head.requires_grad_(True)),
}  # fmt: skip


@pytest.mark.parametrize("start", ["zero", "normal"])
@pytest.mark.parametrize("freeze", FROZEN.values(), ids=FROZEN)
def test_fresh_sta_that_does_not_train_is_told_of(freeze, start, tmp_path):
    """The other weights would train on, and STA stay as it is."""
    handle = inject_sta(seeded(make_qwen2_vl), STAConfig(init=start))
    freeze(handle)
    with pytest.warns(
        STAWarning, match=r"STA is in the model as inject_sta made it, .* would not be trained while other"
    ):
        handle.encoder.train()(**qwen2_vl_arguments(clips_of(4)))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="STA is in the model")
        handle.encoder(**qwen2_vl_arguments(clips_of(4)))  # once is enough
        inject_sta(seeded(make_qwen2_vl)).save_pretrained(tmp_path)
        load_sta(seeded(make_qwen2_vl), tmp_path).encoder.train()(**qwen2_vl_arguments(clips_of(4)))  # nothing trains
        known = inject_sta(seeded(make_qwen2_vl))
        randomize(known.blocks[0])
        FROZEN["PEFT"](known)
        known.encoder.train()(**qwen2_vl_arguments(clips_of(4)))  # STA of an earlier training, left as it is


def test_a_loaded_adapter_is_not_taken_for_fresh_sta(tmp_path, monkeypatch):
    """Memory without values, which a file fills, may have held the zeros that an untrained adapter has."""
    inject_sta(seeded(make_qwen2_vl)).save_pretrained(tmp_path)
    monkeypatch.setattr(torch, "empty_like", torch.zeros_like)
    handle = load_sta(seeded(make_qwen2_vl), tmp_path)
    assert not any(parameter.requires_grad for parameter in handle.parameters())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="STA is in the model")
        handle.encoder.train()(**qwen2_vl_arguments(clips_of(4)))


def steps(handle, *optimizers, count=4, training=True):
    """Of a training loop."""
    handle.encoder.train(training)
    for _ in range(count):
        tokens = handle.encoder(**qwen2_vl_arguments(clips_of(4)))[0]
        if tokens.requires_grad:
            tokens.sum().backward()
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])  # as from_pretrained gives a model
@pytest.mark.parametrize("made", ["before inject_sta", "before LoRA"])
def test_an_optimizer_that_was_made_before_sta_is_told_of(made, training):
    """Its weights train on, and STA stays as it is: PEFT's copies of it too."""
    model = seeded(make_qwen2_vl)
    early = torch.optim.SGD(model.parameters(), lr=1e-3)
    handle = inject_sta(model).freeze_base()
    if made == "before LoRA":
        early = torch.optim.SGD(handle.parameters(), lr=1e-3)
        steps(handle, early, training=training)
        handle = get_sta(get_peft_model(handle.model, handle.lora_config(r=2)))
    before = [parameter.clone() for parameter in handle.parameters()]
    with pytest.warns(
        STAWarning, match=r"an optimizer of this model's weights has made 3 steps and has none of STA's"
    ) as told:
        steps(handle, early, count=6, training=training)
    assert len(told) == 1
    assert all(torch.equal(a, b) for a, b in zip(before, handle.parameters(), strict=True))
    late = torch.optim.SGD([p for p in handle.model.parameters() if p.requires_grad], lr=1e-3)
    steps(handle, late, training=training)
    assert not all(torch.equal(a, b) for a, b in zip(before, handle.parameters(), strict=True))


def test_a_training_in_eval_mode_is_told_of_what_trains_too_narrow_or_not_at_all():
    """From its second forward on, as nothing else tells it from an evaluation with gradients."""
    handle = inject_sta(seeded(make_qwen2_vl).bfloat16()).freeze_base()
    handle.encoder.eval()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="STA ")
        handle.encoder(**qwen2_vl_arguments(clips_of(4)))
        handle.encoder(**qwen2_vl_arguments(clips_of(4)))  # nothing has been trained
    with pytest.warns(STAWarning, match="STA trains in 16 bits"):
        steps(handle, torch.optim.SGD(handle.parameters(), lr=1e-3), training=False, count=2)
    frozen = inject_sta(seeded(make_qwen2_vl))
    model = FROZEN["PEFT"](frozen)
    lora = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with pytest.warns(STAWarning, match="STA is in the model as inject_sta made it"):
        steps(frozen, lora, training=False, count=2)


def test_optimizers_that_train_sta_among_others_are_not_spoken_of():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="an optimizer")
        handle = inject_sta(seeded(make_qwen2_vl))
        others = torch.optim.SGD([next(handle.model.lm_head.parameters())], lr=1e-3)
        steps(handle, others, torch.optim.SGD(handle.parameters(), lr=1e-3))  # each has its part
        again = inject_sta(seeded(make_qwen2_vl))
        steps(
            again, *[torch.optim.SGD([p], lr=1e-3) for p in reversed(list(again.model.parameters()))]
        )  # of each its own
        foreign = inject_sta(seeded(make_qwen2_vl))
        steps(foreign, torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=1e-3))  # another model's
        frozen = inject_sta(seeded(make_qwen2_vl))
        randomize(frozen.blocks[0])  # as STA of an earlier training
        frozen.encoder.requires_grad_(False)
        steps(frozen, torch.optim.SGD(frozen.model.parameters(), lr=1e-3))
        frozen.remove()
        others.step()


def test_peft_without_its_adapter_is_the_base_also_once_it_was_loaded(tmp_path):
    """As the reference of a preference training that goes on from an adapter: it had STA and no LoRA."""
    handle = inject_sta(seeded(make_qwen2_vl))
    get_sta(randomize(get_peft_model(handle.model, handle.lora_config(r=2)))).save_pretrained(tmp_path)
    loaded = load_sta(seeded(make_qwen2_vl), tmp_path).model
    trained = logits(loaded)
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), logits(seeded(make_qwen2_vl)))
    assert torch.equal(logits(loaded), trained)
    with contextlib.suppress(TypeError):  # PEFT before 0.14, of the entry that says that STA belongs to it
        loaded.load_adapter(tmp_path, "second")
        assert torch.equal(logits(loaded), trained)
    assert torch.equal(logits(loaded.unload()), logits(load_sta(seeded(make_qwen2_vl), tmp_path).model.unload()))


def test_lora_of_others_in_the_folder_of_sta_is_told_of(tmp_path):
    get_peft_model(seeded(make_qwen2_vl), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    handle = inject_sta(seeded(make_qwen2_vl))
    with pytest.warns(
        STAWarning, match=r"adapter_config.json is of LoRA that this model doesn't have, and stays; load_sta would"
    ):
        handle.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".* is of LoRA")
        get_sta(trained(r=2)).save_pretrained(tmp_path)  # replaces it
        handle.save_pretrained(tmp_path)
    assert not (tmp_path / LORA_CONFIG).exists()


def test_lora_around_lora_is_not_saved(tmp_path):
    """Its names in the file were those of no model."""
    handle = inject_sta(seeded(make_qwen2_vl), STAConfig(init="normal"))
    inner = get_peft_model(handle.model, handle.lora_config(r=2))
    outer = get_peft_model(inner, LoraConfig(target_modules=["q_proj"]), adapter_name="outer")
    with pytest.raises(CheckpointError, match="has LoRA already, and its weights could not be loaded again"):
        get_sta(outer).save_pretrained(tmp_path)


def takes_peft(model):
    """Whether this transformers takes the PEFT that is here for its own `load_adapter`."""
    try:
        model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    except (ValueError, ImportError):
        return False
    return True


def test_the_loader_of_transformers_models_brings_the_values_of_sta_or_says_so(tmp_path):
    """transformers 5.0 left STA as it was, without a word."""
    if not takes_peft(seeded(make_qwen2_vl)):
        pytest.skip("this transformers wants a newer PEFT")
    model = trained(r=2)
    get_sta(model).save_pretrained(tmp_path)
    refusing = contextlib.suppress(TypeError)  # PEFT before 0.14, of the entry that says that STA belongs to it
    handle = inject_sta(seeded(make_qwen2_vl), get_sta(model).config)
    with refusing:
        handle.model.load_adapter(str(tmp_path))
        assert torch.equal(logits(handle.model), logits(model))
    with pytest.raises(CheckpointError, match=r"trained with other settings than the model's: .*causal"):
        inject_sta(seeded(make_qwen2_vl), STAConfig(causal=True)).model.load_adapter(str(tmp_path))
    with pytest.warns(STAWarning, match="holds STA, which PEFT does not load"), refusing:
        seeded(make_qwen2_vl).load_adapter(str(tmp_path))
