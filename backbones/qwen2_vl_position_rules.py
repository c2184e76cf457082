"""Where the tokens of a clip stand in Qwen2-VL's language model, and where the text goes on: the rules that there are.

The original one is that of the models' own training code (github.com/QwenLM/Qwen3-VL, qwen-vl-finetune) and of vLLM.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from sta_adapter.errors import LayoutError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PositionRule(Protocol):
    """Where the tokens of a clip stand, and where the text goes on."""

    name: str
    dtype: torch.dtype

    def clip(
        self, start: float, frames: int, rows: int, columns: int, seconds: float | None = None
    ) -> tuple[Tensor, float]:
        """Positions (3, frames * rows * columns) of a clip on temporal, row and column axis, and the next free one.

        `start` is the first free position. Frames are temporal steps, rows and columns those of merged tokens, and `seconds`
        those of a step, where the rule counts time.

        Raises:
            LayoutError: the rule needs seconds that are not known.
        """


@dataclasses.dataclass(frozen=True)
class OriginalPositions:
    """The models' own rule, as in their published training code: the text after a clip goes on behind its largest position."""

    # Qwen2.5-VL's positions on the temporal axis for a second; None counts steps, as Qwen2-VL does
    tokens_per_second: float | None = dataclasses.field(default=None, repr=False)
    name = "original"
    dtype = torch.long

    @classmethod
    def of(cls, owner: PreTrainedModel) -> OriginalPositions:
        """The rule for the model that computes positions."""
        counts = any("Qwen2VL" in kind.__name__ for kind in type(owner).__mro__)  # or a class of one's own, as ColQwen2
        return cls(None if counts else owner.config.vision_config.tokens_per_second)

    def clip(
        self, start: float, frames: int, rows: int, columns: int, seconds: float | None = None
    ) -> tuple[Tensor, float]:
        """See `PositionRule`."""
        steps = torch.arange(frames)
        if self.tokens_per_second is not None and frames > 1:
            steps = (steps * self._seconds(seconds) * self.tokens_per_second).long()
        axes = [axis + start for axis in (steps, torch.arange(rows), torch.arange(columns))]
        length = self._length(int(steps[-1]) + 1, rows, columns)
        return torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1), start + length

    def _seconds(self, seconds: float | None) -> float:
        if seconds is None or not 0 <= seconds < math.inf:
            raise LayoutError(
                f"second_per_grid_ts is {seconds}; a clip of several temporal steps needs the seconds of one, from which "
                "its positions follow. Pass what the processor returns under that name, or position_ids."
            )
        return seconds

    def _length(self, steps: int, rows: int, columns: int) -> int:
        return max(steps, rows, columns)


class RowsAndColumns(OriginalPositions):
    """transformers 5's rule: the text goes on behind the larger of rows and columns, so that a longer clip reaches into it."""

    name = "rows-and-columns"

    def _length(self, steps: int, rows: int, columns: int) -> int:
        return max(rows, columns)


class WholeSeconds(OriginalPositions):
    """transformers 4.57's rule for Qwen2.5-VL: seconds are cut to whole ones, so that half a second is none."""

    name = "whole-seconds"

    def _seconds(self, seconds: float | None) -> float:
        return int(super()._seconds(seconds))


class WholeSecondsRowsAndColumns(RowsAndColumns, WholeSeconds):
    """Both, as in early releases of transformers 5 for Qwen2.5-VL."""

    name = "whole-seconds-rows-and-columns"


class Sequential(OriginalPositions):
    """Every token of a clip stands one behind the other, as in a text: what transformers 4.45 to 4.48 trains Qwen2-VL with."""

    name = "sequential"

    def clip(
        self, start: float, frames: int, rows: int, columns: int, seconds: float | None = None
    ) -> tuple[Tensor, float]:
        """See `PositionRule`."""
        tokens = frames * rows * columns
        return (torch.arange(tokens) + start).expand(3, -1), start + tokens


RULES = {
    rule.name: rule
    for rule in (OriginalPositions, RowsAndColumns, WholeSeconds, WholeSecondsRowsAndColumns, Sequential)
}
