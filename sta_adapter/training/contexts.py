"""States that a model is in while it trains, and leaves afterwards."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from sta_adapter.compatibility.checkpointing import checkpointing_methods
from sta_adapter.compatibility.seams import ADAPTER_FLAG, has_adapter
from sta_adapter.injection.handle import STAHandle
from sta_adapter.injection.registry import locate
from sta_adapter.injection.target import NARROW, widen
from sta_adapter.training.arguments import PRECISION

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextlib.contextmanager
def kept_random_state() -> Iterator[None]:
    """An evaluation must not change what the training draws next."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield


@contextlib.contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """Train in float32 what is 16 bit wide: small steps would be rounded away."""
    narrow = {p: p.dtype for p in model.parameters() if p.requires_grad and p.dtype in NARROW}
    widen(narrow)
    try:
        yield
    finally:
        for parameter, dtype in narrow.items():
            parameter.data = parameter.data.to(dtype)


@contextlib.contextmanager
def kept_configuration(model: nn.Module) -> Iterator[None]:
    """Keep the model's use of a cache, which the trainer of transformers 5 switches off: a base is known again by its configuration."""
    values = {} if (config := getattr(model, "config", None)) is None else vars(config)
    before = {name: values[name] for name in ("use_cache",) if name in values}
    try:
        yield
    finally:
        values.pop("use_cache", None)
        values.update(before)


@contextlib.contextmanager
def kept_environment() -> Iterator[None]:
    """Keep the precision that the environment names, and of which the run's is written there: a trainer of another run would take it."""
    before = os.environ.get(PRECISION)
    try:
        yield
    finally:
        os.environ.pop(PRECISION, None)
        if before is not None:
            os.environ[PRECISION] = before


@contextlib.contextmanager
def activation_checkpointing(model: nn.Module, handle: STAHandle | None, kind: bool | str) -> Iterator[None]:
    """Gradient checkpointing. The re-entrant kind needs inputs that require a gradient, which a frozen base doesn't give."""
    if not kind:
        yield
        return
    reentrant = kind == "reentrant"
    checkpointing = checkpointing_methods(model)
    checkpointing.enable(**{checkpointing.keywords: {"use_reentrant": reentrant}})
    hooks = []
    if reentrant:
        cast("PreTrainedModel", model).enable_input_require_grads()
        encoder = locate(model).encoder if handle is None else handle.encoder
        hooks.append(encoder.register_forward_pre_hook(_require_gradient, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        if reentrant:
            cast("PreTrainedModel", model).disable_input_require_grads()
        checkpointing.disable()


@contextlib.contextmanager
def trainable_when_quantized(model: nn.Module) -> Iterator[None]:
    """The Hugging Face trainer refuses quantised models without LoRA; STA is an adapter as well, of which it can't know."""
    if not getattr(model, "is_quantized", False) or has_adapter(model):
        yield
        return
    setattr(model, ADAPTER_FLAG, True)
    try:
        yield
    finally:
        delattr(model, ADAPTER_FLAG)


def _require_gradient(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor) and value.is_floating_point() and torch.is_grad_enabled() and value.is_leaf:
            value.requires_grad_(True)
