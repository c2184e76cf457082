"""The rotary embedding on the index of a token's frame: the paper's 1-d RoPE, by half-rotation over the whole head size."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_tables(frames: range, head_dim: int, theta: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cos and signed sin, each (frames, head_dim).

    Each half is times cos, and the other one times sin, which is negative for the first. The angles are in float64, as
    float32 is off by 0.004 at frame 100,000; the tables come in the dtype and on the device of `like`.
    """
    device = torch.device("cpu") if like.device.type == "mps" else like.device  # MPS has no float64
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / -head_dim
    frequencies = theta**exponents
    indices = torch.arange(frames.start, frames.stop, dtype=torch.float64, device=device).view(-1, 1)
    angles = indices * torch.cat([-frequencies, frequencies])  # cos is even and sin is odd, to the last bit
    return angles.cos().to(like), angles.sin().to(like)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (..., D) by tables (T, D), which fit it by broadcasting."""
    return x.roll((x.shape[-1] // 2,), (-1,)).mul_(sin).addcmul_(x, cos)


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """`apply_rotary` in place."""
    torch.addcmul(x.roll((x.shape[-1] // 2,), (-1,)).mul_(sin), x, cos, out=x)


def rotary_gradient(grad: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """Write the gradient of `apply_rotary` at x, from that at its output, into `out`; `grad` is overwritten.

    The transpose of a rotation is the one back.
    """
    other = grad.roll(grad.shape[-1] // 2, -1)
    torch.addcmul(grad.mul_(cos), other, sin, value=-1, out=out)
