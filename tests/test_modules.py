"""TemporalAttention on its own: each setting against the equations, written out; what its arguments become."""

import pytest
import torch
from test_fast_path import branch, far, written_out

from sta_adapter import ClipLayout, STAConfig, TemporalAttention
from sta_adapter.errors import ConfigError, LayoutError

EQUAL, UNEQUAL, STILLS = [(3, 2)] * 2, [(1, 2), (4, 3), (2, 1)], [(1, 4), (1, 4)]
LAYOUTS = pytest.mark.parametrize("clips", [EQUAL, UNEQUAL, STILLS], ids=["equal", "unequal", "stills"])


def both(clips, **config):
    """(what the branch gives, what the equations give in float64) for tokens of three axes."""
    module, layout = branch(**config), ClipLayout(clips)
    tokens = torch.randn(layout.num_tokens, 24)
    expected = written_out(branch(**config).double(), tokens.double(), clips)
    return module(tokens[None], layout)[0], expected


@LAYOUTS
@pytest.mark.parametrize("theta", [100.0, None])
@pytest.mark.parametrize("causal", [False, True])
def test_settings_against_the_equations(clips, theta, causal):
    found, expected = both(clips, rope_theta=theta, causal=causal)
    assert far(found, expected) < 1e-5


@LAYOUTS
def test_published_order(clips):
    """Output (position, frame) by (position, frame) lands on the tokens (frame, position) by (frame, position)."""
    found, _ = both(clips, token_order="published")
    plain, _ = both(clips)
    start = 0
    for frames, positions in clips:
        rows = plain[start : start + frames * positions].view(frames, positions, -1).transpose(0, 1).flatten(0, 1)
        assert torch.allclose(found[start : start + frames * positions], rows, atol=1e-5)
        start += frames * positions


@LAYOUTS
def test_stills_pass_by_when_asked_to(clips):
    found, expected = both(clips, single_frames=False)
    still = torch.cat([torch.full((frames * positions,), frames == 1) for frames, positions in clips])
    expected = expected.masked_fill(still[:, None], 0)
    assert torch.equal(found[still], torch.zeros_like(found[still]))
    assert torch.allclose(found.double(), expected, atol=1e-4)


@pytest.mark.parametrize("tokens", [5, 12])
def test_other_tokens_than_the_layout_has_are_an_error(tokens):
    with pytest.raises(LayoutError, match=rf"\({tokens}, 24\) tokens, expected the 6 of ClipLayout\(\[\(2, 3\)\]"):
        branch()(torch.randn(tokens, 24), ClipLayout([(2, 3)]))


def test_gamma_scales_the_branch():
    found, expected = both(UNEQUAL, gamma_init=0.5)
    assert far(found, expected * branch(gamma_init=0.5).gamma.double()) < 1e-5


@LAYOUTS
@pytest.mark.parametrize("token_order", ["clip", "published"])
@pytest.mark.parametrize("single_frames", [True, False])
def test_prepare_makes_every_table_that_forward_needs(clips, token_order, single_frames):
    module, layout = branch(token_order=token_order, single_frames=single_frames), ClipLayout(clips)
    module.prepare(layout)
    prepared = set(layout._tables)
    module(torch.randn(layout.num_tokens, 24), layout)
    assert set(layout._tables) == prepared
    assert all(table.device == torch.device("cpu") for tables in layout._tables.values() for table in tables)


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_arguments(norm):
    module = TemporalAttention(
        24, 3, 8, STAConfig(gamma_init=0.25, rope_theta=None), norm=norm, norm_eps=1e-3, qkv_bias=False, device="meta",
        dtype=torch.bfloat16,
    )  # fmt: skip
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.bfloat16)}
    assert type(module.norm) is {"layernorm": torch.nn.LayerNorm, "rmsnorm": torch.nn.RMSNorm}[norm]
    assert module.norm.eps == 1e-3
    assert module.to_qkv.bias is None
    assert module.to_qkv.weight.shape == (72, 24)
    assert module.to_out.weight.shape == (24, 24)
    assert module.to_out.bias is not None
    assert module.gamma.shape == (24,)


def test_defaults():
    module = TemporalAttention(24, 3, 8, STAConfig())
    assert type(module.norm) is torch.nn.LayerNorm
    assert module.norm.eps == 1e-6
    assert module.to_qkv.bias is not None
    assert module.gamma is None
    assert module.recompute is False


@pytest.mark.parametrize("init", ["zero", "normal"])
def test_initial_values(init):
    module = TemporalAttention(128, 4, 64, STAConfig(init=init, gamma_init=0.25))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(7.0)
    module.reset_parameters()
    assert module.norm.weight.eq(1).all()
    assert module.norm.bias.eq(0).all()
    assert module.to_qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert module.to_out.weight.std().item() == pytest.approx(0.02 if init == "normal" else 0.0, rel=0.05)
    assert module.to_qkv.bias.eq(0).all()
    assert module.to_out.bias.eq(0).all()
    assert module.gamma.eq(0.25).all()


def test_rope_needs_an_even_head_size():
    with pytest.raises(ConfigError, match="even head size, this encoder's is 7; set rope_theta=None"):
        TemporalAttention(14, 2, 7, STAConfig())
    assert TemporalAttention(14, 2, 7, STAConfig(rope_theta=None)).head_dim == 7
