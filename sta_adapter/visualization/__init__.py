"""What STA does with a clip: recorded as arrays, drawn as figures, written as a page, shown in the browser."""

from typing import TYPE_CHECKING

from sta_adapter._lazy import lazy

if TYPE_CHECKING:
    from sta_adapter.visualization.observation import (
        Observation,
        branch_sizes,
        crossing_map,
        observe,
        temporal_attention,
    )

__all__ = ["Observation", "branch_sizes", "crossing_map", "observe", "temporal_attention"]

__getattr__, __dir__ = lazy(__name__, {"sta_adapter.visualization.observation": __all__})
