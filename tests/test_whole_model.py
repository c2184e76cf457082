"""A model with STA that is saved whole, by its own methods or transformers' Trainer, and a base that was changed after STA went in."""

import contextlib
import copy
import inspect
import json
import pickle
import re
import shutil
import warnings

import accelerate
import pytest
import torch
import transformers
from cases import make_qwen2_vl, qwen2_vl_prompt, seeded
from hub_server import HubServer
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from test_lora_options import logits
from torch import nn
from torch.nn.utils import prune
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from sta_adapter import STAConfig, get_sta, inject_sta, load_sta
from sta_adapter.adapter.format import CONFIG, WEIGHTS
from sta_adapter.errors import CheckpointError, ConfigError, STAWarning
from sta_adapter.loading import load_model
from sta_adapter.training.checkpoints import numpy_allowed

OTHER = STAConfig(init="normal", causal=True, gamma_init=0.5, layers=[0, 2], rope_theta=50.0)


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """A base in a folder."""
    base.folder = tmp_path_factory.mktemp("base")
    seeded(make_qwen2_vl).save_pretrained(base.folder)


def base():
    return load_model(base.folder, device="cpu")


def tower(model):
    """The vision encoder, on any release."""
    return next(part for part in model.modules() if isinstance(part, Qwen2VisionTransformerPretrainedModel))


def name_of(part, model):
    return next(name for name, module in model.named_modules() if module is part)


def injected(config=OTHER):
    """The base with STA that adds something, trained alone."""
    handle = inject_sta(base(), config).freeze_base()
    for parameter in handle.parameters():
        nn.init.normal_(parameter, std=0.1)
    return handle


def trainer(model, out, data=None, collate=None, **options):
    arguments = transformers.TrainingArguments(str(out), use_cpu=True, report_to="none", **options)
    return transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data, data_collator=collate)


SAVING = {
    "model": lambda model, out: model.save_pretrained(out),
    "state given": lambda model, out: model.save_pretrained(out, state_dict=model.state_dict()),
    "in parts": lambda model, out: model.save_pretrained(out, max_shard_size="100KB"),
    "trainer": lambda model, out: trainer(model, out.parent / "run").save_model(str(out)),
    "copy": lambda model, out: copy.deepcopy(model).save_pretrained(out),
    "unpickled": lambda model, out: pickle.loads(pickle.dumps(model)).save_pretrained(out),
    "accelerate": lambda model, out: accelerate.Accelerator().unwrap_model(model).save_pretrained(out),
}


@pytest.mark.parametrize("save", SAVING.values(), ids=SAVING)
def test_a_model_that_is_saved_whole_has_its_adapter_beside(save, tmp_path):
    handle = injected()
    save(handle.model, tmp_path / "whole")
    with pytest.warns(STAWarning, match=r"loaded without it: give its adapter as it lies beside them \(load_sta"):
        model = load_model(tmp_path / "whole", device="cpu")
    loaded = load_sta(model, tmp_path / "whole")
    assert loaded.config == handle.config
    assert torch.equal(logits(loaded.model), logits(handle.model.eval()))
    assert torch.equal(
        logits(load_sta(base(), tmp_path / "whole").model), logits(handle.model)
    )  # the base is as it was


def test_the_method_goes_with_sta(tmp_path):
    handle = injected()
    assert "save_directory" in inspect.signature(handle.model.save_pretrained).parameters
    handle.remove().save_pretrained(tmp_path)
    assert not (tmp_path / CONFIG).exists()
    assert not any("save_pretrained" in vars(module) for module in handle.model.modules())


def test_other_processes_write_nothing(tmp_path):
    injected().model.save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / CONFIG).exists()


def test_a_state_without_sta_is_told_of(tmp_path):
    model = injected().model
    state = {key: value for key, value in model.state_dict().items() if ".blocks.2.sta." not in key}
    with pytest.warns(
        STAWarning, match=r"has the model's weights, .* and no adapter.*the state .* lacks STA of blocks\.2"
    ):
        model.save_pretrained(tmp_path, state_dict=state)
    assert not (tmp_path / CONFIG).exists()


