"""Where a Qwen2-VL with another position rule asks for positions: before its forward, and before it generates."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from sta_adapter.compatibility.calls import class_method, given_arguments
from sta_adapter.compatibility.position_seams import GENERATION_METHOD, cached_tokens, generates_behind_padding
from sta_adapter.compatibility.seams import hook_table, uncompiled
from sta_adapter.errors import LayoutError

FORWARD = "Qwen2VLModel.forward"


class FillPositions:
    """Forward pre-hook of Qwen2VLModel: the positions that were not passed, in a prompt and after it."""

    def __call__(
        self, model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[()], dict[str, object]] | None:
        """Return the arguments with `position_ids`, or None when they have them."""
        mends = generates_behind_padding()
        if kwargs.get("position_ids") is not None and not mends:
            return None
        given = given_arguments(class_method(model), FORWARD, args, kwargs)
        told = given.get("position_ids")
        if told is None:
            return (), {**given, "position_ids": self._positions(model, given)}
        of_generate = isinstance(told, Tensor) and len(told) == 4  # the text's own count, then these
        if not (mends and of_generate and cached_tokens(class_method(model), FORWARD, given)):
            return None
        positions = torch.cat([cast("Tensor", told)[:1], self._positions(model, given)])
        return (), {**given, "position_ids": positions}

    @uncompiled
    def _positions(self, model: Any, given: dict[str, Any]) -> Tensor:
        """Positions (3, batch, tokens); pictures and clips behind cached tokens stand as they would in one prompt."""
        past = cached_tokens(class_method(model), FORWARD, given)
        if not past:
            positions, model.rope_deltas = model.get_rope_index(**given)
            return positions
        if model.rope_deltas is None:
            raise LayoutError(
                f"the cache holds {past} tokens of which this model has not seen the positions, so those of the tokens "
                "after them can't be known; pass position_ids, or run the whole prompt through this model first."
            )
        tokens = given["inputs_embeds"] if given.get("input_ids") is None else given["input_ids"]
        batch, length = tokens.shape[:2]
        deltas = model.rope_deltas.to(tokens.device).repeat_interleave(batch // len(model.rope_deltas), dim=0)
        if given.get("pixel_values") is None and given.get("pixel_values_videos") is None:
            return (torch.arange(past, past + length, device=tokens.device) + deltas).expand(3, -1, -1)
        mask = given.get("attention_mask")  # of the cached tokens as well
        new = {**given, "attention_mask": None if mask is None else mask[:, -length:]}
        positions, more = model.get_rope_index(**new)
        model.rope_deltas = deltas + more
        return positions + past + deltas


def forgets_padding(owner: nn.Module | None) -> bool:
    """Whether what a model generates is numbered by the installed transformers alone, which forgets padding."""
    if owner is None or not generates_behind_padding():
        return False
    return not any(isinstance(hook, FillPositions) for hook in hook_table(owner, "_forward_pre_hooks").values())


class GenerationPositions:
    """What transformers 5 asks for before it generates; here, `rope_deltas` count from a row's start, padding included."""

    def __init__(self, head: nn.Module) -> None:
        self.head = head

    def __call__(self, inputs_tensor: Tensor, model_kwargs: dict[str, Tensor]) -> Tensor:
        """Positions (4, batch, tokens), text first, or (1, batch, tokens) when a cached text goes on."""
        head: Any = self.head
        ids = model_kwargs.get("input_ids", inputs_tensor)
        has_tokens = ids.dim() == 2 and ids.shape[1] > 0
        if model_kwargs.get("mm_token_type_ids") is None and has_tokens:
            config = head.model.config
            types = (ids == config.image_token_id) + 2 * (ids == config.video_token_id)
            model_kwargs = {**model_kwargs, "mm_token_type_ids": types}
        positions = getattr(type(head), GENERATION_METHOD)(head, inputs_tensor, model_kwargs)
        if positions.shape[0] == 4:
            if model_kwargs.get("image_grid_thw") is None and model_kwargs.get("video_grid_thw") is None:
                head.model.rope_deltas = positions[1, :, -1:] + 1 - positions.shape[-1]
            elif not has_tokens:  # transformers takes embeddings for text
                found, head.model.rope_deltas = head.model.get_rope_index(**{**model_kwargs, "input_ids": None})
                positions = torch.cat([positions[:1].to(found), found])
            return positions
        return (torch.arange(positions.shape[-1], device=positions.device) + head.model.rope_deltas)[None]
