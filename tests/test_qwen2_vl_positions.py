"""The switch to Qwen2-VL's original text positions, against a plain account of the rule of transformers 4.45.2."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import make_qwen2_vl
from hypothesis import given, settings
from hypothesis import strategies as st
from qwen2_vl_prompts import (
    END,
    NATIVE,
    START,
    VIDEO,
    batch_of,
    check_positions,
    needs_seams,
    rows_of_prompts,
    transformers_version,
)

from sta_adapter.backbones.qwen2_vl_positions import find_owner, restore_original_positions, undo_original_positions
from sta_adapter.errors import InjectionError, LayoutError

sides = st.sampled_from(["left", "right"])
NAMES = ("input_ids", "attention_mask", "image_grid_thw", "video_grid_thw", "mm_token_type_ids")


@pytest.fixture(scope="module")
def plain():
    return make_qwen2_vl().eval()


@pytest.fixture
def owner(plain):
    """The module with `get_rope_index`."""
    yield find_owner(plain)
    undo_original_positions(plain)


def rope_index(owner, batch):
    return owner.get_rope_index(**{name: batch[name] for name in NAMES if name in batch})


@pytest.mark.skipif(
    transformers_version() >= (5, 2), reason="5.2 counts padding otherwise, later ones have another rule"
)
@settings(max_examples=30)
@given(rows=rows_of_prompts, side=sides)
def test_the_reference_is_the_rule_of_transformers_4(plain, rows, side):
    owner = plain if hasattr(plain, "get_rope_index") else plain.model
    batch = batch_of(*rows, side=side, pixels=False)
    check_positions(rows, batch, rope_index(owner, batch), scale=None)


@needs_seams
@settings(max_examples=30)
@given(rows=rows_of_prompts, side=sides)
def test_restored_positions_are_the_original_ones(plain, owner, rows, side):
    undo_original_positions(plain)
    restore_original_positions(plain)
    batch = batch_of(*rows, side=side, pixels=False)
    check_positions(rows, batch, rope_index(owner, batch), scale=None)


@needs_seams
def test_outputs_differ_from_stock_only_where_transformers_departed(plain, owner):
    long_clip, wide_clip = batch_of([(2,), (6, 1, 2), (3,)]), batch_of([(2,), (2, 2, 3), (3,)])
    with torch.no_grad():
        stock = [plain(**batch).logits for batch in (long_clip, wide_clip)]
        assert restore_original_positions(plain) is plain
        restored = [plain(**batch).logits for batch in (long_clip, wide_clip)]
        undo_original_positions(plain)
        again = plain(**long_clip).logits
    assert torch.equal(stock[0], restored[0]) is (transformers_version() < (5, 3))
    assert torch.equal(stock[1], restored[1]) is (NATIVE != "unknown")
    assert torch.equal(stock[0], again)


@needs_seams
def test_undo_leaves_no_trace_and_may_be_repeated(plain, owner):
    before = {name: set(vars(module)) for name, module in plain.named_modules()}
    restore_original_positions(plain)
    undo_original_positions(plain)
    undo_original_positions(plain)
    assert before == {name: set(vars(module)) for name, module in plain.named_modules()}
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in plain.modules())


@needs_seams
def test_a_copy_is_independent(plain, owner):
    restore_original_positions(plain)
    twin = copy.deepcopy(plain)
    undo_original_positions(plain)
    batch = batch_of([(2,), (6, 1, 2), (3,)])
    assert int(find_owner(twin).get_rope_index(**batch)[0].max()) == 12
    assert find_owner(twin).get_rope_index.config is twin.model.config


@needs_seams
def test_restoring_twice_is_an_error(plain, owner):
    restore_original_positions(plain)
    with pytest.raises(InjectionError, match=r"follow OriginalPositions\(\) already"):
        restore_original_positions(plain)


@needs_seams
def test_clips_without_tokens_between_them(plain, owner):
    restore_original_positions(plain)
    ids = torch.tensor([[START, *[VIDEO] * 6, END]])
    positions, deltas = owner.get_rope_index(ids, video_grid_thw=torch.tensor([[2, 2, 4], [1, 2, 4]]))
    assert positions[0, 0].tolist() == [0, 1, 1, 2, 2, 3, 3, 5]
    assert deltas.tolist() == [[-2]]


@needs_seams
@pytest.mark.parametrize(
    ("grid", "message"),
    [
        pytest.param([[3, 2, 4]], "holds 4 video tokens where video_grid_thw tells of 6", id="too-few-tokens"),
        pytest.param([[1, 2, 4]], "holds 2 video tokens where video_grid_thw tells of none", id="too-few-clips"),
        pytest.param([[2, 2, 4], [1, 2, 2]], "describes more videos than there are tokens", id="too-many-clips"),
    ],
)
def test_tokens_and_grids_must_agree(plain, owner, grid, message):
    restore_original_positions(plain)
    with pytest.raises(LayoutError, match=message):
        owner.get_rope_index(torch.tensor([[START, *[VIDEO] * 4, END]]), video_grid_thw=torch.tensor(grid))


@needs_seams
def test_positions_of_a_clip_need_the_tokens(plain, owner):
    restore_original_positions(plain)
    embeddings = torch.randn(1, 6, 32)
    with pytest.raises(LayoutError, match="can't be known without input_ids"):
        owner(inputs_embeds=embeddings, video_grid_thw=torch.tensor([[2, 2, 4]]))
    with pytest.raises(LayoutError, match=r"need an attention_mask of the shape \(batch, tokens\)"):
        owner(input_ids=torch.ones(1, 6, dtype=torch.long), attention_mask=torch.ones(1, 1, 6, 6))
