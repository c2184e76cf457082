"""The module in Qwen2-VL and Qwen2.5-VL that computes positions, and what it says of time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from sta_adapter.compatibility.position_seams import ROPE_INDEX
from sta_adapter.errors import InjectionError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FAMILIES = ("Qwen2VLModel", "Qwen2_5_VLModel")


def find_owner(model: nn.Module, kinds: tuple[str, ...] = FAMILIES) -> nn.Module:
    """The module that computes positions: the one around tower and language model.

    Args:
        model: the whole model.
        kinds: class names that count.

    Raises:
        InjectionError: when there is none, or several.
    """
    named = [m for m in model.modules() if any(cls.__name__ in kinds for cls in type(m).__mro__)]
    found = [m for m in named if hasattr(m, "language_model") and hasattr(m, ROPE_INDEX)]
    if len(found) == 1:
        return found[0]
    if found:
        raise InjectionError(f"{type(model).__name__} holds {len(found)} Qwen2-VL models; pass one of them.")
    if named:
        import transformers

        raise InjectionError(
            f"Qwen2-VL of transformers {transformers.__version__} can't be given another position rule; 4.52 to 5 can "
            "(tested: 4.57.6, 5.20 and 5.24). For VideoRoPE on 4.45.2, use its authors' model file."
        )
    raise InjectionError(
        f"{type(model).__name__} is no Qwen2-VL and holds none; expected a {' or '.join(kinds)} in it."
    )


def tokens_per_second(owner: PreTrainedModel) -> float | None:
    """Positions on the temporal axis for a second in Qwen2.5-VL; None for Qwen2-VL, which counts steps."""
    rate: float | None = None if "Qwen2VL" in type(owner).__name__ else owner.config.vision_config.tokens_per_second
    return rate
