"""What `sta-adapter evaluate` asks, and of whom: the same questions of a model and of an engine."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sta_adapter.cli.model_source import ModelSource

if TYPE_CHECKING:
    from torch import nn

    from sta_adapter.data.dataset import VideoDataset
    from sta_adapter.evaluation.engine import Engine
    from sta_adapter.evaluation.result import EvaluationResult

    Orders = dict[str, EvaluationResult]

ORDERED = "ordered"


@dataclass(frozen=True)
class Measurement:
    """The runs of an evaluation ("base", "adapter" or both), each asked in all orders of frames; `out` keeps predictions."""

    source: ModelSource
    dataset: VideoDataset
    runs: list[str]
    orders: tuple[str, ...]
    device: str | None
    out: Path | None
    overwrite: bool
    arguments: Mapping[str, Any]  # of `evaluate`, the same for all runs

    def ask(self, answerer: nn.Module | Engine, run: str, some: VideoDataset | None = None) -> Orders:
        """The results of a run by the order of frames; with `some` of these alone, frames in order, and nothing is kept."""
        if some is not None:
            return {ORDERED: self._ask(answerer, run, ORDERED, some, None)}
        return {order: self._ask(answerer, run, order, self.dataset, self.out) for order in self.orders}

    def ask_model(self, some: VideoDataset | None = None) -> dict[str, Orders]:
        """As `ask`, of each run, the model itself, which is loaded for it."""
        from sta_adapter.evaluation.eval_mode import without_adapter

        net = self.source.load(self.device)
        found = {}
        for run in self.runs:
            with without_adapter(net) if run == "base" else contextlib.nullcontext():
                found[run] = self.ask(net, run, some)
        return found

    def _ask(
        self, answerer: nn.Module | Engine, run: str, order: str, data: VideoDataset, out: Path | None
    ) -> EvaluationResult:
        from sta_adapter.evaluation.evaluator import evaluate

        return evaluate(
            answerer,
            data,
            frame_order=order,
            predictions_file=None if out is None else out / f"{run}-{order}.jsonl",
            overwrite=self.overwrite and out is not None,
            progress=f"answers of the {run}",
            **self.arguments,
        )
