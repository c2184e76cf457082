"""Seams: renamed or changed, each is an error that says which releases were tested, and no number."""

import functools
import inspect
import sys
import types

import pytest
import torch
import transformers
from cases import make_qwen2_vl
from qwen2_vl_prompts import batch_of, is_transformers_5, needs_seams
from torch import nn

from sta_adapter import inject_sta
from sta_adapter.attention.recompute import project_normed
from sta_adapter.backbones.qwen2_vl_positions import find_owner, restore_original_positions
from sta_adapter.backbones.videorope import apply_videorope
from sta_adapter.compatibility import seams
from sta_adapter.errors import CompatibilityError
from sta_adapter.training.contexts import activation_checkpointing

TOLD = r"[\s\S]*This is {} \S+, and STA was tested with .*: install one of these \(pip install {}==\.\.\.\)"
only_5 = pytest.mark.skipif(not is_transformers_5(), reason="a part of transformers 5")


def raises(found, package="transformers"):
    return pytest.raises(CompatibilityError, match=found + TOLD.format(package, package))


def test_all_are_as_tested_here():
    found = seams.seams()
    assert len(found) >= 10
    assert {seam.found for seam in found} <= {"as tested", "not installed"}, found
    assert not any(seam.differs for seam in found)


def test_one_that_differs_is_listed_with_the_reason(monkeypatch):
    monkeypatch.delattr(torch._C, "_current_graph_task_id")
    (found,) = [seam for seam in seams.seams() if seam.differs]
    assert found.name == "number of the backward pass"
    assert "torch._C has no _current_graph_task_id" in found.found


def test_one_whose_package_is_missing_does_not_differ(monkeypatch):
    monkeypatch.setattr(seams, "version", lambda package: "not installed")
    assert {seam.found for seam in seams.seams()} == {"not installed"}


@pytest.fixture
def model():
    return make_qwen2_vl().eval()


# The cache of a forward


def forward_of(code):
    scope = {}
    exec(f"def forward({code}): ...", scope)
    return scope["forward"]


def test_a_forward_without_a_known_cache_parameter():
    with raises("Model.forward has no parameter called cache or past_key_values"):
        seams.cached_tokens(forward_of("input_ids, memory=None"), "Model.forward", {})


def test_caches_that_cannot_be_measured_or_contradict_each_other():
    forward = forward_of("input_ids, cache=None, past_key_values=None")
    with raises("given a tuple as cache, which has no get_seq_length"):
        seams.cached_tokens(forward, "Model.forward", {"cache": ((torch.zeros(1), torch.zeros(1)),)})
    two = [types.SimpleNamespace(get_seq_length=lambda n=n: n) for n in (3, 4)]
    with raises("two caches, of 3 and 4 tokens"):
        seams.cached_tokens(forward, "Model.forward", dict(zip(seams.CACHE_NAMES, two, strict=True)))


def test_more_arguments_by_position_than_are_known():
    with raises("Model.forward got 2 arguments by position and is known to take 1"):
        seams.given_arguments(forward_of("a, **more"), "Model.forward", (1, 2), {})


def test_parameters_that_cannot_be_read():
    class Odd:
        __signature__ = 3

        def __call__(self):
            pass

    with raises("the parameters of Odd can't be read"):
        seams.parameter_names(Odd(), "Odd")


@needs_seams
def test_a_forward_whose_cache_was_renamed_gives_no_positions(model, monkeypatch):
    restore_original_positions(model)
    owner = find_owner(model)
    original = type(owner).forward

    @functools.wraps(original)
    def forward(*args, **kwargs):
        return original(*args, **kwargs)

    forward.__signature__ = inspect.signature(forward_of("self, input_ids, attention_mask=None, memory=None"))
    monkeypatch.setattr(type(owner), "forward", forward)
    with raises("Qwen2VLModel.forward has no parameter called cache or past_key_values"):
        owner(**batch_of([(5,)]))


# Positions and frequencies of Qwen2-VL


@needs_seams
@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("input_ids, image_grid, video_grid_thw, attention_mask", "has no parameter image_grid_thw"),
        (
            "input_ids, image_grid_thw, video_grid_thw, attention_mask, frame_times=None",
            "has the unknown parameter frame_times",
        ),
    ],
    ids=["renamed", "new"],
)
@pytest.mark.parametrize("change", [restore_original_positions, apply_videorope])
def test_another_get_rope_index_leaves_the_model_as_it_was(model, code, found, change):
    owner = find_owner(model)
    owner.get_rope_index = forward_of(code)
    before = set(vars(owner))
    with raises("get_rope_index " + found):
        change(model)
    assert set(vars(owner)) == before
    assert not owner._forward_pre_hooks


