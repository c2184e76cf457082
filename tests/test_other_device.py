"""A model on another device than the CPU: all that STA makes lies where the model does, and the numbers are those of the CPU."""

import copy

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from cases import CASES, Clip, case_parameters, clips_of, randomize, seeded
from standin_device import DEVICE, StandInDevice
from torch.utils._pytree import tree_map

from sta_adapter import STAConfig, inject_sta
from sta_adapter.text_positions import use_positions
from sta_adapter.visualization import observe

QWEN2_VL = next(case for case in CASES if case.id == "qwen2_vl")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def a_second_device():
    with StandInDevice():
        yield


def moved(value, device):
    """The same with its tensors there."""
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, value)


def on_both(case, **config):
    """Two models with the same weights, STA's too, and their handles, by the device that they lie on."""
    model = seeded(case.make)
    handles = {DEVICE: inject_sta(copy.deepcopy(model).to(DEVICE), STAConfig(**config))}
    handles[CPU] = inject_sta(model, STAConfig(**config))
    for index, module in handles[CPU].blocks.items():
        handles[DEVICE].blocks[index].load_state_dict(randomize(module).state_dict())
    assert {parameter.device for parameter in handles[DEVICE].parameters()} == {DEVICE}
    return handles


def features_of(case, model, clips, device):
    """`case.run` with the encoder's arguments there."""
    encoder = case.encoder(model)
    hook = encoder.register_forward_pre_hook(lambda _, *given: moved(given, device), with_kwargs=True, prepend=True)
    try:
        return case.run(model, clips)
    finally:
        hook.remove()


def require_equal(found):
    """What was found on both devices."""
    assert len(found[CPU]) == len(found[DEVICE]) > 0
    for here, there in zip(found[CPU], found[DEVICE], strict=True):
        assert there.device == DEVICE
        torch.testing.assert_close(there.to(CPU), here, rtol=1e-4, atol=1e-5)


def test_tensors_of_two_devices_are_not_mixed():
    """That what follows can fail."""
    there = torch.ones(2, device=DEVICE)
    assert (there + there).device == DEVICE
    with pytest.raises(RuntimeError, match=r"aten\.add\.Tensor of tensors on cpu:1 and of the CPU's"):
        there + torch.ones(2)


CAUSAL = {"order": "before_spatial", "causal": True, "window": 2}


@pytest.mark.parametrize(
    ("case", "config"),
    [
        *(pytest.param(*case.values, {}, id=case.id, marks=case.marks) for case in case_parameters()),
        pytest.param(QWEN2_VL, CAUSAL, id="causal"),
    ],
)
def test_a_step(case, config):
    found = {}
    for device, handle in on_both(case, **config).items():
        handle.freeze_base()
        features = features_of(case, handle.model.train(), clips_of(*case.lengths[-1]), device)
        weights = [torch.linspace(-1, 1, f.numel()).view(f.shape).to(device) for f in features]
        sum((f.float() * w).mean() for f, w in zip(features, weights, strict=True)).backward()
        found[device] = [*(f.detach() for f in features), *(p.grad for p in handle.parameters())]
    require_equal(found)


@pytest.mark.parametrize(
    "settings", [{"use_reentrant": True}, {"use_reentrant": False}], ids=["re-entrant", "non-re-entrant"]
)
def test_a_step_of_the_full_model_under_checkpointing_and_one_of_text_alone(settings):
    found = {}
    for device, handle in on_both(QWEN2_VL).items():
        handle.freeze_base()
        handle.model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
        batch = moved(QWEN2_VL.generate(3), device)
        handle.model(**batch, labels=batch["input_ids"]).loss.backward()
        text = torch.tensor([[5, 6, 7]], device=device)
        handle.model(input_ids=text, labels=text).loss.backward()
        found[device] = [parameter.grad for parameter in handle.parameters()]
    require_equal(found)


@pytest.mark.parametrize("case", case_parameters(lambda case: case.generate is not None and not case.tell_model))
def test_generation(case):
    found = {}
    for device, handle in on_both(case).items():
        prompt = moved(case.generate(3), device)
        with handle.clips([3]) if case.tell_clips else torch.no_grad():
            answer = handle.model.generate(**prompt, max_new_tokens=3, do_sample=False)
        found[device] = [answer]
    require_equal(found)


def test_generation_with_the_text_positions_of_training():
    found = {}
    for device, handle in on_both(QWEN2_VL).items():
        use_positions(handle.model, "trained")
        prompt = moved(QWEN2_VL.generate(3), device)
        found[device] = [handle.model.generate(**prompt, max_new_tokens=3, do_sample=False)]
    require_equal(found)


@pytest.mark.parametrize("config", [{}, CAUSAL, {"single_frames": False}], ids=str)
def test_a_model_over_two_devices(config):
    """As accelerate's device maps have it: what a block is given comes to its device within the block, after all hooks on it."""
    whole = seeded(QWEN2_VL.make)
    handles = (
        inject_sta(copy.deepcopy(whole), STAConfig(**config)),
        inject_sta(over_two_devices(whole), STAConfig(**config)),
    )
    assert {parameter.device for parameter in handles[1].parameters()} == {CPU, DEVICE}
    for index, module in handles[0].blocks.items():
        handles[1].blocks[index].load_state_dict(randomize(module).state_dict())
    found = {}
    for device, handle in zip((CPU, DEVICE), handles, strict=True):
        handle.freeze_base()
        batch = QWEN2_VL.generate(3)
        loss = handle.model.train()(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        found[device] = moved([loss.detach(), *(parameter.grad for parameter in handle.parameters())], device)
    require_equal(found)


def over_two_devices(model):
    """The model, with the second half of its encoder's blocks there."""
    blocks = QWEN2_VL.encoder(model).blocks
    for index, block in enumerate(blocks):
        device = DEVICE if 2 * index >= len(blocks) else CPU
        add_hook_to_module(block.to(device), AlignDevicesHook(execution_device=device))
    blocks[-1].register_forward_hook(lambda _, __, output: output.to(CPU))
    return model


def test_a_stream():
    found = {}
    for device, handle in on_both(QWEN2_VL, causal=True, window=3).items():
        encoder = QWEN2_VL.encoder(handle.model)
        with torch.no_grad(), handle.stream():
            clips = [Clip(2), Clip(2, start=2)]
            found[device] = [
                QWEN2_VL.features(encoder(**moved(QWEN2_VL.arguments([clip]), device)), [clip])[0] for clip in clips
            ]
    require_equal(found)


def test_what_is_observed():
    found = {
        device: observe(handle, moved(QWEN2_VL.generate(3), device)) for device, handle in on_both(QWEN2_VL).items()
    }
    for name in ("attention", "crossing", "branch", "change"):
        here, there = (getattr(found[device], name) for device in (CPU, DEVICE))
        assert here.max() > 0
        assert there == pytest.approx(here, abs=1e-5)
