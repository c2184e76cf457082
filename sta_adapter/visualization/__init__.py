"""What STA does with a clip: recorded as arrays, drawn as figures, written as a page, shown in the browser."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sta_adapter.visualization.observation import (
        Observation,
        branch_sizes,
        crossing_map,
        observe,
        temporal_attention,
    )

__all__ = ["Observation", "branch_sizes", "crossing_map", "observe", "temporal_attention"]


def __getattr__(name: str) -> Any:
    """Import what is asked for, so that commands start without torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("sta_adapter.visualization.observation"), name)


def __dir__() -> list[str]:
    """What is there, for completion."""
    return sorted({*globals(), *__all__})
