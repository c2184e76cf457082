"""Whether DistributedDataParallel averages a parameter's gradients: it takes those that train when it wraps the model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.parallel import DistributedDataParallel

__all__ = ["trained_alone"]

KEY = "sta_adapter"


def trained_alone(parameters: Iterable[nn.Parameter], ddp: DistributedDataParallel) -> int:
    """How many of the parameters train in each process by themselves, without being told to (`parameters_to_ignore`).

    What accumulates a parameter's gradients lives as long as somebody holds it. DDP holds that of all that it averages; of the
    others it ends with each backward, and is looked for before the first forward that they take part in.
    """
    ignored = {id(p) for name, p in ddp.module.named_parameters() if name in ddp.parameters_to_ignore}
    return sum(id(p) not in ignored and not _is_held(p) for p in parameters)


def _is_held(parameter: Tensor) -> bool:
    mark = object()
    _notes(parameter)[KEY] = mark
    return _notes(parameter).get(KEY) is mark


def _notes(parameter: Tensor) -> dict[str, object]:
    """What was noted on what accumulates a parameter's gradients, as long as that lives."""
    return cast("dict[str, object]", get_gradient_edge(parameter).node.metadata)
