"""ClipLayout: how the tokens of one encoder forward split into clips, frames and positions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from sta_adapter.attention.rotary import rotary_tables
from sta_adapter.errors import LayoutError

if TYPE_CHECKING:
    from sta_adapter.attention.block_function import Kind
    from sta_adapter.attention.explain import KernelCall
    from sta_adapter.attention.module import TemporalAttention

ClipLengths = tuple[int | tuple[int, int], ...]  # of each clip, its frames or (frames, rows of each frame)


class AllRows(tuple[int, ...]):
    """Clip lengths for any number of rows, all of them frames of one clip."""


class EachRow(tuple[int, ...]):
    """Clip lengths for any number of rows, each a clip of one frame: pictures, or tiles of pictures."""


ALL_ROWS: ClipLengths = AllRows((1,))
EACH_ROW: ClipLengths = EachRow((1,))


class Past(Protocol):
    """What a layout's clips go on from, when they are the next frames of streams; see `sta_adapter.live`."""

    def prepare(self, branch: TemporalAttention, like: Tensor) -> tuple[KernelCall, ...]:
        """As `TemporalAttention.prepare`; `like` has the dtype, device, heads and head size of the queries."""

    def mix_frames(self, branch: TemporalAttention, qkv: Tensor) -> Tensor:
        """As `frame_attention.mix_frames`, over the frames before these as well."""

    def commit(self) -> None:
        """The forward is over: its frames belong to the past from here on."""


