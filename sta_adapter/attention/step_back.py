"""Gradients inside of a written backward, of a part that torch's own operations compute."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["step_back"]


def step_back(output: Tensor, leaves: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    """Gradients of `output` at leaves that require one.

    Where one operation of torch lies between them its backward is called as it is: inside of a backward, a run of the
    engine takes several times as long.

    Args:
        output: computed from the leaves, with gradients.
        leaves: tensors without a history.
        grad: shaped as `output`.
    """
    if callable(node := output.grad_fn) and not isinstance(node, torch.autograd.function.BackwardCFunction):
        reached = [function for function, _ in node.next_functions]
        variables = [getattr(function, "variable", None) for function in reached]
        places = [next((i for i, x in enumerate(variables) if x is leaf), -1) for leaf in leaves]
        if -1 not in places and sum(function is not None for function in reached) == len(leaves):
            found = node(grad)
            found = found if isinstance(found, tuple) else (found,)
            if all(found[place] is not None for place in places):  # None: within `torch.autograd.grad(..., inputs)`
                return [found[place] for place in places]
    return list(torch.autograd.grad(output, leaves, grad))
