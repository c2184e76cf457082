"""What STA does with a clip, as arrays: attention weights, where they cross frames, how much is added, what changes.

`observe` gives everything, the other functions one array each; `sta_adapter.visualization.figures` draws them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sta_adapter.errors import ConfigError, LayoutError
from sta_adapter.injection.handle import STAHandle
from sta_adapter.visualization.patch_attention import BUDGET, Pooling, choose_pooling, encode, may_see, pool
from sta_adapter.visualization.recorder import AttentionRecorder, Kept, Recording


@dataclass(frozen=True)
class Observation:
    """What STA did with one clip of T frames and N positions, in B blocks with H heads each.

    Attributes:
        blocks: (B,) the blocks' indices in the encoder.
        attention: (B, H, T, T) float32, weight of each key frame (last axis) for each query frame, mean over positions.
        crossing: (B, T, N) float32, share of each token's attention that goes to frames other than its own, from 0 to
            1, mean over heads. Without STA it is 0 in every encoder whose own attention stays within a frame.
        branch: (B, T, N) float32, length (L2 norm over channels) of what STA adds to each token, divided by the length
            of what it is added to, the block's residual stream.
        change: (T, N) float32, for the output of the encoder's last block: the length of the difference between STA on
            and STA off, divided by the length with STA off.
        even: (T,) float32, what `crossing` is when a token's attention is spread evenly over all frames it may see.
        positions: (rows, columns) int64, which of the N positions stands there on the picture; None if not known.
        no_picture: why `positions` is None, else "".
        lands_elsewhere: whether the result of a token's attention is added to another token, as in the published
            code's token order. `attention` and `crossing` belong to the token that looks, `branch` and `change` to the
            one that receives.
        patches: (B, H or 1, rows, columns, T, T) uint8, the attention of cells of patches relative to even, as codes of
            `sta_adapter.visualization.patch_attention`; None where the picture is not known, or where it would be too
            much.
        pooling: how many patches make a cell, whether heads are apart, and how many blocks fit a page; None as above.
    """

    blocks: tuple[int, ...]
    attention: np.ndarray
    crossing: np.ndarray
    branch: np.ndarray
    change: np.ndarray
    even: np.ndarray
    positions: np.ndarray | None
    no_picture: str
    lands_elsewhere: bool
    patches: np.ndarray | None = None
    pooling: Pooling | None = None

    @property
    def relative(self) -> np.ndarray:
        """`attention` (B, H, T, T) as a multiple of what even spread would give; NaN where a frame may not look."""
        multiple = self.attention / (1 - self.even)[:, None]
        return np.where(may_see(self.even), multiple, np.float32("nan"))

    @property
    def relative_crossing(self) -> np.ndarray:
        """`crossing` (B, T, N) as a multiple of what even spread would give; 1 where a frame may only look at itself."""
        even = np.where(self.even > 0, self.even, 1)[:, None]
        return np.where(self.even[:, None] > 0, self.crossing / even, 1)

    def on_picture(self, values: np.ndarray) -> np.ndarray:
        """Lay values (..., N) out as pictures (..., rows, columns); a LayoutError where that is not known."""
        if self.positions is None:
            raise LayoutError(self.no_picture)
        return values[..., self.positions]


def observe(
    handle: STAHandle, inputs: Mapping[str, object], *, clip: int = 0, patch_budget: int = BUDGET
) -> Observation:
    """Run the model twice, with STA on and off, and note what STA did with one clip.

    Args:
        handle: of the injected model, which runs in its present mode (call `model.eval()` first), without gradients.
        inputs: keyword arguments of `handle.model`, as its processor makes them.
        clip: which of the clips in `inputs`, counted from 0 in the order in which the encoder gets them.
        patch_budget: bytes that `Observation.patches` may take of the blocks that fit; patches are pooled until they
            do.

    Raises:
        LayoutError: `inputs` have no such clip.
        ConfigError: STA is switched off, or has been removed.
    """

    def summarise(weights: Tensor) -> tuple[Tensor, Tensor, np.ndarray | None]:
        own = weights.diagonal(dim1=-2, dim2=-1)  # (heads, positions, T)
        (heads, _, frames, _), positions = weights.shape, recorder.recording.positions
        cells = None
        if positions is not None:
            rows, columns = positions.shape
            pooling = choose_pooling(len(handle.blocks), heads, (rows, columns), frames, patch_budget)
            if pooling is not None:
                kept.append(pooling)
                cells = encode(pool(weights, positions, pooling), may_see(_even(handle, frames)))
        return weights.mean(1).cpu(), (1 - own).mean(0).t().cpu(), cells

    kept: list[Pooling] = []
    recorder = AttentionRecorder(handle, clip, summarise)
    with recorder, torch.no_grad():
        handle.model(**inputs)
        seen = _found(recorder, handle)
        recorder.rewind()
        with handle.disabled():
            handle.model(**inputs)
    if recorder.before is None or recorder.after is None:
        raise LayoutError("the encoder's last block gave no tensor that could be compared with STA on and off.")
    frames, positions = seen.clip
    change = (recorder.after - recorder.before).norm(dim=-1) / recorder.before.norm(dim=-1).clamp_min(1e-12)
    cells = [found for _, _, found in seen.attention.values() if found is not None]
    return Observation(
        blocks=tuple(seen.attention),
        attention=torch.stack([mean for mean, _, _ in seen.attention.values()]).numpy(),
        crossing=torch.stack([share for _, share, _ in seen.attention.values()]).numpy(),
        branch=torch.stack(list(seen.branch.values())).numpy(),
        change=change.view(frames, positions).cpu().numpy(),
        even=_even(handle, frames),
        positions=None if seen.positions is None else seen.positions.cpu().numpy(),
        no_picture=seen.no_picture,
        lands_elsewhere=handle.config.token_order == "published" and min(frames, positions) > 1,
        patches=np.stack(cells) if cells else None,
        pooling=kept[0] if kept else None,
    )


def temporal_attention(handle: STAHandle, inputs: Mapping[str, object], *, clip: int = 0) -> dict[int, np.ndarray]:
    """Attention weights over the frames of one clip, in every block with STA.

    Args:
        handle: of the injected model; it runs once, in its present mode, without gradients.
        inputs: keyword arguments of `handle.model`, as its processor makes them.
        clip: which of the clips in `inputs`, counted from 0 in the order in which the encoder gets them.

    Returns:
        By block index, float32 arrays (heads, positions, T, T): weight of each key frame (last axis) for each query
        frame; the last axis sums to 1. Positions are in the encoder's order, see `Observation.positions`.

    Raises:
        LayoutError: `inputs` have no such clip.
        ConfigError: STA is switched off, or has been removed.
    """
    return {block: weights.numpy() for block, weights in _run(handle, inputs, clip).attention.items()}


def crossing_map(handle: STAHandle, inputs: Mapping[str, object], *, clip: int = 0) -> dict[int, np.ndarray]:
    """Share of each token's attention that goes to frames other than its own.

    Arguments and errors are those of `temporal_attention`.

    Returns:
        By block index, float32 arrays (T, N) from 0 to 1, mean over heads.
    """
    weights = temporal_attention(handle, inputs, clip=clip)
    return {block: (1 - w.diagonal(axis1=-2, axis2=-1)).mean(0).T for block, w in weights.items()}


def branch_sizes(handle: STAHandle, inputs: Mapping[str, object], *, clip: int = 0) -> dict[int, np.ndarray]:
    """Length of what STA adds to each token, divided by the length of the residual stream that it is added to.

    Arguments and errors are those of `temporal_attention`.

    Returns:
        By block index, float32 arrays (T, N); 0 everywhere for an adapter that starts at zero.
    """
    return {block: sizes.numpy() for block, sizes in _run(handle, inputs, clip).branch.items()}


def _even(handle: STAHandle, frames: int) -> np.ndarray:
    """(T,) float32, share of evenly spread attention that goes to frames other than the own one."""
    visible = torch.arange(1, frames + 1) if handle.config.causal else torch.full((frames,), frames)
    visible = visible.clamp(max=handle.config.window or frames)
    return ((visible - 1) / visible).float().numpy()


def _run(handle: STAHandle, inputs: Mapping[str, object], clip: int) -> Recording[Tensor]:
    recorder = AttentionRecorder(handle, clip, lambda weights: weights.cpu())
    with recorder, torch.no_grad():
        handle.model(**inputs)
    return _found(recorder, handle)


def _found(recorder: AttentionRecorder[Kept], handle: STAHandle) -> Recording[Kept]:
    """What was seen, or the reason why nothing was."""
    if not handle.blocks:
        raise ConfigError("this handle's STA has been removed from the model; inject or load again.")
    if not handle._injection.is_enabled:
        raise ConfigError("STA is switched off, so there is nothing to see; call handle.enable() first.")
    if not recorder.recording.attention:
        raise LayoutError(f"clip {recorder.clip} was asked for; the inputs hold {recorder.clips}, counted from 0.")
    return recorder.recording
