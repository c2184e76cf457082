"""Data-parallel training: what may not be injected into, and STA in a process whose batch has no video."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sta_adapter.errors import InjectionError
from sta_adapter.hooks import Hook, iterate_tensors
from sta_adapter.injection import Injection
from sta_adapter.sharding import is_parallel
from sta_adapter.uncompiled import uncompiled

WRAPPERS = {
    "DistributedDataParallel": "before wrapping the model in DistributedDataParallel",
    "DataParallel": "and train with DistributedDataParallel, which nn.DataParallel's copies of modules don't replace",
    "FullyShardedDataParallel": "before wrapping the model in FullyShardedDataParallel",
    "FSDPModule": "before fully_shard(model)",
    "DeepSpeedEngine": "before deepspeed.initialize",
    "OptimizedModule": "into the original model, then torch.compile it",
}


def refuse_wrapped(model: nn.Module) -> None:
    """Refuse models whose wrapper would not see parameters that come later.

    Raises:
        InjectionError: naming the wrapper, and what to do instead.
    """
    for module in model.modules():
        for cls in type(module).__mro__:
            if cls.__name__ in WRAPPERS and not cls.__module__.startswith("sta_adapter"):
                raise InjectionError(
                    f"the model is wrapped in {cls.__name__} already, which would not synchronise, shard or compile STA's "
                    f"parameters. Inject {WRAPPERS[cls.__name__]}."
                )
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise InjectionError(f"{type(module).__name__} is compiled already. Inject first, then call compile().")


class LanguageModelBegin(Hook):
    """Forward pre-hook of the language model: when a data-parallel process had no video, the encoder runs on a dummy clip.

    Its output counts with weight zero. Without it, DDP reports parameters without a gradient, and FSDP waits forever
    for the process to join in. The dummy runs where the encoder would have run, just before the language model, so
    that all processes gather their shards in one order.
    """

    def __init__(self, injection: Injection, encoder: nn.Module) -> None:
        super().__init__(injection)
        self.encoder = encoder

    @uncompiled
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Add zero times the dummy's output to `inputs_embeds`."""
        ran = self.injection.pop_ran()
        embeddings = kwargs.get("inputs_embeds")
        dummy_inputs = self.injection.spec.dummy_inputs
        if ran or embeddings is None or dummy_inputs is None:
            return None
        if not (module.training and torch.is_grad_enabled() and self.injection.is_enabled and is_parallel()):
            return None
        encoder = self.encoder
        dummy_args, dummy_kwargs = dummy_inputs(encoder)
        with self.injection.clips(None):
            outputs = list(iterate_tensors(encoder(*dummy_args, **dummy_kwargs)))
        self.injection.pop_ran()
        zero = sum(t.sum() * 0 for t in outputs if t.requires_grad)
        return args, {**kwargs, "inputs_embeds": embeddings + zero}


def find_language_model(model: nn.Module, encoder: nn.Module) -> nn.Module | None:
    """The module that takes `inputs_embeds` once the encoder's output is among them; None for a bare encoder."""
    get_decoder: Any = getattr(model, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else None
    for candidate in (decoder, getattr(model, "language_model", None), getattr(model, "lm", None)):
        if isinstance(candidate, nn.Module) and all(module is not encoder for module in candidate.modules()):
            return candidate
    return None
