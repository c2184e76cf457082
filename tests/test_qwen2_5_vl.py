"""Qwen2.5-VL's windows: the tower reorders its tokens, and STA still mixes each position over the frames."""

import pytest
import torch
from cases import lacks, randomize, seeded
from cases_transformers import tiny

from sta_adapter import inject_sta
from sta_adapter.injection.backbone import EncoderCall
from sta_adapter.injection.registry import get_backbone

pytestmark = lacks("qwen2_5_vl")
WINDOW = 3  # merged tokens on a window's side, in the tiny tower
GRIDS = {
    "windows divide the grid": [(3, 12, 12)],
    "windows don't divide rows and columns": [(4, 8, 10)],
    "a frame within one window": [(3, 4, 6)],
    "one row of windows": [(2, 2, 14)],
    "clips of different grids": [(2, 8, 8), (5, 4, 10), (1, 10, 8), (2, 6, 6)],
}
every_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)


def pixels_of(grid, seed=0):
    """Packed patches of noise."""
    return torch.randn(sum(t * h * w for t, h, w in grid), 96, generator=torch.Generator().manual_seed(seed))


def permutation(tower, grid):
    """Where each of the blocks' tokens (tokens,) stood in the packed input, read off a mark in the embeddings."""
    seen = []

    def mark(module, args, output):
        return torch.arange(len(output), dtype=output.dtype)[:, None].expand_as(output).clone()

    hooks = [
        tower.patch_embed.register_forward_hook(mark),
        tower.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0][:, 0].long())),
    ]
    with torch.no_grad():
        tower(pixels_of(grid), grid_thw=torch.tensor(grid))
    for hook in hooks:
        hook.remove()
    return seen[0]


def plain_branch(sta, tokens, frames):
    """The branch by its equations, for one clip (frames * positions, C) in the order of the packed input."""
    q, k, v = sta.to_qkv(sta.norm(tokens)).view(frames, -1, 3, sta.num_heads, sta.head_dim).unbind(2)
    angles = torch.arange(frames)[:, None] * 10000.0 ** (-torch.arange(0, sta.head_dim, 2) / sta.head_dim)

    def turn(x):
        left, right = x.chunk(2, dim=-1)
        cos, sin = angles.cos()[:, None, None], angles.sin()[:, None, None]
        return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)

    scores = torch.einsum("inhd,jnhd->nhij", turn(q), turn(k)) / sta.head_dim**0.5
    mixed = torch.einsum("nhij,jnhd->inhd", scores.softmax(-1), v)
    return sta.to_out(mixed.flatten(2)).flatten(0, 1)


def injected_tower():
    """The tiny tower with random STA, and its handle."""
    tower = seeded(lambda: tiny("qwen2_5_vl-tower"))
    handle = inject_sta(tower)
    for module in handle.blocks.values():
        randomize(module)
    return tower, handle


@every_grid
def test_the_branch_agrees_with_a_plain_reference_that_undoes_the_windows(grid):
    tower, handle = injected_tower()
    with handle.disabled():
        source = permutation(tower, grid)
    if any(h > 2 * WINDOW and w > 2 * WINDOW for _, h, w in grid):
        assert not torch.equal(source, torch.arange(len(source))), "this grid does not test a permutation"
    calls = []
    for module in handle.blocks.values():
        module.register_forward_hook(
            lambda module, args, output: calls.append((module, args[0].clone(), output.clone()))
        )
    with torch.no_grad():
        tower(pixels_of(grid), grid_thw=torch.tensor(grid))
        assert len(calls) == 3
        for sta, tokens, found in calls:
            packed = torch.empty_like(tokens)
            packed[source] = tokens
            clips = packed.split([t * h * w for t, h, w in grid])
            expected = torch.cat([plain_branch(sta, clip, t) for clip, (t, _, _) in zip(clips, grid, strict=True)])
            torch.testing.assert_close(found, expected[source], rtol=1e-5, atol=1e-5)


@every_grid
def test_in_one_block_a_patch_reaches_the_other_frames_at_its_own_position_alone(grid):
    tower, handle = injected_tower()
    with handle.disabled():
        source = permutation(tower, grid)
    sta = handle.blocks[0]
    tokens = torch.randn(len(source), 32, generator=torch.Generator().manual_seed(1))
    layout = handle.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    seen = []
    with torch.no_grad():
        tower(pixels_of(grid), grid_thw=torch.tensor(grid))
        layout.remove()
        t, h, w = grid[0]
        patch = h * w - 1  # the last position of the first frame
        changed = tokens.clone()
        changed[source == patch] += 1.0
        moved = (sta(changed, seen[0]) - sta(tokens, seen[0])).abs().amax(1) > 1e-7
    assert sorted(source[moved].tolist()) == [frame * h * w + patch for frame in range(t)]


def test_an_order_that_the_caller_has_passed_is_not_guessed():
    tower, spec = tiny("qwen2_5_vl-tower"), get_backbone("qwen2_5_vl")
    call = EncoderCall(tower, {"grid_thw": torch.tensor([(2, 4, 4), (1, 4, 4)]), "window_index": torch.arange(12)})
    assert spec.positions(call, spec.layout(call)) == [None, None]