def test_a_state_that_is_emptied_while_it_is_saved(tmp_path, monkeypatch):
    """As transformers 4.47 does, which takes out what it has written."""
    handle = injected()
    save = type(handle.model).save_pretrained

    def emptying(self, save_directory, *args, state_dict=None, **kwargs):
        save(self, save_directory, *args, state_dict=dict(state_dict), **kwargs)
        state_dict.clear()

    monkeypatch.setattr(type(handle.model), "save_pretrained", emptying)
    handle.model.save_pretrained(tmp_path, state_dict=handle.model.state_dict())
    for index, module in load_sta(base(), tmp_path, base_model="any").blocks.items():
        for name, value in handle.blocks[index].state_dict().items():
            assert torch.equal(module.state_dict()[name], value)


def test_an_adapter_that_can_not_be_is_told_of_once_the_model_is_saved(tmp_path):
    handle = injected()
    prune.l1_unstructured(handle.blocks[0].to_out, "weight", 0.5)
    with pytest.warns(
        STAWarning, match=r"no adapter, without which STA can't be loaded: STA can't be saved: the weight"
    ):
        handle.model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()


def test_a_base_that_was_trained_along(tmp_path):
    """All of it is saved, so that its adapter is for it; and not for the base as it was."""
    handle = injected()
    nn.init.normal_(handle.model.lm_head.weight)
    handle.model.save_pretrained(tmp_path)
    with pytest.warns(STAWarning, match="loaded without it"):
        loaded = load_sta(load_model(tmp_path, device="cpu"), tmp_path)
    assert torch.equal(logits(loaded.model), logits(handle.model.eval()))
    with pytest.raises(
        CheckpointError, match=r"was saved of .* after that was changed in memory .* this is the base as it was"
    ):
        load_sta(base(), tmp_path)
    load_sta(base(), tmp_path, base_model="any")


def with_lora():
    """A model with STA and LoRA that adds something."""
    handle = injected()
    model = get_peft_model(handle.model, handle.lora_config())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def test_lora_that_was_merged_is_in_the_base_that_is_saved(tmp_path):
    model = with_lora()
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    with pytest.warns(STAWarning, match="loaded without it"):
        loaded = load_sta(load_model(tmp_path, device="cpu"), tmp_path)
    assert torch.equal(logits(loaded.model), logits(merged.eval()))
    with pytest.raises(CheckpointError, match="LoRA merged into it"):
        load_sta(base(), tmp_path)


def test_a_model_that_is_saved_with_lora_in_it(tmp_path):
    """By `get_base_model()`: its weights have PEFT's names, and random ones were loaded in their place."""
    model = with_lora()
    with pytest.warns(
        STAWarning, match=r"saved with LoRA in them, under names .*Save the adapter by .*merge_and_unload"
    ):
        model.get_base_model().save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"saved with PEFT's LoRA in the model, .* would be random, .*merge_and_unload"
    ):
        load_model(tmp_path, device="cpu")
    again = injected()
    again = get_peft_model(again.model, again.lora_config())
    again.get_base_model().load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert torch.equal(logits(again.eval()), logits(model.eval()))


