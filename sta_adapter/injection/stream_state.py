"""What a stream keeps of its frames, as plain values to save as well, and one call of the encoder on the way into it.

Keys are kept with their rotation for the absolute index of their frame: attention between two frames then depends on
their distance alone, and nothing is rotated twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TypedDict, cast

import torch
from einops import rearrange
from torch import Tensor

from sta_adapter.attention.explain import KernelCall, calls_of
from sta_adapter.attention.kernels import attend
from sta_adapter.attention.layout import ClipLayout
from sta_adapter.attention.module import TemporalAttention
from sta_adapter.attention.rotary import apply_rotary, rotary_tables
from sta_adapter.compatibility.seams import uncompiled
from sta_adapter.errors import LayoutError, StreamError

FrameShape = tuple[int, tuple[int, ...] | None]  # patch positions; rows and columns, where known
FORMAT = 1


@dataclasses.dataclass
class StreamState:
    """The frames that a stream has seen, as far as later ones look back."""

    window: int  # frames that a frame attends to, itself among them
    frames: int = 0  # how many were seen
    shape: FrameShape | None = None  # of each of them; None before the first
    # by the block's index its keys and values (2, positions, window, heads, head size); frame f is at f % window
    caches: dict[int, Tensor] = dataclasses.field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Memory of the caches."""
        return sum(cache.nbytes for cache in self.caches.values())

    def recent(self, index: int) -> Tensor:
        """A block's keys and values (2, positions, frames, heads, head size) that the next frame sees, oldest first."""
        first = self.frames - min(self.frames, self.window - 1)
        slots = torch.arange(first, self.frames, device=self.caches[index].device) % self.window
        return self.caches[index].index_select(2, slots)


class Chunk:
    """The next frames of one stream, on their way through the blocks; the stream is as before until `commit`."""

    def __init__(self, name: str, state: StreamState, frames: int, shape: FrameShape) -> None:
        if state.shape not in (None, shape):
            raise LayoutError(
                f"stream {name!r} has {state.frames} frames of {_describe(state.shape)}, and got frames of {_describe(shape)}. "
                "All frames of a stream have one size: resize them, or start again with stream.reset()."
            )
        self.name = name
        self.state = state
        self.frames = frames
        self.shape = shape
        self._caches: dict[int, Tensor] = {}
        self._new: dict[int, Tensor] = {}
        self._tables: dict[object, tuple[Tensor, Tensor]] = {}

    def tables(self, branch: TemporalAttention, theta: float, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cos and sin (frames, 1, head size) for these frames' indices in the stream."""
        key = (branch.head_dim, theta, like.device, like.dtype)
        if key not in self._tables:
            start = self.state.frames
            cos, sin = rotary_tables(range(start, start + self.frames), branch.head_dim, theta, like)
            self._tables[key] = cos[:, None], sin[:, None]
        return self._tables[key]

    def mix(self, index: int, branch: TemporalAttention, qkv: Tensor) -> Tensor:
        """(positions, frames, 3, heads, head size) -> (positions, frames, heads, head size)."""
        q, k, v = qkv.unbind(2)
        if branch.config.rope_theta is not None:
            cos, sin = self.tables(branch, branch.config.rope_theta, qkv)
            q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        new = torch.stack([k, v])
        cache = self._caches[index] = self._cache(index, new)
        window, seen, backend = self.state.window, self.state.frames, branch.config.attention
        if (
            self.frames == 1
        ):  # its place holds a frame that no later one looks back to: written at once, nothing is copied
            cache[:, :, seen % window] = new[:, :, 0]
            keys, values = cache[:, :, : min(seen + 1, window)]
            return attend(q, keys, values, causal=True, backend=backend)
        keys, values = torch.cat([self.state.recent(index), new], dim=2) if seen else new
        self._new[index] = new[:, :, -window:]
        return attend(q, keys, values, causal=True, window=window, backend=backend)

    def _cache(self, index: int, new: Tensor) -> Tensor:
        """The block's cache; a new one, where this is the first chunk."""
        cache = self.state.caches.get(index)
        if cache is None:
            positions, _, heads, head_dim = new.shape[1:]
            shape = (2, positions, self.state.window, heads, head_dim)
            try:
                with torch.inference_mode(False):  # else it could be written to in inference mode alone
                    return torch.zeros(shape, dtype=new.dtype, device=new.device)
            except RuntimeError as error:
                raise StreamError(
                    f"no memory for stream {self.name!r}: a block keeps {2 * new[0, :, 0].nbytes * self.state.window:,} bytes "
                    f"({error}). Use a smaller window or smaller frames."
                ) from error
        if (cache.dtype, cache.device) != (new.dtype, new.device):
            raise StreamError(
                f"stream {self.name!r} was computed in {cache.dtype} on {cache.device} so far, and now in {new.dtype} on "
                f"{new.device}. Go on as before, or start again with stream.reset()."
            )
        return cache

    def commit(self) -> None:
        """Make these frames part of the stream."""
        state, last = self.state, self.state.frames + self.frames
        for index, new in self._new.items():
            slots = torch.arange(last - new.shape[2], last, device=new.device) % state.window
            self._caches[index].index_copy_(2, slots, new)
        state.caches, state.shape, state.frames = self._caches, self.shape, last


class StreamCall:
    """One call of the encoder: a chunk of each stream, in order. It is the `Past` of that call's layout."""

    def __init__(self, chunks: Sequence[Chunk], indices: dict[TemporalAttention, int]) -> None:
        self.chunks = chunks
        self.indices = indices
        self._ran: set[int] = set()

    def prepare(self, branch: TemporalAttention, like: Tensor) -> tuple[KernelCall, ...]:
        """Make the rotary tables, and choose the kernels: those for a full window."""
        if branch.config.rope_theta is not None:
            for chunk in self.chunks:
                chunk.tables(branch, branch.config.rope_theta, like)
        return calls_of(ClipLayout((c.state.window, c.shape[0]) for c in self.chunks), like, branch.config.attention)

    @uncompiled
    def mix_frames(self, branch: TemporalAttention, qkv: Tensor) -> Tensor:
        """As `frame_attention.mix_frames`, over the frames before these as well: (tokens, 3 h d) -> (tokens, h d)."""
        index = self.indices[branch]
        if index in self._ran:
            raise LayoutError(f"block {index} ran twice in one call of the encoder, so a stream can't tell its frames.")
        self._ran.add(index)
        parts = torch.split(qkv, [chunk.frames * chunk.shape[0] for chunk in self.chunks])
        outs = []
        for chunk, part in zip(self.chunks, parts, strict=True):
            fold = rearrange(part, "(t n) (k h d) -> n t k h d", t=chunk.frames, k=3, h=branch.num_heads)
            outs.append(rearrange(chunk.mix(index, branch, fold), "n t h d -> (t n) (h d)"))
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def commit(self) -> None:
        """All streams go on, or none.

        Raises:
            LayoutError: some of the blocks have not run.
        """
        if missing := sorted(set(self.indices.values()) - self._ran):
            raise LayoutError(
                f"blocks {missing} did not run in this call of the encoder, so a stream can't go on from it; all streams are "
                "as before the call."
            )
        for chunk in self.chunks:
            chunk.commit()


def _describe(shape: FrameShape | None) -> str:
    positions, grid = shape or (0, None)
    return f"{positions} patches" + ("" if grid is None else f" ({' x '.join(map(str, grid))})")


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
