"""What `get_rope_index` of Qwen2-VL and Qwen2.5-VL computes, by a rule: where text, images and clips stand."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sta_adapter.backbones.qwen2_vl_position_rules import PositionRule
from sta_adapter.errors import LayoutError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class RopeIndex:
    """`get_rope_index` by a rule: takes what the method of the installed transformers takes."""

    def __init__(self, rule: PositionRule, config: PretrainedConfig, names: Sequence[str]) -> None:
        self.rule = rule
        self.config = config
        self.names = tuple(names)

    def __call__(self, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        """Positions (3, batch, tokens), and what to add to a later token's index for its position: (batch, 1).

        Padding has position 1.

        Raises:
            LayoutError: when tokens and grids don't add up, or can't be known.
        """
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        mask = given.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            raise LayoutError("positions need an attention_mask of the shape (batch, tokens), or pass position_ids.")
        ids = self._token_ids(given)
        grids = {kind: self._grids(given.get(f"{kind}_grid_thw")) for kind in ("image", "video")}
        steps = given.get("second_per_grid_ts")
        seconds: Iterator[float] = iter(() if steps is None else torch.as_tensor(steps).flatten().tolist())
        positions = torch.ones(3, *ids.shape, dtype=self.rule.dtype, device=ids.device)
        deltas = []
        for row, tokens in enumerate(ids):
            kept = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask[row].to(ids.device) == 1
            found, following = self._row(tokens[kept].tolist(), grids, seconds)
            positions[:, row, kept] = found.to(positions)
            deltas.append(following - len(tokens))
        for kind, left in grids.items():
            if next(left, None) is not None:
                raise LayoutError(f"{kind}_grid_thw describes more {kind}s than there are tokens for in input_ids.")
        return positions, torch.tensor(deltas, dtype=self.rule.dtype, device=ids.device)[:, None]

    def _row(
        self, tokens: list[int], grids: dict[str, Iterator[list[int]]], seconds: Iterator[float]
    ) -> tuple[Tensor, float]:
        """Positions (3, tokens) of one prompt without padding, and the next free one."""
        kinds = {self.config.image_token_id: "image", self.config.video_token_id: "video"}
        parts: list[Tensor] = [torch.empty(3, 0, dtype=self.rule.dtype)]
        start: float = 0
        for kind, run in itertools.groupby(tokens, key=kinds.get):
            left = len(list(run))
            if kind is None:
                parts.append((torch.arange(left, dtype=self.rule.dtype) + start).expand(3, -1))
                start += left
                continue
            while left:
                frames, rows, columns = next(grids[kind], (0, 0, 0))
                size = frames * rows * columns
                if not 0 < size <= left:
                    raise LayoutError(
                        f"input_ids holds {left} {kind} tokens where {kind}_grid_thw tells of {size or 'none'}: the two "
                        "must describe the same prompt."
                    )
                step = next(seconds, None) if kind == "video" else None
                clip, start = self.rule.clip(start, frames, rows, columns, step)
                parts.append(clip)
                left -= size
        return torch.cat(parts, dim=1), start

    def _grids(self, grid: object) -> Iterator[list[int]]:
        """(frames, rows, columns) of each clip in merged tokens."""
        merge = self.config.vision_config.spatial_merge_size
        return iter([] if grid is None else [[t, h // merge, w // merge] for t, h, w in torch.as_tensor(grid).tolist()])

    def _token_ids(self, given: dict[str, object]) -> Tensor:
        """(batch, tokens), also where only embeddings were passed: then text is -1."""
        ids, types = given.get("input_ids"), given.get("mm_token_type_ids")
        if isinstance(ids, Tensor):
            return ids
        if isinstance(types, Tensor):
            ids = torch.full_like(types, -1).masked_fill(types == 1, self.config.image_token_id)
            return ids.masked_fill(types == 2, self.config.video_token_id)
        mask, embeds = given.get("attention_mask"), given.get("inputs_embeds")
        shape = embeds[..., 0] if isinstance(embeds, Tensor) else mask
        seen = any(given.get(f"{kind}_grid_thw") is not None for kind in ("image", "video"))
        if seen or not isinstance(shape, Tensor):
            raise LayoutError(
                "the places of images and clips can't be known without input_ids; pass them or position_ids."
            )
        return torch.full(shape.shape, -1, device=shape.device)
