"""What the language model keeps of a stream: encoded steps within a budget of tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Step:
    """One call's frames, encoded."""

    seconds: tuple[float, ...]  # when each of its frames began
    output: object  # of the encoder
    tokens: int  # how many the language model sees of it


class FrameMemory:
    """Steps in order, thinned out where they are too many: the longer ago, the fewer are kept.

    The rule: while there are more tokens than the budget, the step goes whose neighbours are closest to each other, as
    measured by how long ago it was. The first and the last stay.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.steps: list[Step] = []
        self.thinned = 0

    @property
    def tokens(self) -> int:
        """Of all steps kept."""
        return sum(step.tokens for step in self.steps)

    def add(self, step: Step) -> None:
        """Keep a step, and thin out."""
        self.steps.append(step)
        while self.tokens > self.budget and len(self.steps) > 1:
            times = [kept.seconds[0] for kept in self.steps]
            gaps = [(times[i + 1] - times[i - 1]) / max(times[-1] - times[i], 1e-9) for i in range(1, len(times) - 1)]
            del self.steps[1 + min(range(len(gaps)), key=gaps.__getitem__) if gaps else 0]
            self.thinned += 1

    def clear(self) -> None:
        """Forget all steps."""
        self.steps.clear()

    def output(self) -> object:
        """The encoder's output for all steps, as if they were encoded in one call."""
        return joined([step.output for step in self.steps])


def joined(parts: list[Any]) -> Any:
    """Outputs of one structure, put together along the first axis of each tensor."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts)
    if isinstance(first, dict):  # transformers' outputs are
        values = {key: joined([part[key] for part in parts]) for key in first}
        return type(first)(**values) if dataclasses.is_dataclass(first) else values
    if isinstance(first, (list, tuple)):
        return type(first)(joined(list(items)) for items in zip(*parts, strict=True))
    return first
