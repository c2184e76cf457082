"""Which frames a frame sees, where it looks back only. Public: `visible_keys`."""

from __future__ import annotations

import torch
from torch import Tensor


def visible_keys(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Booleans (queries, keys): True where a query, one of the last tokens of the keys, sees a key."""
    ones = torch.ones(queries, keys, dtype=torch.bool, device=device)
    last = keys - queries
    visible = ones.tril(last)
    return visible if window is None else visible.triu(last - window + 1)
