"""ClipLayout: how the tokens of one encoder forward split into clips, frames and positions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from sta_adapter.errors import LayoutError

ClipLengths = tuple[int | tuple[int, int], ...]  # of each clip, its frames or (frames, rows of each frame)


class ClipLayout:
    """Where each token of a forward stands: which clip, which frame, which position.

    The encoder's tokens are a tensor of shape (tokens, C) or (rows, tokens, C). Without the first `prefix` tokens of
    each row (class tokens, which pass by), and flattened, they are the clips one after the other, each frame by frame:
    `(clip frame position)`.

    Args:
        clips: (frames, positions) of each clip, in order.
        prefix: leading tokens of each row that belong to no frame position.

    Raises:
        LayoutError: when a clip has no frame or no position.
    """

    def __init__(self, clips: Iterable[tuple[int, int]], *, prefix: int = 0) -> None:
        self.clips = tuple((int(t), int(n)) for t, n in clips)
        self.prefix = prefix
        self._tables: dict[tuple[object, ...], Tensor | tuple[Tensor, Tensor]] = {}
        for index, (frames, positions) in enumerate(self.clips):
            if frames < 1 or positions < 1:
                raise LayoutError(
                    f"clip {index} has {frames} frames of {positions} positions; expected at least 1 of each."
                )

    def __repr__(self) -> str:
        return f"ClipLayout({list(self.clips)}, prefix={self.prefix})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ClipLayout) and (self.clips, self.prefix) == (other.clips, other.prefix)

    def __hash__(self) -> int:
        return hash((self.clips, self.prefix))

    @cached_property
    def num_tokens(self) -> int:
        """Tokens in all clips, without the prefix ones."""
        return sum(t * n for t, n in self.clips)

    @cached_property
    def max_frames(self) -> int:
        """Frames of the longest clip."""
        return max((t for t, _ in self.clips), default=0)

    @cached_property
    def is_uniform(self) -> bool:
        """Whether all clips have the same number of frames and positions."""
        return len(set(self.clips)) <= 1

    @cached_property
    def groups(self) -> tuple[tuple[int, int], ...]:
        """(frames, positions) over all clips of equal length, shortest first: the order of `gather_index`."""
        totals: dict[int, int] = {}
        for frames, positions in self.clips:
            totals[frames] = totals.get(frames, 0) + positions
        return tuple(sorted(totals.items()))

    def patches(self, tokens: Tensor) -> Tensor:
        """View of the tokens that belong to frames.

        Args:
            tokens: (tokens, C) or (rows, tokens, C), with prefix tokens.

        Raises:
            LayoutError: when the number of tokens is not that of the layout.
        """
        found = tokens[..., self.prefix :, :] if self.prefix else tokens
        if found.shape[:-1].numel() != self.num_tokens:
            raise LayoutError(
                f"the encoder's tokens have the shape {tuple(tokens.shape)}, but the clips of this forward, "
                f"(frames, positions) = {list(self.clips)} with {self.prefix} class tokens a row, have {self.num_tokens} tokens. "
                "The backbone's layout function does not fit this encoder."
            )
        return found

    def gather_index(self, device: torch.device) -> Tensor:
        """Indices (tokens,) that bring flattened tokens into the order `(group frame position)`, see `groups`."""
        return self._cached(("gather", device), lambda: self._gather_index().to(device))

    def scatter_index(self, device: torch.device) -> Tensor:
        """The inverse of `gather_index`."""
        return self._cached(("scatter", device), lambda: torch.argsort(self.gather_index(device)))

    def _gather_index(self) -> Tensor:
        starts = []
        start = 0
        for frames, positions in self.clips:
            starts.append(start)
            start += frames * positions
        parts = []
        for length, _ in self.groups:
            grids = [
                torch.arange(s, s + t * n).view(t, n)
                for s, (t, n) in zip(starts, self.clips, strict=True)
                if t == length
            ]
            parts.append(torch.cat(grids, dim=1).flatten())
        return torch.cat(parts)

    def published_index(self, device: torch.device) -> Tensor:
        """Indices (tokens,) that take, for each clip, the token at `(position frame)` to `(frame position)`'s place.

        This is the order in which the released Qwen2-VL code adds its branch (STAConfig.token_order="published").
        """
        return self._cached(("published", device), lambda: self._published_index().to(device))

    def _published_index(self) -> Tensor:
        parts = []
        start = 0
        for frames, positions in self.clips:
            grid = torch.arange(start, start + frames * positions).view(frames, positions)
            parts.append(grid.t().flatten())
            start += frames * positions
        return torch.cat(parts)

    def single_frame_mask(self, device: torch.device) -> Tensor:
        """Booleans (tokens, 1): True where the token's clip has one frame only."""
        counts = torch.tensor([t * n for t, n in self.clips])
        single = torch.tensor([t == 1 for t, _ in self.clips])
        return self._cached(("single", device), lambda: single.repeat_interleave(counts)[:, None].to(device))

    def rotary_tables(
        self, head_dim: int, theta: float, device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Cos and sin, each (max_frames, 1, head_dim), of the rotary embedding on the frame index.

        Half-rotation over the whole head size, as in the paper's 1-d RoPE; computed in float32, given in `dtype`. The
        tables are made once per forward and shared by its blocks.
        """
        key = ("rotary", head_dim, theta, device, dtype)
        if key not in self._tables:
            inverse = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
            angles = torch.outer(torch.arange(self.max_frames, dtype=torch.float32, device=device), inverse)
            angles = torch.cat([angles, angles], dim=-1)[:, None]
            self._tables[key] = (angles.cos().to(dtype), angles.sin().to(dtype))
        tables = self._tables[key]
        return tables[0], tables[1]

    def _cached(self, key: tuple[object, ...], make: object) -> Tensor:
        if key not in self._tables:
            self._tables[key] = make()  # type: ignore[operator]
        table = self._tables[key]
        return table if isinstance(table, Tensor) else table[0]


def checked_lengths(lengths: Sequence[int]) -> ClipLengths:
    """Clip lengths as a tuple of whole numbers above 0.

    Raises:
        LayoutError: for anything else.
    """
    try:
        found = tuple(int(n) for n in lengths)
        exact = all(float(n) == float(m) for n, m in zip(found, lengths, strict=True))
    except (TypeError, ValueError):
        found, exact = (), False
    if not exact or not found or min(found) < 1:
        raise LayoutError(
            f"clip lengths {lengths!r}: expected the number of frames of each clip, whole numbers above 0."
        )
    return found
