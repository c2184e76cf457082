"""VideoRoPE on copies and under PEFT, taken off again, and what is refused."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from qwen2_vl_prompts import batch_of, needs_seams
from test_videorope import BATCHES, GREEDY, assert_near, load_model, recomputed

from sta_adapter.backbones.videorope import apply_videorope, remove_videorope
from sta_adapter.errors import ConfigError, InjectionError

pytestmark = needs_seams


@pytest.fixture
def model():
    return load_model(attn_implementation="eager")


@pytest.mark.parametrize(
    "clone",
    [
        pytest.param(copy.deepcopy, id="deepcopy"),
        pytest.param(lambda model: pickled(model), id="pickle"),
    ],
)
def test_a_copy_works_and_is_independent(model, clone):
    apply_videorope(model)
    batch = batch_of(*BATCHES["clips-and-images"])
    with torch.no_grad():
        expected = model(**batch).logits
        twin = clone(model)
        assert twin.model.get_rope_index.config is twin.model.config
        assert torch.equal(twin(**batch).logits, expected)
        remove_videorope(model)
        assert torch.equal(twin(**batch).logits, expected)
        assert torch.equal(twin.generate(**batch, **GREEDY), apply_videorope(model).generate(**batch, **GREEDY))
        remove_videorope(twin)
        assert torch.equal(model(**batch).logits, expected)
    assert twin.model.config is not model.model.config
    assert "get_rope_index" not in vars(twin.model)


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("first", ["videorope", "peft"])
def test_with_lora(model, first):
    peft = pytest.importorskip("peft")
    batch = batch_of(*BATCHES["clips-and-images"])
    expected = apply_videorope(copy.deepcopy(model))(**batch).logits
    tokens = recomputed(apply_videorope(copy.deepcopy(model)), batch, 4)[0]
    if first == "videorope":
        apply_videorope(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    if first == "peft":
        apply_videorope(wrapped)
    wrapped.eval()
    assert_near(wrapped(**batch).logits, expected, 1e-6)
    assert torch.equal(wrapped.generate(**batch, **GREEDY)[:, -4:], tokens)
    remove_videorope(wrapped)
    assert not torch.equal(wrapped(**batch).logits, expected)


def traces(model):
    """What modules hold beside tensors and children, and the hooks among it."""
    return {
        name: (
            sorted(vars(module)),
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            len(module._forward_pre_hooks_with_kwargs),
        )
        for name, module in model.named_modules()
    }


def test_removal_leaves_no_trace_and_may_be_repeated(model):
    batch, before = batch_of(*BATCHES["one-clip"]), traces(model)
    keys = list(model.state_dict())
    plain = model.generate(**batch, **GREEDY, return_dict_in_generate=True, output_scores=True)
    apply_videorope(model)
    assert list(model.state_dict()) == keys
    changed = model.generate(**batch, **GREEDY, return_dict_in_generate=True, output_scores=True)
    assert remove_videorope(model) is model
    remove_videorope(model)
    again = model.generate(**batch, **GREEDY, return_dict_in_generate=True, output_scores=True)
    assert traces(model) == before
    assert not torch.equal(changed.scores[0], plain.scores[0])
    assert all(torch.equal(*scores) for scores in zip(plain.scores, again.scores, strict=True))


def test_applying_twice_is_an_error(model):
    apply_videorope(model)
    with pytest.raises(
        InjectionError, match=r"follow VideoRopePositions\(scale_factor=2.0\) already.*remove_videorope"
    ):
        apply_videorope(model)


@pytest.mark.parametrize("change", [apply_videorope, remove_videorope], ids=["apply", "remove"])
def test_another_model_is_an_error(change):
    with pytest.raises(InjectionError, match="Linear is no Qwen2-VL and holds none; expected a Qwen2VLModel"):
        change(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("scale", [0, -1.0, float("nan"), float("inf"), "2", True, None], ids=repr)
def test_scale_factor_is_a_number_above_zero(model, scale):
    before = traces(model)
    with pytest.raises(ConfigError, match="expected a number above 0"):
        apply_videorope(model, scale)
    assert traces(model) == before
