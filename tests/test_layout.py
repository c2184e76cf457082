"""ClipLayout: which token is which frame's and which position's."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sta_adapter import ClipLayout
from sta_adapter.attention.layout import checked_lengths
from sta_adapter.errors import LayoutError

clips = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 5)), min_size=1, max_size=5)
cpu = torch.device("cpu")


def places(layout):
    """(clip, frame, position) of each token, written out."""
    return [
        (c, f, p) for c, (frames, positions) in enumerate(layout.clips) for f in range(frames) for p in range(positions)
    ]


@given(clips)
def test_counts(pairs):
    layout = ClipLayout(pairs)
    assert layout.num_tokens == len(places(layout))
    assert layout.max_frames == max(t for t, _ in pairs)
    assert layout.is_uniform == (len(set(pairs)) == 1)


@given(clips)
def test_gather_brings_equal_lengths_together_and_scatter_undoes_it(pairs):
    layout = ClipLayout(pairs)
    tokens = places(layout)
    gathered = [tokens[i] for i in layout.gather_index(cpu)]
    start = 0
    for frames, positions in layout.groups:
        group = gathered[start : start + frames * positions]
        start += frames * positions
        for position in range(positions):
            sequence = group[position::positions]
            assert [frame for _, frame, _ in sequence] == list(range(frames))
            assert len({(clip, place) for clip, _, place in sequence}) == 1
    assert [gathered[i] for i in layout.scatter_index(cpu)] == tokens


@given(clips)
def test_batches_are_whole_clips_of_one_length(pairs):
    layout = ClipLayout(pairs)
    tokens = places(layout)
    if layout.is_gathered:
        tokens = [tokens[i] for i in layout.gather_index(cpu)]
    start = 0
    for count, frames, positions in layout.batches:
        for _ in range(count):
            clip = tokens[start : start + frames * positions]
            start += frames * positions
            for position in range(positions):
                sequence = clip[position::positions]
                assert [frame for _, frame, _ in sequence] == list(range(frames))
                assert len({(clip, place) for clip, _, place in sequence}) == 1
                assert {pairs[clip][0] for clip, _, _ in sequence} == {frames}
    assert start == len(tokens)


@pytest.mark.parametrize(
    ("pairs", "batches", "is_gathered"),
    [
        ([(2, 3), (2, 3), (4, 5)], [(2, 2, 3), (1, 4, 5)], False),
        ([(1, 3), (1, 4), (2, 5)], [(1, 1, 7), (1, 2, 5)], False),
        ([(2, 3), (2, 4)], [(1, 2, 7)], True),
        ([(2, 3), (4, 3), (2, 3)], [(1, 2, 6), (1, 4, 3)], True),
    ],
    ids=["neighbours", "pictures", "sizes", "apart"],
)
def test_only_clips_of_a_length_that_lie_apart_are_brought_together(pairs, batches, is_gathered):
    layout = ClipLayout(pairs)
    assert (layout.batches, layout.is_gathered) == (batches, is_gathered)


@given(clips)
def test_published_order_swaps_frames_and_positions_within_each_clip(pairs):
    layout = ClipLayout(pairs)
    tokens = places(layout)
    expected = [
        (c, f, p) for c, (frames, positions) in enumerate(pairs) for p in range(positions) for f in range(frames)
    ]
    assert [tokens[i] for i in layout.published_index(cpu)] == expected


@given(clips)
def test_single_frames(pairs):
    layout = ClipLayout(pairs)
    assert layout.single_frame_mask(cpu)[:, 0].tolist() == [pairs[c][0] == 1 for c, _, _ in places(layout)]


def test_patches_leave_class_tokens_out():
    tokens = torch.arange(2 * 7 * 3).view(2, 7, 3)
    layout = ClipLayout([(2, 3), (2, 3)], prefix=1)
    assert torch.equal(layout.patches(tokens), tokens[:, 1:])
    assert layout.patches(tokens).data_ptr() == tokens[:, 1:].data_ptr()
    behind = ClipLayout([(2, 2)], prefix=1, suffix=2)
    assert torch.equal(behind.patches(tokens[:, :5]), tokens[:, 1:3])
    assert torch.equal(behind.patches(torch.arange(7)[:, None])[:, 0], torch.arange(1, 5))
    with pytest.raises(LayoutError, match=r"with 3 class tokens a row, have 4 tokens"):
        behind.patches(tokens)


def test_wrong_number_of_tokens():
    with pytest.raises(LayoutError, match=r"shape \(5, 3\).*\[\(2, 3\)\].*have 6 tokens"):
        ClipLayout([(2, 3)]).patches(torch.zeros(5, 3))


def test_rows_that_do_not_come_first():
    layout = ClipLayout([(2, 3), (2, 3)], rows=4)
    assert layout.patches(torch.zeros(4, 3, 5)).shape == (4, 3, 5)
    assert layout.patches(torch.zeros(12, 5)).shape == (12, 5)
    with pytest.raises(LayoutError, match=r"shape \(3, 4, 5\); expected \(4 rows, tokens, C\).*batch_first=False"):
        layout.patches(torch.zeros(3, 4, 5))


@pytest.mark.parametrize("pair", [(0, 4), (3, 0), (-1, 2)])
def test_empty_clips(pair):
    with pytest.raises(LayoutError, match=r"clip 1 has .* expected at least 1"):
        ClipLayout([(2, 2), pair])


def test_equality_and_hash():
    assert ClipLayout([(2, 3)]) == ClipLayout([[2, 3]])
    assert hash(ClipLayout([(2, 3)])) == hash(ClipLayout([(2, 3)]))
    assert ClipLayout([(2, 3)]) != ClipLayout([(2, 3)], prefix=1)
    assert repr(ClipLayout([(2, 3)])) == "ClipLayout([(2, 3)], prefix=0)"
    assert ClipLayout([(2, 3)], suffix=1) != ClipLayout([(2, 3)])
    assert repr(ClipLayout([(2, 3)], suffix=1)) == "ClipLayout([(2, 3)], prefix=0, suffix=1)"


def test_rotary_tables_are_those_of_the_equation():
    cos, sin = ClipLayout([(5, 1)]).rotary_tables(8, 100.0, torch.zeros(0))
    for frame in range(5):
        for pair in range(4):
            angle = torch.tensor(frame * 100.0 ** (-2 * pair / 8))
            for half, sign in ((pair, -1), (pair + 4, 1)):
                assert cos[frame, half].item() == pytest.approx(angle.cos().item(), abs=1e-6)
                assert sin[frame, half].item() == pytest.approx(sign * angle.sin().item(), abs=1e-6)


def test_tables_are_where_and_of_what_dtype_they_are_asked_for():
    layout, meta = ClipLayout([(2, 3), (1, 2)]), torch.device("meta")
    for index in (layout.gather_index, layout.scatter_index, layout.published_index, layout.single_frame_mask):
        assert index(cpu).device.type == "cpu"
        assert index(meta).device.type == "meta"
        assert index(cpu) is index(cpu)
    for like in (torch.zeros(0, dtype=torch.bfloat16), torch.zeros(0, dtype=torch.float64, device=meta)):
        for table in layout.rotary_tables(8, 100.0, like):
            assert (table.device, table.dtype, table.shape) == (like.device, like.dtype, (2, 8))


@pytest.mark.parametrize("lengths", [[1], (3, 2), [4.0], torch.tensor([2, 5])], ids=str)
def test_clip_lengths(lengths):
    assert checked_lengths(lengths) == tuple(int(n) for n in lengths)


def test_tables_of_a_layout_that_is_kept_serve_a_training_too():
    layout = ClipLayout([(2, 3), (1, 2)])
    with torch.inference_mode():
        tables = [*layout.rotary_tables(8, 100.0, torch.zeros(0)), layout.gather_index(cpu), layout.scatter_index(cpu)]
        tables += [layout.published_index(cpu), layout.single_frame_mask(cpu)]
    assert not any(table.is_inference() for table in tables)


BAD_LENGTHS = [
    [],
    [0],
    [2, -1],
    [1.5],
    "12",
    ["a"],
    [None],
    3,
    [float("inf")],
    [True, True],
    torch.tensor([True]),
    b"12",
    {2: 1, 4: 1},
    {2, 4},
    torch.tensor(4),
    torch.tensor([[2, 2]]),
]


@pytest.mark.parametrize("lengths", BAD_LENGTHS, ids=repr)
def test_clip_lengths_that_are_none(lengths):
    with pytest.raises(LayoutError, match=f"clip lengths {re.escape(repr(lengths))}: expected the number of frames"):
        checked_lengths(lengths)


def test_no_clips_at_all():
    layout = ClipLayout([])
    assert (layout.num_tokens, layout.max_frames, layout.groups, layout.is_uniform) == (0, 0, (), True)
