"""What encoders share that take frames as a batch of images: layouts, positions and dummy clips from their pixels."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh

from sta_adapter.attention.layout import ALL_ROWS
from sta_adapter.backbone import EncoderCall
from sta_adapter.backbones.frames import EACH_ROW, pixel_dummy, pixel_layout, pixel_positions, row_clips
from sta_adapter.errors import CompatibilityError, LayoutError
from sta_adapter.injection.backbone import number_of


def encoder(**config):
    """A module with a configuration, whose whole numbers come before its weights."""
    module = nn.Module()
    module.ids = nn.Parameter(torch.arange(3), requires_grad=False)
    module.weight = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    module.config = SimpleNamespace(**config)
    return module


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        (ALL_ROWS, [(4, 6)]),
        (EACH_ROW, [(1, 6)] * 4),
        ((3, 1), [(3, 6), (1, 6)]),
        (((1, 3), 1), [(1, 18), (1, 6)]),
        (((2, 2),), [(2, 12)]),
    ],
    ids=["one clip", "pictures", "told", "tiles", "tiled frames"],
)
def test_rows_of_the_batch(lengths, expected):
    layout = row_clips(4, 6, lengths)
    assert (list(layout.clips), layout.prefix, layout.rows) == (expected, 0, 4)
    assert row_clips(4, 6, lengths, prefix=2).prefix == 2


def test_several_rows_of_which_nobody_has_told():
    with pytest.raises(LayoutError, match="the encoder's 4 rows may be frames of one clip or separate pictures"):
        row_clips(4, 6, None)
    assert row_clips(1, 6, None).clips == ((1, 6),)
    assert row_clips(4, 6, None, must_be_told=False).clips == ((4, 6),)


def test_clips_must_add_up():
    with pytest.raises(LayoutError, match=r"got 4 rows, one a frame, but the clips \[\(2, 3\), 1\] have 7"):
        row_clips(4, 6, ((2, 3), 1))


@pytest.mark.parametrize("size", [4, (4, 8)], ids=["square", "oblong"])
def test_layout_and_positions_from_pixels(size):
    module = encoder(patch_size=size)
    call = EncoderCall(module, {"pixel_values": torch.zeros(2, 3, 8, 16)}, (2,))
    columns = 4 if size == 4 else 2
    layout = pixel_layout()(call)
    assert (list(layout.clips), layout.prefix) == ([(2, 2 * columns)], 1)
    assert pixel_layout(prefix=lambda encoder: 5)(call).prefix == 5
    assert pixel_layout(patch_size=lambda encoder: 2)(call).clips == ((2, 32),)
    assert [p.tolist() for p in pixel_positions(call, layout)] == [torch.arange(2 * columns).view(2, columns).tolist()]


@pytest.mark.parametrize("size", [None, "4", [], [4, 2.0], True], ids=str)
def test_a_size_that_is_none_is_named(size):
    with pytest.raises(CompatibilityError, match=r"SimpleNamespace has no size patch_size, but"):
        pixel_layout()(EncoderCall(encoder(patch_size=size), {"pixel_values": torch.zeros(1, 3, 8, 8)}))


@pytest.mark.parametrize("config", [{}, {"num_heads": None}, {"heads": 4.0}, {"num_heads": True}], ids=str)
def test_a_number_that_is_none_is_named(config):
    with pytest.raises(CompatibilityError, match="SimpleNamespace has no whole number num_heads or heads"):
        number_of(encoder(**config).config, "num_heads", "heads")
    assert number_of(encoder(**config).config, "num_heads", "heads", default=2) == 2
    assert number_of(encoder(heads=4, num_heads=8).config, "num_heads", "heads", default=2) == 8


@pytest.mark.parametrize("arguments", [{}, {"pixel_values": None}, {"pixel_values": torch.zeros(2, 9, 48)}])
def test_positions_without_pixels_are_not_known(arguments):
    call = EncoderCall(encoder(patch_size=4), arguments)
    assert pixel_positions(call, row_clips(2, 6, EACH_ROW)) == [None, None]


def test_pixels_of_another_shape():
    with pytest.raises(LayoutError, match=r"shape \(2, 9, 48\); expected \(frames, channels, height, width\)"):
        pixel_layout()(EncoderCall(encoder(patch_size=4), {"pixel_values": torch.zeros(2, 9, 48)}))


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        ({"image_size": 8}, (2, 3, 8, 8)),
        ({"image_size": (8, 4), "num_channels": 1}, (2, 1, 8, 4)),
    ],
    ids=["square", "oblong"],
)
def test_dummy_clips(config, shape):
    args, kwargs = pixel_dummy(encoder(**config))
    assert args == ()
    assert (kwargs["pixel_values"].shape, kwargs["pixel_values"].dtype) == (shape, torch.bfloat16)
    assert not kwargs["pixel_values"].any()


@pytest.mark.skipif(not hasattr(fsdp, "fully_shard"), reason="FSDP2 is torch's since 2.6")
def test_a_dummy_clip_is_no_shard_of_one():
    """Where the layer that takes the pixels is a unit of FSDP's own, `new_zeros` of its weight can't go into it."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        tower = nn.Sequential(nn.Conv2d(3, 2, 2))
        tower.config = SimpleNamespace(image_size=4)
        fsdp.fully_shard(tower[0], mesh=init_device_mesh("cpu", (1,)))
        assert tower(pixel_dummy(tower)[1]["pixel_values"]).shape == (2, 2, 3, 3)
    finally:
        torch.distributed.destroy_process_group()
