"""A stream's state as plain values, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict, cast

import torch
from torch import Tensor

from sta_adapter.attention.module import TemporalAttention
from sta_adapter.errors import StreamError
from sta_adapter.injection.stream_state import StreamState

__all__ = ["SavedStream", "restored", "saved"]

FORMAT = 1


class SavedStream(TypedDict):
    """What `Stream.state_dict` gives; `positions` of a frame, and `grid`, its rows and columns, are None where unknown."""

    format: int
    backbone: str
    window: int
    frames: int
    positions: int | None
    grid: list[int] | None
    blocks: dict[int, Tensor]


def saved(state: StreamState, backbone: str) -> SavedStream:
    """Numbers, and copies of the tensors: of each block the keys and values that the next frame sees, oldest first."""
    return {
        "format": FORMAT,
        "backbone": backbone,
        "window": state.window,
        "frames": state.frames,
        "positions": None if state.shape is None else state.shape[0],
        "grid": None if state.shape is None or state.shape[1] is None else list(state.shape[1]),
        "blocks": {index: state.recent(index) for index in state.caches},
    }


def restored(found: SavedStream, window: int, backbone: str, modules: Mapping[int, TemporalAttention]) -> StreamState:
    """The inverse of `saved`, on the devices of the blocks.

    Raises:
        StreamError: naming all that doesn't fit.
    """
    problems = _problems(found, window, backbone, modules)
    if problems:
        raise StreamError(f"this state doesn't fit the stream: {'; '.join(problems)}. The stream is as before.")
    state = StreamState(window, found["frames"])
    if not state.frames:
        return state
    state.shape = (cast("int", found["positions"]), None if found["grid"] is None else tuple(found["grid"]))
    for index, recent in found["blocks"].items():
        device = modules[index].placement[0]
        cache = torch.zeros((*recent.shape[:2], window, *recent.shape[3:]), dtype=recent.dtype, device=device)
        slots = torch.arange(state.frames - recent.shape[2], state.frames, device=device) % window
        state.caches[index] = cache.index_copy_(2, slots, recent.detach().to(device))
    return state


def _problems(found: object, window: int, backbone: str, modules: Mapping[int, TemporalAttention]) -> list[str]:
    if not isinstance(found, Mapping):
        return [f"it is a {type(found).__name__}, not the mapping that state_dict() gives"]
    keys = {"format", "backbone", "window", "frames", "positions", "grid", "blocks"}
    if set(found) != keys:
        return [f"it has the keys {', '.join(map(str, found)) or 'none'}; expected {', '.join(sorted(keys))}"]
    expected = {"format": FORMAT, "backbone": backbone, "window": window}
    problems = [
        f"its {key} is {found[key]!r}, here {value!r}" for key, value in expected.items() if found[key] != value
    ]
    frames, positions, grid, blocks = (found[key] for key in ("frames", "positions", "grid", "blocks"))
    if not _is_count(frames) or not isinstance(blocks, Mapping):
        return [
            *problems,
            f"frames={frames!r} and blocks of type {type(blocks).__name__}; expected a number and a mapping",
        ]
    if frames == 0:
        return problems
    if not _is_count(positions) or not (
        grid is None or (isinstance(grid, (list, tuple)) and all(map(_is_count, grid)))
    ):
        return [*problems, f"positions={positions!r} and grid={grid!r}; expected numbers"]
    if set(blocks) != set(modules):
        return [*problems, f"it has the blocks {sorted(map(str, blocks))}, the adapter {sorted(map(str, modules))}"]
    for index, module in modules.items():
        shape = (2, positions, min(frames, window - 1), module.num_heads, module.head_dim)
        problems += _tensor_problems(index, blocks[index], shape)
    return problems


def _tensor_problems(index: int, tensor: object, shape: tuple[int, ...]) -> list[str]:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        return [f"block {index} has no floating-point tensor"]
    if tuple(tensor.shape) != shape:
        return [f"block {index} has the shape {tuple(tensor.shape)}, here {shape}"]
    return [] if tensor.isfinite().all() else [f"block {index} holds NaN or infinity"]


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
