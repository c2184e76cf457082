"""temporal_attention: the weights are those that the branch used."""

import numpy as np
import pytest
import torch
from cases import randomize
from toy import toy, toy_pixels  # noqa: F401

from sta_adapter import STAConfig, inject_sta
from sta_adapter.errors import LayoutError
from sta_adapter.visualization import temporal_attention

CLIPS = ((4, 2), (1, 3), (5, 1))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("theta", [None, 30.0])
@pytest.mark.parametrize("clip", [0, 1, 2])
def test_weights_reproduce_the_branch(toy, causal, theta, clip):  # noqa: F811
    handle = inject_sta(toy, STAConfig(head_scale=1.0, causal=causal, rope_theta=theta))
    for module in handle.blocks.values():
        randomize(module)
    inputs = {"pixels": toy_pixels(CLIPS), "clips": CLIPS}
    seen = {}
    module = handle.blocks[1]
    hooks = [
        module.to_qkv.register_forward_hook(lambda m, args, out: seen.__setitem__("qkv", out)),
        module.to_out.register_forward_pre_hook(lambda m, args: seen.__setitem__("mixed", args[0])),
    ]
    weights = temporal_attention(handle, inputs, clip=clip)
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


def test_a_clip_that_is_not_there(toy):  # noqa: F811
    handle = inject_sta(toy)
    with pytest.raises(LayoutError, match="clip 3 was asked for; the inputs hold 3"):
        temporal_attention(handle, {"pixels": toy_pixels(CLIPS), "clips": CLIPS}, clip=3)
