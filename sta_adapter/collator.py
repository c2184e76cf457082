"""Encoded samples to one padded batch.

Public: `Collator`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sta_adapter.encoding import IGNORE, Encoded
from sta_adapter.samples import BadSample


class Collator:
    """Pad samples to one batch; bad samples are left out and named in `bad_samples`.

    Args:
        pad_id: what fills `input_ids`.
        side: "right" for training, "left" for generation.
    """

    def __init__(self, pad_id: int, *, side: str = "right") -> None:
        self.pad_id = pad_id
        self.side = side

    @classmethod
    def of(cls, processor: Any, *, side: str = "right") -> Collator:
        """The collator for a processor's padding token."""
        tokenizer = processor.tokenizer
        return cls(tokenizer.eos_token_id or 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id, side=side)

    def __call__(self, items: Sequence[Encoded | BadSample]) -> dict[str, Any]:
        """Batch of `(B, L)` token tensors with `attention_mask`, and the clips' tensors one after the other.

        Without any usable sample there is no `input_ids` in it, and nothing to learn in `labels`.
        """
        good = [item for item in items if not isinstance(item, BadSample)]
        batch: dict[str, Any] = {"bad_samples": [f"{i.source}: {i.reason}" for i in items if isinstance(i, BadSample)]}
        if not good:
            return {**batch, "labels": torch.full((1, 1), IGNORE)}
        fill = {"input_ids": self.pad_id, "labels": IGNORE, "mm_token_type_ids": 0, "token_type_ids": 0}
        length = max(len(item["input_ids"]) for item in good)
        for key in dict.fromkeys(key for item in good for key in item):
            values = [item.get(key) for item in good]
            if key in fill:
                batch[key] = torch.stack(
                    [self._pad(value, fill[key], item, length) for value, item in zip(values, good, strict=True)]
                )
            else:
                batch[key] = torch.cat([value for value in values if value is not None])
        ones = [torch.ones_like(item["input_ids"]) for item in good]
        batch["attention_mask"] = torch.stack([self._pad(one, 0, one, length) for one in ones])
        return batch

    def _pad(self, value: torch.Tensor | None, fill: int, item: Any, length: int) -> torch.Tensor:
        if value is None:
            value = torch.zeros_like(item["input_ids"])
        missing = length - len(value)
        return torch.nn.functional.pad(value, (missing, 0) if self.side == "left" else (0, missing), value=fill)
