"""What STAHandle.explain() gives: the calls of the attention kernel, each with the kernel and the reason for it."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from sta_adapter.attention.kernels import choose_kernel
from sta_adapter.attention.layout import ClipLayout


@dataclass(frozen=True)
class KernelCall:
    """One call of an attention kernel, as each block makes it.

    Attributes:
        positions: independent sequences: the positions of all clips of this length.
        frames: tokens of each sequence.
        heads: heads of the branch.
        head_dim: size of a head.
        dtype: of queries, keys and values.
        device: "cpu", "cuda", ...
        kernel: "xformers", "sdpa", "eager" (batched matrix products) or "none".
        reason: why this one.
    """

    positions: int
    frames: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    device: str
    kernel: str
    reason: str

    def __str__(self) -> str:
        shape = f"{self.positions} positions x {self.frames} frames, {self.heads} heads of {self.head_dim}"
        return f"{shape}, {self.dtype} on {self.device}: {self.kernel} ({self.reason})"


def calls_of(layout: ClipLayout, like: Tensor, requested: str) -> tuple[KernelCall, ...]:
    """The calls for a layout, for queries of the dtype, device, heads and head size of `like` (..., H, D).

    Raises:
        BackendError: the kernel asked for by name can't be used.
    """
    return _calls(layout.groups, *like.shape[-2:], like.dtype, like.device.type, requested)


@functools.lru_cache(maxsize=256)
def _calls(
    groups: tuple[tuple[int, int], ...], heads: int, head_dim: int, dtype: torch.dtype, device: str, requested: str
) -> tuple[KernelCall, ...]:
    calls = []
    for frames, positions in groups:
        kernel, reason = choose_kernel(device, dtype, head_dim, requested)
        if frames == 1:
            kernel, reason = "none", "a softmax over one frame is 1"
        calls.append(KernelCall(positions, frames, heads, head_dim, dtype, device, kernel, reason))
    return tuple(calls)
