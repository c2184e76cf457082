"""Positions in Qwen2-VL's language model: another rule in the place of the one that transformers has.

`restore_original_positions` brings back the rule that the model was trained with, where transformers 5 has another;
`sta_adapter.backbones.videorope` puts its own rule in by the same means. Everything put into a model is a plain object
that knows at most modules of that model, so that copied and unpickled models keep working.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sta_adapter.errors import InjectionError, LayoutError

METHOD = "get_rope_index"
GENERATION_METHOD = "_prepare_position_ids_for_generation"


class PositionRule(Protocol):
    """Where the tokens of a clip stand, and where the text goes on."""

    dtype: torch.dtype

    def clip(self, start: float, frames: int, rows: int, columns: int) -> tuple[Tensor, float]:
        """Positions (3, frames * rows * columns) of a clip on temporal, row and column axis, and the next free one.

        Args:
            start: the first free position.
            frames: temporal steps.
            rows: rows of merged tokens.
            columns: columns of merged tokens.
        """


@dataclasses.dataclass(frozen=True)
class OriginalPositions:
    """Qwen2-VL's own rule, as in transformers 4: the text after a clip goes on behind its largest position."""

    dtype = torch.long

    def clip(self, start: float, frames: int, rows: int, columns: int) -> tuple[Tensor, float]:
        """See `PositionRule`."""
        axes = [torch.arange(size) + start for size in (frames, rows, columns)]
        return torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1), start + max(frames, rows, columns)


def restore_original_positions(model: nn.Module) -> nn.Module:
    """Give Qwen2-VL the text positions of its training back, also on transformers 5.

    There, text after a clip goes on from the larger of its rows and columns; the original counts the frames too, so
    that text never overlaps a clip. On transformers 4 this changes nothing.

    Returns:
        The same model, changed; `undo_original_positions` takes the change back.

    Raises:
        InjectionError: the model is no Qwen2-VL of transformers 4.52 or newer, or has a position rule already.
    """
    install(model, OriginalPositions())
    return model


def undo_original_positions(model: nn.Module) -> nn.Module:
    """Take `restore_original_positions` back; nothing happens where it was not called."""
    owner = find_owner(model)
    if isinstance(installed_rule(owner), OriginalPositions):
        uninstall(model)
    return model


def install(model: nn.Module, rule: PositionRule) -> None:
    """Let the Qwen2-VL in `model` compute its positions by `rule`; raises what `restore_original_positions` raises."""
    owner = find_owner(model)
    if installed_rule(owner) is not None:
        raise InjectionError(
            f"this model's positions follow {installed_rule(owner)} already. Take that back first: remove_videorope(model) "
            "or undo_original_positions(model)."
        )
    owner.get_rope_index = RopeIndex(rule, owner.config, tuple(inspect.signature(owner.get_rope_index).parameters))
    owner.register_forward_pre_hook(FillPositions(), with_kwargs=True)
    owner.rope_deltas = None
    for head in _generating(model, owner):
        setattr(head, GENERATION_METHOD, GenerationPositions(head))


def uninstall(model: nn.Module) -> None:
    """Undo `install`; nothing happens where there is no rule."""
    owner = find_owner(model)
    if installed_rule(owner) is None:
        return
    vars(owner).pop(METHOD)
    drop_hooks(owner, FillPositions)
    owner.rope_deltas = None
    for head in _generating(model, owner):
        vars(head).pop(GENERATION_METHOD, None)


def find_owner(model: nn.Module) -> Any:
    """The module that computes positions in Qwen2-VL: the one around tower and language model.

    Raises:
        InjectionError: when there is none, or several.
    """
    named = [m for m in model.modules() if any(cls.__name__ == "Qwen2VLModel" for cls in type(m).__mro__)]
    found = [m for m in named if hasattr(m, "language_model") and hasattr(m, METHOD)]
    if len(found) == 1:
        return found[0]
    if found:
        raise InjectionError(f"{type(model).__name__} holds {len(found)} Qwen2-VL models; pass one of them.")
    if named:
        import transformers

        raise InjectionError(
            f"Qwen2-VL of transformers {transformers.__version__} can't be given another position rule; 4.52 to 5 can "
            "(tested: 4.57.6 and 5.23). For VideoRoPE on 4.45.2, use its authors' model file."
        )
    raise InjectionError(f"{type(model).__name__} is no Qwen2-VL and holds none; expected a Qwen2VLModel in it.")


def installed_rule(owner: nn.Module) -> PositionRule | None:
    """The rule that `install` gave to this module, or None."""
    method = vars(owner).get(METHOD)
    return method.rule if isinstance(method, RopeIndex) else None


def drop_hooks(module: nn.Module, kind: type) -> None:
    """Take all hooks of a class off a module."""
    for name in ("_forward_pre_hooks", "_forward_hooks"):
        for key in [k for k, hook in getattr(module, name).items() if isinstance(hook, kind)]:
            del getattr(module, name)[key]
            getattr(module, name + "_with_kwargs").pop(key, None)


