"""Encoded samples to one padded batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch.utils.data import get_worker_info

from sta_adapter.compatibility.processors import Processor
from sta_adapter.data.bad_sample import BadSample
from sta_adapter.data.chat_encoding import IGNORE, Loaded
from sta_adapter.data.clip_batches import PER_TOKEN, PIXELS, put_together, takes_one_kind
from sta_adapter.data.visual_processing import Encoded

T = TypeVar("T")

FILL = {**dict.fromkeys(PER_TOKEN, 0), "labels": IGNORE}  # what has one value a token, and what fills it up


class Collator:
    """Pad samples to one batch; bad samples are left out and named in `bad_samples`.

    Args:
        pad_id: what fills `input_ids`.
        side: "right" for training, "left" for generation.
        on_bad_sample: "skip" leaves out what makes no batch with the others, "error" raises.
        one_kind: whether the model takes either pictures or clips in one batch.
    """

    def __init__(
        self, pad_id: int, *, side: str = "right", on_bad_sample: str = "skip", one_kind: bool = False
    ) -> None:
        self.pad_id = pad_id
        self.side = side
        self.on_bad_sample = on_bad_sample
        self.one_kind = one_kind

    @classmethod
    def of(cls, processor: Processor, *, side: str = "right", on_bad_sample: str = "skip") -> Collator:
        """The collator for a processor's padding token."""
        tokenizer = processor.tokenizer
        pad_id = tokenizer.eos_token_id or 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        return cls(pad_id, side=side, on_bad_sample=on_bad_sample, one_kind=takes_one_kind(processor))

    def __call__(self, items: Sequence[Encoded | BadSample | None]) -> dict[str, object]:
        """Batch of `(B, L)` token tensors with `attention_mask`, and the clips' tensors one after the other.

        None is no sample. Without any usable sample there is no `input_ids` in it, and nothing to learn in `labels`.

        Raises:
            DataError: a sample makes no batch with the others, and `on_bad_sample` is "error".
        """
        found = self.of_one_batch([item for item in items if item is not None])
        good = [item for item in found if not isinstance(item, BadSample)]
        bad = [str(item) for item in found if isinstance(item, BadSample)]
        return {"bad_samples": bad, **(self._batch(good) if good else {"labels": torch.full((1, 1), IGNORE)})}

    def of_one_batch(self, items: Sequence[Encoded | BadSample]) -> list[Encoded | BadSample]:
        """As `sort_out`, and of a model that takes either pictures or clips in one forward the usual kind alone."""
        usual = _usual_kind(items)
        return [self._of_kind(item, usual) for item in self.sort_out(items)]

    def sort_out(self, items: Sequence[Encoded | BadSample]) -> list[Encoded | BadSample]:
        """The samples, with a `BadSample` (or, if `on_bad_sample` is "error", a DataError) for each that makes no batch with the others.

        Where their tensors differ in shape and can't be joined, those that are like most others stay.
        """
        good = [item for item in items if not isinstance(item, BadSample)]
        shapes = {} if self._joins(good) else _shapes(good)
        usual = {key: counts.most_common(1)[0][0] for key, counts in shapes.items()}
        found = [item if isinstance(item, BadSample) else _checked(item, usual) for item in items]
        for was, item in zip(items, found, strict=True):
            if item is not was and isinstance(item, BadSample):
                item.skipped(self.on_bad_sample)
        return found

    def _of_kind(self, item: Encoded | BadSample, usual: str) -> Encoded | BadSample:
        """The sample, if the model takes its pictures or clips along with the others of the batch."""
        if not self.one_kind or isinstance(item, BadSample) or pixels_key(item) in ("", usual):
            return item
        bad = BadSample(
            getattr(item, "source", Loaded.source),
            "it has pictures and others of its batch have clips, or the other way round, and this model takes one of them in "
            "a batch. Train with device_batch_size 1, or on files of one kind.",
        )
        return bad.skipped(self.on_bad_sample)

    def _joins(self, items: Sequence[Encoded]) -> bool:
        """Whether the samples make a batch; it is only tried where their shapes leave a doubt."""
        if all(len(shapes) == 1 for shapes in _shapes(items).values()):
            return True
        try:
            self._batch(items)
        except Exception:  # whatever a library says to it: which of them it is about is looked for next
            return False
        return True

    def _batch(self, items: Sequence[Encoded]) -> Encoded:
        batch: Encoded = {}
        fill = {**FILL, "input_ids": self.pad_id}
        for key in dict.fromkeys(key for item in items for key in item):
            if key in fill:
                rows = [item[key] if key in item else torch.zeros_like(item["input_ids"]) for item in items]
                batch[key] = padded(rows, fill[key], self.side)
            else:
                values = [item[key] for item in items if key in item]
                batch[key] = put_together(key, values, shared=get_worker_info() is not None)
        batch["attention_mask"] = padded([torch.ones_like(item["input_ids"]) for item in items], 0, self.side)
        return batch


def padded(rows: Sequence[torch.Tensor], fill: int, side: str) -> torch.Tensor:
    """Rows of tokens as one tensor (B, L), filled up on the "left" or "right" side."""
    longest, left = max(map(len, rows)), side == "left"
    gaps = [(longest - len(row), 0) if left else (0, longest - len(row)) for row in rows]
    pad = torch.nn.functional.pad
    return torch.stack([pad(row, gap, value=fill) for row, gap in zip(rows, gaps, strict=True)])


def uncollated(item: T) -> T:
    """Of a `DataLoader` that gives samples as they are."""
    return item


def pixels_key(item: Encoded) -> str:
    """Gives "pixel_values" of a sample with pictures, "pixel_values_videos" of one with clips, "" of text alone."""
    return next((key for key in PIXELS if key in item), "")


def _usual_kind(items: Sequence[Encoded | BadSample]) -> str:
    kinds = Counter(pixels_key(item) for item in items if not isinstance(item, BadSample))
    return max(kinds, key=lambda kind: (kind != "", kinds[kind]), default="")


def _shapes(items: Sequence[Encoded]) -> dict[str, Counter[tuple[int, ...]]]:
    """How often each shape comes, but for the first axis, of the tensors that are put one after the other."""
    found: dict[str, Counter[tuple[int, ...]]] = {}
    for item in items:
        for key in item.keys() - FILL.keys():
            found.setdefault(key, Counter())[tuple(item[key].shape[1:])] += 1
    return found


def _checked(item: Encoded, usual: dict[str, tuple[int, ...]]) -> Encoded | BadSample:
    """The sample, if it is whole and of the usual shapes."""
    source, tokens = getattr(item, "source", Loaded.source), item.get("input_ids")
    if tokens is None or any(item[key].shape != tokens.shape for key in item.keys() & FILL.keys()):
        return BadSample(source, "it has no tokens, or not as many of them as of what goes with each.")
    for key, shape in usual.items():
        if key in item and tuple(item[key].shape[1:]) != shape:
            found = tuple(item[key].shape[1:])
            return BadSample(
                source,
                f"its {key} are of shape {found} each, those of other samples in the batch of {shape}, and this model's "
                "can't be put together; expected clips of one size and number of frames (nframes, min_pixels, max_pixels).",
            )
    return item
