"""VideoRoPE's frequencies: a hook of Qwen2-VL's rotary embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from sta_adapter.compatibility.releases import incompatible


class InterleavedFrequencies:
    """Which axis turns which frequency: row and column by turns, and the lowest ones temporal.

    In transformers 5 it is called by the rotary module; in 4 it is a forward hook of it.

    Args:
        sections: frequencies of the temporal, row and column axis, as in Qwen2-VL's `mrope_section`.
    """

    def __init__(self, sections: Sequence[int]) -> None:
        self.spatial = sum(sections) - sections[0]

    def __call__(self, *call: object) -> Tensor | tuple[Tensor, ...]:
        """With (3, batch, tokens, pairs): its mix (batch, tokens, 2 * pairs); with (module, args, output): the output mixed."""
        given = call[-1]
        if isinstance(given, Tensor):
            return self.mix(given)
        cos, sin = cast("tuple[Tensor, Tensor]", given)
        if cos.dim() != 4:
            raise incompatible(
                "transformers",
                f"the rotary embedding gives the shape {tuple(cos.shape)}; expected (3, batch, tokens, head size)",
            )
        return tuple(self.mix(x[..., : x.shape[-1] // 2]).expand_as(x) for x in (cos, sin))

    def mix(self, freq: Tensor) -> Tensor:
        """From (3, batch, tokens, pairs), one row for each axis, to (batch, tokens, 2 * pairs)."""
        mixed = freq[0].clone()
        for axis in (1, 2):
            mixed[..., axis - 1 : self.spatial : 2] = freq[axis, ..., axis - 1 : self.spatial : 2]
        return torch.cat([mixed, mixed], dim=-1)
