"""States that a model is in while it is evaluated, and leaves afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from sta_adapter.adapter.lora_weights import lora_disabled
from sta_adapter.injection.handle import get_sta


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """No dropout and no gradients; afterwards each module is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """STA off, for this thread; LoRA off, for all threads."""
    handle = get_sta(model)
    with lora_disabled(model), contextlib.nullcontext() if handle is None else handle.disabled():
        yield
