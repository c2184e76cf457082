"""Batches of samples of unequal length, on plain tensors."""

from types import SimpleNamespace

import pytest
import torch

from sta_adapter.data import BadSample, Collator
from sta_adapter.data.chat_encoding import IGNORE

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