class ClipLayout:
    """Where each token of a forward stands: which clip, which frame, which position.

    The encoder's tokens are a tensor of shape (tokens, C) or (rows, tokens, C). Without the first `prefix` and the last
    `suffix` tokens of each row (class tokens, which pass by), and flattened, they are the clips one after the other, each
    frame by frame: `(clip frame position)`.

    Args:
        clips: (frames, positions) of each clip, in order.
        prefix: leading tokens of each row that belong to no frame position.
        suffix: trailing ones.
        rows: of tokens (rows, tokens, C), where their number is known; tokens (tokens, rows, C) are refused then.
        past: what the clips go on from; None for clips that begin here.

    Attributes:
        groups: (frames, positions) over all clips of equal length, shortest first: the order of `gather_index`.
        num_tokens: tokens in all clips, without the class tokens.
        max_frames: frames of the longest clip.
        is_uniform: whether all clips have the same number of frames and positions.
        is_gathered: whether clips of equal length lie apart, or have frames of several sizes, so that `gather_index` brings
            them together.
        batches: (clips, frames, positions) of the tokens that attention takes at once, in their own order or in that of
            `gather_index`.
        kinds: what the blocks of a kind share in this forward, see `block_function`.

    Raises:
        LayoutError: when a clip has no frame or no position.
    """

    def __init__(
        self,
        clips: Iterable[tuple[int, int]],
        *,
        prefix: int = 0,
        suffix: int = 0,
        rows: int | None = None,
        past: Past | None = None,
    ) -> None:
        self.clips = tuple((int(t), int(n)) for t, n in clips)
        self.prefix = prefix
        self.suffix = suffix
        self.rows = rows
        self.past = past
        for index, (frames, positions) in enumerate(self.clips):
            if frames < 1 or positions < 1:
                raise LayoutError(
                    f"clip {index} has {frames} frames of {positions} positions; expected at least 1 of each."
                )

        totals: dict[int, int] = {}
        for frames, positions in self.clips:
            totals[frames] = totals.get(frames, 0) + positions
        self.groups = tuple(sorted(totals.items()))
        self.num_tokens = sum(t * n for t, n in self.clips)
        self.max_frames = max(totals, default=0)
        self.is_uniform = len(set(self.clips)) <= 1
        neighbours = _neighbours(self.clips)
        self.is_gathered = len(neighbours) > len(self.groups) > 0
        self.batches = [(1, *group) for group in self.groups] if self.is_gathered else neighbours
        self._tables: dict[tuple[object, ...], tuple[Tensor, ...]] = {}
        self.kinds: dict[tuple[object, ...], Kind] = {}

    def __repr__(self) -> str:
        suffix = f", suffix={self.suffix}" if self.suffix else ""
        return f"ClipLayout({list(self.clips)}, prefix={self.prefix}{suffix})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ClipLayout) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[object, ...]:
        return self.clips, self.prefix, self.suffix

    def require_rows(self, tokens: Tensor) -> None:
        """Raise a LayoutError for tokens of three axes whose first one is not the layout's rows."""
        if self.rows is not None and tokens.dim() == 3 and tokens.shape[0] != self.rows:
            raise LayoutError(
                f"the blocks get tokens of the shape {tuple(tokens.shape)}; expected ({self.rows} rows, tokens, C). STA can't "
                "serve blocks that take (tokens, rows, C), as torch's do with batch_first=False."
            )

    def patches(self, tokens: Tensor) -> Tensor:
        """View of those tokens (tokens, C) or (rows, tokens, C) that belong to frames, without class tokens.

        Raises:
            LayoutError: when the number of tokens or rows is not that of the layout.
        """
        self.require_rows(tokens)
        found = tokens[..., self.prefix : tokens.shape[-2] - self.suffix, :] if self.prefix or self.suffix else tokens
        count = found.shape[0] if found.dim() == 2 else found.shape[:-1].numel()
        if count != self.num_tokens:
            raise LayoutError(
                f"the encoder's tokens have the shape {tuple(tokens.shape)}, but the clips of this forward, "
                f"(frames, positions) = {list(self.clips)} with {self.prefix + self.suffix} class tokens a row, have {self.num_tokens} tokens. "
                "The backbone's layout function does not fit this encoder."
            )
        return found

    def gather_index(self, device: torch.device) -> Tensor:
        """Indices (tokens,) that bring flattened tokens into the order `(group frame position)`, see `groups`."""

        def make() -> Tensor:
            grids = self._grids()
            parts = [torch.cat([g for g in grids if len(g) == length], dim=1).flatten() for length, _ in self.groups]
            return torch.cat(parts)

        return self._index("gather", device, make)

    def scatter_index(self, device: torch.device) -> Tensor:
        """The inverse of `gather_index`."""
        return self._index("scatter", device, lambda: torch.argsort(self.gather_index(torch.device("cpu"))))

    def published_index(self, device: torch.device) -> Tensor:
        """Indices (tokens,) that take, for each clip, the token at `(position frame)` to `(frame position)`'s place.

        This is the order in which the released Qwen2-VL code adds its branch (STAConfig.token_order="published").
        """
        return self._index("published", device, lambda: torch.cat([grid.t().flatten() for grid in self._grids()]))

    def single_frame_mask(self, device: torch.device) -> Tensor:
        """Booleans (tokens, 1): True where the token's clip has one frame only."""

        def make() -> Tensor:
            counts = torch.tensor([t * n for t, n in self.clips])
            return torch.tensor([t == 1 for t, _ in self.clips]).repeat_interleave(counts)[:, None]

        return self._index("single", device, make)

    def rotary_tables(self, head_dim: int, theta: float, like: Tensor) -> tuple[Tensor, Tensor]:
        """`rotary_tables` of the frames 0, 1, ... of the longest clip, made once per forward and shared by its blocks."""
        key = ("rotary", head_dim, theta, like.device, like.dtype)
        if (tables := self._tables.get(key)) is None:
            with torch.inference_mode(False):
                self._tables[key] = tables = rotary_tables(range(self.max_frames), head_dim, theta, like)
        cos, sin = tables
        return cos, sin

    def _grids(self) -> list[Tensor]:
        """Indices (frames, positions) of the tokens of each clip."""
        sizes = [t * n for t, n in self.clips]
        parts = torch.split(torch.arange(self.num_tokens), sizes)
        return [part.view(clip) for part, clip in zip(parts, self.clips, strict=True)]

    def _index(self, kind: str, device: torch.device, make: Callable[[], Tensor]) -> Tensor:
        if (kind, device) not in self._tables:
            with torch.inference_mode(False):  # the layout may be kept for a call that trains
                self._tables[kind, device] = (make().to(device),)
        return self._tables[kind, device][0]


def _neighbours(clips: Iterable[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """(clips, frames, positions) of clips that follow each other and have one size; pictures of any size are one."""
    found: list[tuple[int, int, int]] = []
    for frames, positions in clips:
        if found and frames == 1 == found[-1][1]:
            found[-1] = (1, 1, found[-1][2] + positions)
        elif found and found[-1][1:] == (frames, positions):
            found[-1] = (found[-1][0] + 1, frames, positions)
        else:
            found.append((1, frames, positions))
    return found or [(1, 1, 0)]


def checked_lengths(lengths: Sequence[int]) -> ClipLengths:
    """Clip lengths as a tuple of whole numbers above 0.

    Raises:
        LayoutError: for anything else.
    """
    try:
        given = [n.item() if hasattr(n, "item") else n for n in lengths]
        found = tuple(int(n) for n in given)
        exact = list(found) == given and not any(isinstance(n, bool) for n in given)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        found, exact = (), False
    if isinstance(lengths, (str, bytes, Mapping, Set)) or not exact or not found or min(found) < 1:
        raise LayoutError(
            f"clip lengths {lengths!r}: expected the number of frames of each clip, whole numbers above 0."
        )
    return found
