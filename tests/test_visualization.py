"""What is shown of STA is what STA did."""

import contextlib
import dataclasses
import threading

import numpy as np
import pytest
import torch
from cases import case_parameters, clips_of, randomize
from toy import TOY, ToyEncoder, toy, toy_pixels  # noqa: F401

from sta_adapter import STAConfig, get_sta, inject_sta
from sta_adapter.errors import ConfigError, LayoutError
from sta_adapter.visualization import Observation, branch_sizes, crossing_map, observe, temporal_attention

CLIPS = ((4, 2), (1, 3), (5, 1))


def toy_inputs():
    return {"pixels": toy_pixels(CLIPS), "clips": CLIPS}


def injected(model, backbone=None, **config):
    handle = inject_sta(model, STAConfig(**config), backbone=backbone)
    for module in handle.blocks.values():
        randomize(module)
    return handle


@pytest.fixture
def variant():
    """A function that declares the toy backbone otherwise, under a name of its own."""
    names = []

    def make(**fields):
        names.append(f"toy-{len(names)}")
        return dataclasses.replace(TOY, name=names[-1], **fields)

    return make


def hook_count(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# ---- the arrays


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("theta", [None, 30.0])
@pytest.mark.parametrize("clip", [0, 1, 2])
def test_weights_reproduce_the_branch(toy, causal, theta, clip):  # noqa: F811
    handle = injected(toy, head_scale=1.0, causal=causal, rope_theta=theta)
    seen, module = {}, handle.blocks[1]
    hooks = [
        module.to_qkv.register_forward_hook(lambda m, args, out: seen.__setitem__("qkv", out)),
        module.to_out.register_forward_pre_hook(lambda m, args: seen.__setitem__("mixed", args[0])),
    ]
    weights = temporal_attention(handle, toy_inputs(), clip=clip)
    for hook in hooks:
        hook.remove()
    frames, positions = CLIPS[clip]
    assert list(weights) == [0, 1, 2]
    assert weights[1].shape == (2, positions, frames, frames)
    np.testing.assert_allclose(weights[1].sum(-1), 1, atol=1e-6)
    start = sum(t * n for t, n in CLIPS[:clip])
    stop = start + frames * positions
    values = seen["qkv"][start:stop].view(frames, positions, 3, 2, 8)[:, :, 2]
    mixed = torch.einsum("hnts,snhd->tnhd", torch.from_numpy(weights[1]), values).reshape(frames * positions, 16)
    assert torch.allclose(mixed, seen["mixed"][start:stop], atol=1e-5)
    assert not toy.blocks[0].sta._forward_pre_hooks


@pytest.mark.parametrize("order", ["after_spatial", "before_spatial"])
@pytest.mark.parametrize("token_order", ["clip", "published"])
@pytest.mark.parametrize("clip", [0, 1, 2])
def test_arrays_are_what_the_forward_did(variant, order, token_order, clip):
    encoder, spec = ToyEncoder(), variant(published_token_order=True)
    handle = injected(encoder, spec, head_scale=1.0, order=order, token_order=token_order)
    inputs, streams = toy_inputs(), {}
    for index, module in handle.blocks.items():
        module.register_forward_hook(
            lambda m, args, out, index=index: streams.update({index: (args[0].clone(), out.clone())})
        )
    hooks = hook_count(encoder)
    seen = observe(handle, inputs, clip=clip)
    assert hook_count(encoder) == hooks
    frames, positions = CLIPS[clip]
    span = slice(start := sum(t * n for t, n in CLIPS[:clip]), start + frames * positions)
    assert seen.blocks == (0, 1, 2)
    assert seen.attention.shape == (3, 2, frames, frames)
    assert seen.crossing.shape == seen.branch.shape == (3, frames, positions)
    for row, (stream, branch) in enumerate(streams.values()):
        ratio = branch[span].norm(dim=1) / stream[span].norm(dim=1)
        np.testing.assert_allclose(seen.branch[row], ratio.view(frames, positions).numpy(), rtol=1e-5)
    with torch.no_grad():
        after = encoder(**inputs)[span]
        with handle.disabled():
            before = encoder(**inputs)[span]
    change = (after - before).norm(dim=1) / before.norm(dim=1)
    np.testing.assert_allclose(seen.change, change.view(frames, positions).numpy(), rtol=1e-4)
    assert seen.lands_elsewhere == (token_order == "published" and clip == 0)
    weights = temporal_attention(handle, inputs, clip=clip)
    crossing, sizes = crossing_map(handle, inputs, clip=clip), branch_sizes(handle, inputs, clip=clip)
    for row, block in enumerate(seen.blocks):
        np.testing.assert_allclose(seen.attention[row], weights[block].mean(1), atol=1e-6)
        np.testing.assert_allclose(seen.crossing[row], crossing[block], atol=1e-6)
        np.testing.assert_array_equal(seen.branch[row], sizes[block])
        by_hand = [[1 - weights[block][:, n, t, t].mean() for n in range(positions)] for t in range(frames)]
        np.testing.assert_allclose(seen.crossing[row], by_hand, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_that_is_even_crosses_as_told(toy, causal):  # noqa: F811
    handle = injected(toy, causal=causal)
    for module in handle.blocks.values():
        torch.nn.init.zeros_(module.to_qkv.weight)
        torch.nn.init.zeros_(module.to_qkv.bias)
    seen = observe(handle, toy_inputs(), clip=2)
    np.testing.assert_allclose(seen.crossing, np.broadcast_to(seen.even[:, None], (3, 5, 1)), atol=1e-6)
    np.testing.assert_allclose(seen.even, [0, 1 / 2, 2 / 3, 3 / 4, 4 / 5] if causal else [0.8] * 5, atol=1e-6)


def test_what_crosses_is_told_against_even_spread():
    """Also where a frame may look at itself alone, as the first one under causal attention; by it nothing is divided."""
    seen = Observation(
        blocks=(0,),
        attention=np.array([[[[1, 0], [0.25, 0.75]]]], np.float32),
        crossing=np.array([[[0, 0, 0], [0.25, 0.5, 0.75]]], np.float32),
        branch=np.zeros((1, 2, 3), np.float32),
        change=np.zeros((2, 3), np.float32),
        even=np.array([0, 0.5], np.float32),
        positions=None,
        no_picture="unknown",
        lands_elsewhere=False,
    )
    with np.errstate(all="raise"):
        np.testing.assert_array_equal(seen.relative_crossing, [[[1, 1, 1], [0.5, 1, 1.5]]])
        np.testing.assert_array_equal(seen.relative, [[[[1, np.nan], [0.5, 1.5]]]])


def test_untrained_sta_adds_and_changes_nothing(toy):  # noqa: F811
    seen = observe(inject_sta(toy), toy_inputs())
    assert not seen.branch.any()
    assert not seen.change.any()


def test_a_clip_that_is_not_there(toy):  # noqa: F811
    handle = inject_sta(toy)
    for look in (temporal_attention, observe):
        with pytest.raises(LayoutError, match="clip 3 was asked for; the inputs hold 3"):
            look(handle, toy_inputs(), clip=3)


def test_sta_that_is_off_or_gone(toy):  # noqa: F811
    handle = inject_sta(toy)
    handle.disable()
    with pytest.raises(ConfigError, match=r"switched off.*handle\.enable"):
        observe(handle, toy_inputs())
    handle.remove()
    with pytest.raises(ConfigError, match="has been removed"):
        temporal_attention(handle, toy_inputs())


def test_an_encoder_without_declared_positions(toy):  # noqa: F811
    seen = observe(inject_sta(toy), toy_inputs())
    assert seen.positions is None
    assert "'toy' does not declare" in seen.no_picture
    with pytest.raises(LayoutError, match="'toy' does not declare"):
        seen.on_picture(seen.change)


def test_clips_are_counted_over_calls_of_the_encoder(toy):  # noqa: F811
    class Twice(torch.nn.Module):  # pictures, then videos, as full models do
        def __init__(self):
            super().__init__()
            self.encoder = toy

        def forward(self, pictures, videos):
            return self.encoder(**pictures), self.encoder(**videos)

    model = Twice()
    handle = injected(model)
    pictures = {"pixels": toy_pixels([(1, 3)], seed=5), "clips": ((1, 3),)}
    seen = observe(handle, {"pictures": pictures, "videos": toy_inputs()}, clip=3)
    handle.model = toy
    alone = observe(handle, toy_inputs(), clip=2)
    handle.model = model
    np.testing.assert_array_equal(seen.attention, alone.attention)
    np.testing.assert_array_equal(seen.change, alone.change)
    with pytest.raises(LayoutError, match="the inputs hold 4"):
        observe(handle, {"pictures": pictures, "videos": toy_inputs()}, clip=4)


def test_the_check_of_a_first_call_is_not_observed(variant):
    handle = injected(ToyEncoder(), backbone=variant(dummy_inputs=None))
    first, second = observe(handle, toy_inputs()), observe(handle, toy_inputs())
    for name in ("attention", "crossing", "branch", "change"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


def test_other_threads_are_not_seen(toy):  # noqa: F811
    handle = injected(toy)
    alone = observe(handle, toy_inputs())
    other = {"pixels": toy_pixels(((6, 7),), seed=3), "clips": ((6, 7),)}

    def meanwhile(block, args):
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=lambda: toy(**other))
            thread.start()
            thread.join()

    toy.blocks[1].register_forward_pre_hook(meanwhile)
    seen = observe(handle, toy_inputs())
    for name in ("attention", "crossing", "branch", "change"):
        np.testing.assert_array_equal(getattr(seen, name), getattr(alone, name))


def test_a_declaration_that_does_not_fit_is_not_used(variant):
    wrong = variant(positions=lambda call, layout: [torch.zeros(1, 2).long()] * 3)
    seen = observe(inject_sta(ToyEncoder(), backbone=wrong), toy_inputs())
    assert seen.positions is None
    assert "don't fit 2 positions" in seen.no_picture


# ---- every backbone


def told(handle, case, clips):
    return handle.clips([c.frames for c in clips]) if case.tell_clips else contextlib.nullcontext()


@pytest.mark.parametrize("case", case_parameters(lambda case: case.generate is None))
def test_every_encoder_can_be_observed(case):
    model = case.make()
    handle = inject_sta(model)
    for module in handle.blocks.values():
        randomize(module)
    lengths = (3, 3) if (2, 5, 1) not in case.lengths else (2, 5, 1)
    clips = clips_of(*lengths)
    get_sta(model).model = case.encoder(model)
    with told(handle, case, clips):
        seen = observe(handle, case.arguments(clips), clip=1)
    frames = lengths[1]
    blocks, _, t, s = seen.attention.shape
    assert (blocks, t, s) == (len(handle.blocks), frames, frames)
    np.testing.assert_allclose(seen.attention.sum(-1), 1, atol=1e-5)
    assert (seen.crossing >= 0).all()
    assert (seen.crossing <= 1).all()
    assert (seen.branch > 0).all()
    assert (seen.change > 0).all()
    assert np.isfinite(seen.change).all()
    rows, columns = seen.positions.shape
    assert rows * columns <= seen.crossing.shape[-1]
    assert seen.on_picture(seen.crossing).shape == (blocks, frames, rows, columns)