def _generating(model: nn.Module, owner: nn.Module) -> Iterator[nn.Module]:
    """The modules that prepare positions for generation with this owner (transformers 5)."""
    for module in model.modules():
        if getattr(module, "model", None) is owner and hasattr(type(module), GENERATION_METHOD):
            yield module


class RopeIndex:
    """`get_rope_index` by a rule: takes what the method of the installed transformers takes.

    Args:
        rule: the rule.
        config: the model's.
        names: the method's arguments, in order.
    """

    def __init__(self, rule: PositionRule, config: Any, names: Sequence[str]) -> None:
        self.rule = rule
        self.config = config
        self.names = tuple(names)

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
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
        positions = torch.ones(3, *ids.shape, dtype=self.rule.dtype, device=ids.device)
        deltas = []
        for row, tokens in enumerate(ids):
            kept = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask[row].to(ids.device) == 1
            found, following = self._row(tokens[kept].tolist(), grids)
            positions[:, row, kept] = found.to(positions)
            deltas.append(following - len(tokens))
        for kind, left in grids.items():
            if next(left, None) is not None:
                raise LayoutError(f"{kind}_grid_thw describes more {kind}s than there are tokens for in input_ids.")
        return positions, torch.tensor(deltas, dtype=self.rule.dtype, device=ids.device)[:, None]

    def _row(self, tokens: list[int], grids: dict[str, Iterator[list[int]]]) -> tuple[Tensor, float]:
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
                clip, start = self.rule.clip(start, frames, rows, columns)
                parts.append(clip)
                left -= size
        return torch.cat(parts, dim=1), start

    def _grids(self, grid: Tensor | None) -> Iterator[list[int]]:
        """(frames, rows, columns) of each clip in merged tokens."""
        merge = self.config.vision_config.spatial_merge_size
        return iter([] if grid is None else [[t, h // merge, w // merge] for t, h, w in grid.tolist()])

    def _token_ids(self, given: dict[str, Any]) -> Tensor:
        """(batch, tokens), also where only embeddings were passed: then text is -1."""
        ids, types = given.get("input_ids"), given.get("mm_token_type_ids")
        if ids is not None:
            return ids
        if types is not None:
            ids = torch.full_like(types, -1)
            return ids.masked_fill(types == 1, self.config.image_token_id).masked_fill(
                types == 2, self.config.video_token_id
            )
        shape = given.get("attention_mask") if given.get("inputs_embeds") is None else given["inputs_embeds"][..., 0]
        if shape is None or given.get("image_grid_thw") is not None or given.get("video_grid_thw") is not None:
            raise LayoutError(
                "the places of images and clips can't be known without input_ids; pass them or position_ids."
            )
        return torch.full(shape.shape, -1, device=shape.device)


class FillPositions:
    """Forward pre-hook of Qwen2VLModel: the positions that were not passed, in a prompt and after it."""

    def __call__(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the arguments with `position_ids`, or None when they have them."""
        if kwargs.get("position_ids") is not None:
            return None
        given = {**dict(zip(inspect.signature(model.forward).parameters, args, strict=False)), **kwargs}
        if given.get("position_ids") is not None:
            return None
        return (), {**given, "position_ids": self._positions(model, given)}

    @torch.compiler.disable
    def _positions(self, model: Any, given: dict[str, Any]) -> Tensor:
        """Positions (3, batch, tokens)."""
        cache = given.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        if not past or model.rope_deltas is None:
            positions, model.rope_deltas = model.get_rope_index(**given)
            return positions
        tokens = given["inputs_embeds"] if given.get("input_ids") is None else given["input_ids"]
        batch, length = tokens.shape[:2]
        deltas = model.rope_deltas.to(tokens.device).repeat_interleave(batch // len(model.rope_deltas), dim=0)
        return (torch.arange(past, past + length, device=tokens.device) + deltas).expand(3, -1, -1)


class GenerationPositions:
    """What transformers 5 asks for before it generates; here, `rope_deltas` count from a row's start, padding included.

    Args:
        head: the model that generates.
    """

    def __init__(self, head: nn.Module) -> None:
        self.head = head

    def __call__(self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
        """Positions (4, batch, tokens), text first, or (1, batch, tokens) when a cached text goes on."""
        head: Any = self.head
        ids = model_kwargs.get("input_ids", inputs_tensor)
        if model_kwargs.get("mm_token_type_ids") is None and ids.dim() == 2:
            config = head.model.config
            types = (ids == config.image_token_id) + 2 * (ids == config.video_token_id)
            model_kwargs = {**model_kwargs, "mm_token_type_ids": types}
        positions = getattr(type(head), GENERATION_METHOD)(head, inputs_tensor, model_kwargs)
        if positions.shape[0] == 4:
            if model_kwargs.get("image_grid_thw") is None and model_kwargs.get("video_grid_thw") is None:
                head.model.rope_deltas = positions[1, :, -1:] + 1 - positions.shape[-1]
            return positions
        return (torch.arange(positions.shape[-1], device=positions.device) + head.model.rope_deltas)[None]