def test_weights_that_are_missing_are_told_of(tmp_path):
    """transformers makes them up, and said so in a table of its own, or among its logs."""
    base().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    lost = next(key for key in state if "merger" in key)
    save_file(
        {key: value for key, value in state.items() if key != lost}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.warns(
        STAWarning, match=rf"not all .* are in {re.escape(str(tmp_path))}: .*merger.*, for one, has random values"
    ):
        load_model(tmp_path, device="cpu")


def test_a_base_that_was_changed_is_told_by_handles_too(tmp_path):
    handle = injected()
    nn.init.normal_(handle.model.lm_head.weight)
    handle.save_pretrained(tmp_path, base_changed=True)
    with pytest.raises(CheckpointError, match="after that was changed in memory"):
        load_sta(base(), tmp_path)
    other = injected()
    other.save_pretrained(tmp_path, base_changed=True)  # which is not true
    assert "base_changed" not in json.loads((tmp_path / CONFIG).read_text())


@contextlib.contextmanager
def served(monkeypatch, cache):
    """A Hub of its own, also for transformers, which keeps a client of the one before, or what it was told when it was imported."""
    with HubServer() as hub:
        hub.use(monkeypatch, cache)
        for name, value in (("_hf_api", None), ("_is_offline_mode", False), ("TRANSFORMERS_CACHE", str(cache))):
            if hasattr(transformers.utils.hub, name):
                monkeypatch.setattr(transformers.utils.hub, name, value)
        yield hub


@pytest.mark.parametrize("how", ["push_to_hub", "save_pretrained"])
def test_a_model_that_is_pushed_has_its_adapter_beside(how, tmp_path, monkeypatch):
    handle = injected()
    with served(monkeypatch, tmp_path / "cache") as hub:
        if how == "push_to_hub":
            handle.model.push_to_hub("user/whole")
        else:
            handle.model.save_pretrained(tmp_path / "whole", push_to_hub=True, repo_id="user/whole", private=True)
            assert (tmp_path / "whole" / CONFIG).exists()
        assert {CONFIG, WEIGHTS, "model.safetensors", "config.json"} <= set(hub.files("user/whole"))
        with pytest.warns(STAWarning, match="loaded without it"):
            model = load_model("user/whole", device="cpu")
        assert model.config._name_or_path == "user/whole"
        description = json.loads((tmp_path / "whole" / CONFIG).read_text()) if how == "save_pretrained" else None
        loaded = load_sta(model, "user/whole")
        assert torch.equal(logits(loaded.model), logits(handle.model.eval()))
    assert description is None or description["base_model"]["id"] != "user/whole"


def test_the_adapter_of_a_model_is_for_it_under_its_own_name_on_the_hub(tmp_path, monkeypatch):
    """Its base was another repository's, from which it was trained."""
    handle = injected()
    handle.model.config._name_or_path = "user/original"
    with served(monkeypatch, tmp_path / "cache"):
        handle.model.push_to_hub("user/whole")
        with pytest.warns(STAWarning, match="loaded without it"):
            model = load_model("user/whole", device="cpu")
        load_sta(model, "user/whole").remove()
        model.config._name_or_path = "user/third"
        with pytest.raises(CheckpointError, match="is for another base model"):
            load_sta(model, "user/whole")


def test_sta_that_was_saved_without_its_settings_is_told_of(tmp_path):
    handle = injected()
    accelerate.Accelerator().save_model(handle.model, tmp_path)
    with pytest.raises(
        CheckpointError,
        match=r"holds no sta_config.*model\.safetensors holds STA among a model's weights .* inject_sta\(model, ",
    ):
        load_sta(base(), tmp_path)
    other = inject_sta(base(), OTHER)
    missing = other.model.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert not missing.unexpected_keys
    assert torch.equal(logits(other.model), logits(handle.model.eval()))


def test_the_best_checkpoint_comes_back_with_its_sta(tmp_path):
    """As transformers' trainer loads it at the end, and each of its checkpoints is an adapter without any callback."""
    torch.manual_seed(0)
    handle = injected(STAConfig())
    made = trainer(
        handle.model, tmp_path, [{"index": 0}], collate, max_steps=2, learning_rate=1e-2, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1,
        load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True, remove_unused_columns=False,
    )  # fmt: skip
    made.train()
    best = load_sta(base(), made.state.best_model_checkpoint)
    assert all(map(torch.equal, best.parameters(), handle.parameters()))


def collate(_):
    return {**qwen2_vl_prompt(3), "labels": qwen2_vl_prompt(3)["input_ids"]}


def resumed(handle, out, steps, resume=None):
    """A run of transformers' trainer with a checkpoint after each step."""
    options = {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "save_steps": 1, "remove_unused_columns": False}
    made = trainer(handle.model, out, [{"index": 0}], collate, max_steps=steps, **options)
    with numpy_allowed():  # of which transformers 4.45 writes something
        made.train(resume_from_checkpoint=resume)


def with_base(config=STAConfig()):
    """STA that trains together with parts of the base."""
    handle = inject_sta(base(), config).freeze_base()
    for name, parameter in handle.model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or "layers.0." in name or "merger" in name)
    return handle


@pytest.mark.parametrize("shards", [False, True], ids=["whole", "shards"])
def test_a_run_that_trains_the_base_along_goes_on_with_it(shards, tmp_path):
    """transformers saves its weights under the names of an older release, by which its trainer brought none of them back."""
    whole, again = with_base(), with_base()
    resumed(whole, tmp_path, 2)
    if shards:
        loaded = load_model(tmp_path / "checkpoint-1", device="cpu")
        checkpoint = tmp_path / "checkpoint-1"
        first = load_sta(loaded, checkpoint)
        (checkpoint / "model.safetensors").unlink()
        first.model.save_pretrained(checkpoint, max_shard_size="100KB")
    resumed(again, tmp_path, 2, str(tmp_path / "checkpoint-1"))
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(again.model.state_dict()[name], value, msg=name)


