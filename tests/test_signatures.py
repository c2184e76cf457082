"""Arguments by name, whatever a tool has put in the place of a module's forward."""

import functools
import gc
import types
import weakref

import pytest
import torch
from cases import make_qwen2_vl, qwen2_vl_prompt, randomize, seeded
from toy import ToyEncoder, toy_pixels

from sta_adapter import inject_sta
from sta_adapter.backbone import EncoderCall
from sta_adapter.compatibility.calls import bound_arguments, takes


def bound_method(module):
    """ms-swift: a function around the bound method, bound once more; its signature lacks the first argument."""
    original = module.forward

    @functools.wraps(original)
    def forward(self, *args, **kwargs):
        return original(*args, **kwargs)

    module.forward = types.MethodType(forward, module)


def nameless(module):
    """A function that tells nothing of its arguments."""
    original = module.forward
    module.forward = lambda *args, **kwargs: original(*args, **kwargs)


def partly(module):
    """accelerate: a partial function dressed as the method."""
    original = module.forward

    def new_forward(module, *args, **kwargs):
        return original(*args, **kwargs)

    module.forward = functools.update_wrapper(functools.partial(new_forward, module), original)


def twice(module):
    bound_method(module)
    bound_method(module)


REPLACED = pytest.mark.parametrize("replace", [bound_method, nameless, partly, twice])


@REPLACED
@pytest.mark.parametrize("by_position", [True, False], ids=["position", "keyword"])
def test_the_encoders_arguments(replace, by_position):
    encoder, pixels, clips = ToyEncoder(), toy_pixels(((3, 2),)), ((3, 2),)
    replace(encoder)
    args, kwargs = ((pixels, clips), {}) if by_position else ((), {"pixels": pixels, "clips": clips})
    call = EncoderCall.bind(encoder, args, kwargs, None)
    assert (call.tensor("pixels") is pixels, call.arguments["clips"]) == (True, clips)
    assert takes(encoder, "clips")
    assert not takes(encoder, "clip_lengths")


@REPLACED
@pytest.mark.parametrize("when", ["before", "after"])
def test_injection_beside_a_replaced_forward(replace, when):
    """The whole model with STA computes what it does without the replacement, in training too."""
    model = seeded(make_qwen2_vl)
    encoder = model.get_submodule("model.visual") if hasattr(model.model, "visual") else model.visual
    if when == "before":
        replace(encoder)
    handle = inject_sta(model).freeze_base()
    for module in handle.blocks.values():
        randomize(module)
    if when == "after":
        replace(encoder)
    batch = qwen2_vl_prompt(3)
    found = model(**batch).logits
    found.square().mean().backward()
    assert all(p.grad.abs().max() > 0 for p in handle.parameters())
    del encoder.forward
    assert torch.equal(model(**batch).logits, found)


def test_a_forward_of_other_arguments_is_read_by_itself():
    encoder = ToyEncoder()
    encoder.forward = lambda frames, rows: frames
    assert bound_arguments(encoder, (1,), {"rows": 2}) == {"frames": 1, "rows": 2}
    with pytest.raises(TypeError, match="unexpected keyword argument 'columns'"):
        bound_arguments(encoder, (1,), {"columns": 2})


def test_arguments_behind_two_stars_are_among_the_rest():
    class Model(torch.nn.Module):
        def forward(self, first, options=None, **more):
            return first

    found = bound_arguments(Model(), (1, {"third": 3}), {"second": 2})
    assert (found["first"], found["second"], found["options"]) == (1, 2, {"third": 3})
    assert "third" not in found
    with pytest.raises(TypeError, match="missing a required argument: 'first'"):
        bound_arguments(Model(), (), {}, partial=False)


def test_what_is_remembered_of_a_method_keeps_no_model():
    encoder = ToyEncoder()
    bound_method(encoder)
    assert not takes(encoder, "another")  # looks at all of its signatures
    gone = weakref.ref(encoder)
    del encoder
    gc.collect()
    assert gone() is None
