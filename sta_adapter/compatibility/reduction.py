"""Whether DistributedDataParallel averages a parameter's gradients: it takes those that train when it wraps the model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.parallel import DistributedDataParallel

from sta_adapter.errors import InjectionError

KEY = "sta_adapter"


def require_averages(
    parameters: Iterable[nn.Parameter], ddp: DistributedDataParallel, known: tuple[int, ...]
) -> tuple[int, ...]:
    """Refuse parameters of STA that train in each process by themselves, unless DDP was told to ignore them.

    What accumulates a parameter's gradients lives as long as somebody holds it. DDP holds that of all that it averages; of the
    others it ends with each backward, and is looked for before the first forward that they take part in.

    Args:
        parameters: of STA.
        ddp: whose forward runs.
        known: what the last call gave: with the same parameters nothing is looked at.
    """
    training = [p for p in parameters if p.requires_grad]
    found = (id(ddp), *map(id, training))
    if found == known:
        return known
    ignored = {id(p) for name, p in ddp.module.named_parameters() if name in ddp.parameters_to_ignore}
    if alone := sum(id(p) not in ignored and not _is_held(p) for p in training):
        raise InjectionError(
            f"{alone} of STA's {len(training)} parameters that train were unfrozen after DistributedDataParallel had wrapped the model. It "
            "would not average their gradients, and the processes' weights would diverge: wrap the model again."
        )
    return found


def _is_held(parameter: Tensor) -> bool:
    mark = object()
    _notes(parameter)[KEY] = mark
    return _notes(parameter).get(KEY) is mark


def _notes(parameter: Tensor) -> dict[str, object]:
    """What was noted on what accumulates a parameter's gradients, as long as that lives."""
    return cast("dict[str, object]", get_gradient_edge(parameter).node.metadata)