def test_the_weights_of_a_part_come_into_that_part_alone():
    """Where STA of a state lies tells which part it is of; what the part hasn't is no tensor of another part whose name ends so."""
    handle = inject_sta(base(), STAConfig(init="normal"))
    whole = handle.model.state_dict()
    start = next(name for name in whole if ".sta." in name).partition("blocks.")[0]
    (place,) = [name for name in whole if name.endswith("norm.weight") and "layers" not in name and start not in name]
    before = whole[place].clone()
    state = {name.removeprefix(start): value + 1 for name, value in whole.items() if name.startswith(start)}
    state["norm.weight"] = before + 1
    handle.model.load_state_dict(state, strict=False)
    found = handle.model.state_dict()
    assert torch.equal(found[place], before)
    for name, value in state.items():
        assert name == "norm.weight" or torch.equal(found[start + name], value), name


def test_what_trains_and_has_no_place_in_the_model_is_told_of():
    handle = with_base()
    state = {name: value for name, value in handle.model.state_dict().items() if "merger" not in name}
    state["model.visual.resampler.weight"] = torch.ones(2)
    with pytest.warns(
        STAWarning,
        match=r"1 tensors that are loaded .* first is model\.visual\.resampler\.weight, and \d of the base that",
    ):
        handle.model.load_state_dict(state, strict=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", STAWarning)
        handle.model.load_state_dict(
            {key: state[key] for key in list(state)[:3]}, strict=False
        )  # a part, as shards are


def test_sta_that_is_in_the_tower_alone_is_told_of_where_nothing_is_loaded_into_it():
    model = base()
    inject_sta(tower(model))
    state = {key.replace("visual.", "tower."): value for key, value in model.state_dict().items()}
    with pytest.warns(
        STAWarning, match=r"nothing of the state .*visual, in which STA trains, .* inject_sta into the full model"
    ):
        model.load_state_dict(state, strict=False)


SETTINGS = {"order": "before_spatial", "rope_theta": 50.0, "single_frames": False, "causal": True}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_state_of_other_settings_is_refused(name, tmp_path):
    """Its tensors fit, and computed something else."""
    here, there = inject_sta(base(), STAConfig(init="normal")), inject_sta(base(), STAConfig(**{name: SETTINGS[name]}))
    torch.save(here.model.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert list(state) == list(there.model.state_dict())
    with pytest.raises(
        RuntimeError,
        match=rf"blocks\.0\.sta: STA was trained with other settings: {name} .* \(not {SETTINGS[name]!r}\)",
    ):
        there.model.load_state_dict(state)
    there.model.load_state_dict(dict(state))  # a beginning, by somebody who knows
    inject_sta(base(), STAConfig(init="zero", attention="eager")).model.load_state_dict(state)


def test_a_run_of_other_settings_is_not_gone_on_from(tmp_path):
    resumed(injected(STAConfig(causal=True)), tmp_path, 1)
    with pytest.raises(
        ConfigError, match=r"goes on from \(step 1\) has causal True \(not False\)\. Inject STA with the settings"
    ):
        resumed(injected(STAConfig()), tmp_path, 2, str(tmp_path / "checkpoint-1"))
    with pytest.raises(ConfigError, match=r"\(step 1\) has layers 'all' \(not \(0, 2\)\)"):
        resumed(injected(STAConfig(causal=True, layers=[0, 2])), tmp_path, 2, str(tmp_path / "checkpoint-1"))
    everywhere = range(len(tower(base()).blocks))
    resumed(injected(STAConfig(causal=True, layers=everywhere)), tmp_path, 2, str(tmp_path / "checkpoint-1"))


def prepared(**config):
    """An accelerator, and the handle of what it prepared."""
    accelerator = accelerate.Accelerator()
    handle = injected(STAConfig(**config))
    accelerator.prepare(handle.model)
    return accelerator, handle


def test_accelerate_goes_on_from_a_state_of_the_same_settings_alone(tmp_path):
    """Its files hold tensors alone, so the settings lie beside them."""
    first, handle = prepared(causal=True)
    first.save_state(tmp_path)
    with pytest.raises(ConfigError, match=r"has STA with causal True \(not False\)\. Inject STA with the settings"):
        prepared()[0].load_state(tmp_path)
    with pytest.raises(ConfigError, match=r"has STA with layers 'all' \(not \(0, 2\)\)"):
        prepared(causal=True, layers=[0, 2])[0].load_state(tmp_path)
    second, again = prepared(causal=True, attention="eager")
    second.load_state(tmp_path)
    for there, here in zip(again.parameters(), handle.parameters(), strict=True):
        assert torch.equal(there, here)
    assert not first._save_model_state_pre_hook
    assert not second._load_model_state_pre_hook
    for damaged in ("[]", '{"models": 1}', '{"models": [{"no": "such"}]}', '{"models": ["text"]}'):
        (tmp_path / "sta_settings.json").write_text(damaged)
        with pytest.raises(CheckpointError, match=r"sta_settings\.json"):
            second.load_state(tmp_path)
    (tmp_path / "sta_settings.json").unlink()  # of an earlier release
    second.load_state(tmp_path)


def test_accelerate_writes_nothing_of_models_without_sta(tmp_path):
    inject_sta(base())
    accelerator = accelerate.Accelerator()
    accelerator.prepare(base())
    accelerator.save_state(tmp_path)
    assert not (tmp_path / "sta_settings.json").exists()
    accelerator.load_state(tmp_path)


def shorter(blocks):
    del blocks[-1]


def longer(blocks):
    blocks.append(tower(base()).blocks[0])


def replaced(blocks):
    blocks[0] = tower(base()).blocks[0]


def narrower(blocks):
    mlp = blocks[0].mlp
    mlp.fc1, mlp.fc2 = nn.Linear(mlp.fc1.in_features, 8), nn.Linear(8, mlp.fc2.out_features)


def masked(blocks):
    prune.l1_unstructured(blocks[0].mlp.fc1, "weight", 0.5)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (shorter, r"STA is in \d of the \d blocks .* and it had \d when STA went in"),
        (longer, r"and blocks \[\d\] have none"),
        (replaced, r"and blocks \[0\] have none, as they were replaced or wrapped"),
        (narrower, r"of the base model's tensors are gone or have another shape .* \S+blocks\.0\.mlp\.fc"),
        (masked, r"^1 of the base model's tensors are gone or have .* \S+blocks\.0\.mlp\.fc1\.weight"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
@pytest.mark.parametrize("layers", ["all", [0, 1]], ids=["all", "some"])
def test_parts_that_were_changed_since_sta_went_in(change, layers, told, tmp_path):
    """What was saved fitted neither the base nor the changed model, or computed something else."""
    handle = injected(STAConfig(layers=layers))
    if change is longer and layers != "all":
        told = "and it had"
    change(tower(handle.model).blocks)
    with pytest.raises(CheckpointError, match=told):
        handle.save_pretrained(tmp_path / "a")
    handle.save_pretrained(tmp_path / "a", base_changed=True)
    if change is masked:  # of which a plain copy has other names
        return
    plain = copy.deepcopy(handle.model)
    loaded = load_sta(get_sta(plain).remove(), tmp_path / "a", base_model="any")
    assert torch.equal(logits(loaded.model), logits(handle.model))


def test_parts_of_the_language_model_that_were_left_out(tmp_path):
    handle = injected()
    decoder = handle.model.get_decoder()
    layers = getattr(decoder, "language_model", decoder).layers
    name = name_of(layers[-1], handle.model)
    del layers[-1]
    with pytest.raises(CheckpointError, match=rf"are gone or have .* {re.escape(name)}\."):
        handle.save_pretrained(tmp_path)


def test_a_base_that_is_as_it_was_under_other_names(tmp_path):
    """Fewer rows of embeddings, whose last ones no token has; a tower whose model is asked."""
    handle = injected()
    handle.model.resize_token_embeddings(handle.model.config.get_text_config().vocab_size - 2)
    with pytest.warns(STAWarning, match="has embeddings of other tokens than its base"):
        handle.save_pretrained(tmp_path / "fewer")
    model = base()
    inject_sta(tower(model))
    get_sta(model).save_pretrained(tmp_path / "tower")
    with torch.no_grad():
        tower(model).blocks[0].mlp.fc1.weight += 1
    name = name_of(tower(model).blocks[0].mlp.fc1, model)
    with pytest.raises(
        CheckpointError, match=rf"^1 of the base model's tensors have changed .* first is {re.escape(name)}\.weight"
    ):
        get_sta(model).save_pretrained(tmp_path / "tower")


def test_what_came_in_since_and_trains_is_told_of(tmp_path):
    handle = injected()
    handle.model.model.extra = nn.Linear(4, 4)
    with pytest.warns(
        STAWarning, match=r"^2 tensors that train came into the model after STA, the first is model\.extra\.weight"
    ):
        handle.save_pretrained(tmp_path)
    handle.model.model.extra.requires_grad_(False)
    shutil.rmtree(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", STAWarning)
        handle.save_pretrained(tmp_path)
