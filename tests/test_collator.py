"""Batches of samples of unequal length, on plain tensors."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sta_adapter.data import BadSample, Collator
from sta_adapter.data.chat_encoding import IGNORE
from sta_adapter.data.clip_batches import missing_frames, put_together, row_lengths, split_unequal
from sta_adapter.data.message import Visual

LONG = {"input_ids": torch.tensor([5, 6, 7]), "labels": torch.tensor([IGNORE, 6, 7])}
SHORT = {"input_ids": torch.tensor([8]), "labels": torch.tensor([8]), "token_type_ids": torch.tensor([1])}


@pytest.mark.parametrize("side", ["right", "left"])
def test_shorter_samples_are_filled_up_on_one_side(side):
    def turned(row):
        return row if side == "right" else row[::-1]

    batch = Collator(9, side=side)([LONG, SHORT])
    assert batch["input_ids"].tolist() == [[5, 6, 7], turned([8, 9, 9])]
    assert batch["labels"].tolist() == [[IGNORE, 6, 7], turned([8, IGNORE, IGNORE])]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], turned([1, 0, 0])]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0], turned([1, 0, 0])]
    assert batch["bad_samples"] == []


@pytest.mark.parametrize(("pad", "eos", "expected"), [(4, 3, 4), (0, 3, 0), (None, 3, 3), (None, None, 0)])
def test_what_fills_up_is_the_tokenizers(pad, eos, expected):
    collator = Collator.of(SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=pad, eos_token_id=eos)))
    assert (collator.pad_id, collator.side) == (expected, "right")


def test_nothing_usable_is_nothing_to_learn():
    batch = Collator(9)([BadSample("line 3", "gone")])
    assert batch.pop("bad_samples") == ["line 3: gone"]
    assert {key: value.tolist() for key, value in batch.items()} == {"labels": [[IGNORE]]}


def test_what_is_shared_may_be_of_several_types():
    values = [torch.ones(1, 2), torch.ones(2, 2, dtype=torch.float64)]
    assert torch.equal(put_together("x", values, shared=True), torch.ones(3, 2, dtype=torch.float64))


# ---- clips and pictures of unequal sizes


def visual(kind, frames, edge=8):
    return Visual(kind, np.zeros((frames, edge, edge, 3), np.uint8))


def test_shorter_clips_are_filled_up_with_frames_that_are_none_and_pictures_with_black_tiles():
    short, long = torch.ones(1, 2, 3, 4, 4), torch.ones(2, 3, 3, 4, 4)
    clips = put_together("pixel_values_videos", [short, long])
    assert missing_frames(clips).tolist() == [[False, False, True], [False] * 3, [False] * 3]
    tiles = put_together("pixel_values", [short, long])
    assert tiles.shape == (3, 3, 3, 4, 4)
    assert tiles.sum() == short.sum() + long.sum()


def test_clips_of_unequal_lengths_alone_are_taken_one_by_one():
    processor = SimpleNamespace(
        video_processor=object(),
        image_token="<i>",
        video_token="<v>",
        tokenizer=lambda text, **_: {"input_ids": list(text)},
    )
    text, picture = "<v>and<i>then<v>?", visual("image", 1, edge=9)
    even = [visual("video", 2), picture, visual("video", 2)]
    assert split_unequal(processor, text, even) == [(text, even)]
    odd = [visual("video", 2), picture, visual("video", 3)]
    assert split_unequal(processor, text, odd) == [("<v>and<i>then", odd[:2]), ("<v>?", odd[2:])]


def test_rows_are_the_frames_of_clips_and_the_tiles_of_pictures():
    processor = SimpleNamespace(image_seq_length=4, image_token_id=7)
    ids = torch.tensor([*[7] * 8, 1, *[7] * 4, 1, *[7] * 4])  # two tiles, two frames
    encoded = {"pixel_values": torch.zeros(4, 3, 8, 8), "input_ids": ids}
    lengths = row_lengths(processor, encoded, [visual("image", 1), visual("video", 2)])["clip_lengths"]
    assert lengths.tolist() == [1, 1, 2]
    assert not lengths.is_floating_point()
