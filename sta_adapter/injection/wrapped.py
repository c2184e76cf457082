"""Models that can't be injected into any more: something is wrapped around them that would not see new parameters."""

from __future__ import annotations

from torch import nn

from sta_adapter.errors import InjectionError

__all__ = ["refuse_wrapped"]

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
