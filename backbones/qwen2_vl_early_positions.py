"""Qwen2-VL of transformers 4.45 to 4.48: `generate` computes positions, a forward in training or scoring none, or once only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from sta_adapter.backbones.qwen2_vl_position_rules import OriginalPositions
from sta_adapter.backbones.qwen2_vl_rope_index import RopeIndex
from sta_adapter.compatibility.calls import class_method, given_arguments
from sta_adapter.compatibility.position_seams import cached_tokens
from sta_adapter.compatibility.seams import drop_hooks, hook_table, uncompiled

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HEAD = "Qwen2VLForConditionalGeneration"
FORWARD = f"{HEAD}.forward"


def fills_early(head: nn.Module) -> bool:
    """Whether `fill_early` has put the rule of the training into it."""
    return any(isinstance(hook, FillEarly) for hook in hook_table(head, "_forward_pre_hooks").values())


def fill_early(head: nn.Module, fill: bool) -> None:
    """Let a forward of it have the positions that `generate` gives it, or, with False, those of the installed transformers."""
    drop_hooks(head, lambda hook: isinstance(hook, FillEarly))
    if fill:
        head.register_forward_pre_hook(FillEarly(), with_kwargs=True)


class FillEarly:
    """Forward pre-hook of the head: the positions of a call that has none, and no cache in front of its tokens."""

    @uncompiled
    def __call__(
        self, head: PreTrainedModel, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[()], dict[str, object]] | None:
        """Return the arguments with `position_ids`, or None where they are not needed; raises as `RopeIndex` does."""
        given = given_arguments(class_method(head), FORWARD, args, kwargs)
        if given.get("position_ids") is not None or cached_tokens(class_method(head), FORWARD, given):
            return None
        positions, deltas = RopeIndex(OriginalPositions(), head.config, ())(**given)
        if hasattr(head, "rope_deltas"):  # from which the tokens that are generated go on
            head.rope_deltas = deltas
        return (), {**given, "position_ids": positions}