@needs_seams
def test_a_model_that_keeps_no_rope_deltas(model):
    del find_owner(model).rope_deltas
    with raises("Qwen2VLModel has no rope_deltas"):
        restore_original_positions(model)


@only_5
@pytest.mark.parametrize("change", [restore_original_positions, apply_videorope])
def test_generation_that_asks_for_positions_elsewhere(model, change, monkeypatch):
    monkeypatch.delattr(type(model), seams.GENERATION_METHOD)
    monkeypatch.delattr(transformers.GenerationMixin, seams.GENERATION_METHOD)
    with raises(f"Qwen2VLForConditionalGeneration has no {seams.GENERATION_METHOD}"):
        change(model)
    assert "get_rope_index" not in vars(find_owner(model))


@only_5
def test_generation_that_asks_with_other_arguments(model, monkeypatch):
    monkeypatch.setattr(type(model), seams.GENERATION_METHOD, forward_of("self, inputs_tensor, kwargs"))
    with raises("has no parameter model_kwargs"):
        restore_original_positions(model)


@only_5
def test_frequencies_that_are_mixed_elsewhere(model, monkeypatch):
    monkeypatch.delattr(type(model.model.language_model.rotary_emb), seams.FREQUENCY_METHOD)
    with raises(f"has no {seams.FREQUENCY_METHOD}"):
        apply_videorope(model)
    assert "get_rope_index" not in vars(find_owner(model))


@only_5
def test_frequencies_that_are_mixed_with_other_arguments(model, monkeypatch):
    rotary = type(model.model.language_model.rotary_emb)
    monkeypatch.setattr(rotary, seams.FREQUENCY_METHOD, forward_of("self, freq, sections"))
    with raises("has the unknown parameter sections"):
        apply_videorope(model)


# torch


def test_a_backward_that_cannot_be_told(model, monkeypatch):
    encoder = inject_sta(model).encoder.train()
    encoder.blocks[0].register_forward_hook(lambda *call: None)
    pixels, grid = torch.randn(32, 96, requires_grad=True), torch.tensor([[2, 4, 4]])
    for method in ("gradient", "activation"):
        if hasattr(model, f"{method}_checkpointing_enable"):
            enable = getattr(model, f"{method}_checkpointing_enable")
    enable()
    out = encoder(pixels, grid)
    out = out if isinstance(out, torch.Tensor) else out[0]
    monkeypatch.delattr(torch._C, "_current_graph_task_id")
    with raises("torch._C has no _current_graph_task_id", "torch"):
        out.sum().backward()


def test_functions_that_cannot_be_kept_from_the_compiler(monkeypatch):
    monkeypatch.delattr(sys.modules["torch._compile"], "_disable_dynamo")
    with raises("torch._compile has no _disable_dynamo", "torch"):
        seams.disable_dynamo()


@pytest.mark.parametrize("name", [*seams.HOOK_TABLES, *seams.HOOK_OPTIONS])
def test_hooks_that_are_kept_elsewhere(name):
    module = nn.Identity()
    vars(module).pop(name, None)
    with raises(f"Identity.{name} is a NoneType, expected a dict", "torch"):
        seams.hook_table(module, name)


def test_hooks_of_a_layer_that_cannot_be_found_give_no_number():
    norm, linear = nn.LayerNorm(4), nn.Linear(4, 4)
    del norm._forward_hooks
    with raises("the hooks of LayerNorm can't be found", "torch"):
        project_normed(norm, linear, torch.zeros(2, 4, requires_grad=True))


# Checkpointing


class NoCheckpointing(nn.Module):
    pass


class OtherKeywords(nn.Module):
    def activation_checkpointing_enable(self, settings=None): ...

    def activation_checkpointing_disable(self): ...


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (NoCheckpointing(), "NoCheckpointing has neither activation_checkpointing_enable nor gradient_check"),
        (OtherKeywords(), "activation_checkpointing_enable has no parameter activation_checkpointing_kwargs"),
    ],
    ids=["none", "other keywords"],
)
def test_a_model_that_checkpoints_otherwise(model, found):
    with raises(found), activation_checkpointing(model, None, True):
        pass


# PEFT


def test_a_peft_whose_classes_lie_elsewhere(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft.utils.other", types.ModuleType("peft.utils.other"))
    with raises("its classes can't be imported", "peft"):
        seams.peft_parts()


def test_a_peft_whose_layers_are_built_otherwise(monkeypatch):
    from peft.tuners.tuners_utils import BaseTunerLayer

    monkeypatch.delattr(BaseTunerLayer, "get_base_layer")
    with raises("BaseTunerLayer has no get_base_layer", "peft"):
        seams.peft_parts()
