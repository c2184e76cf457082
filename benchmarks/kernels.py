"""Attention kernels on the branch's own shapes: q, k, v as strided views, T from 4 to 256, an equal number of tokens.

SDPA in float32 stands beside SDPA in 16 bits, as on the CPU; `varlen` is torch.nn.attention.varlen over packed
sequences, a candidate that the package doesn't use as long as nobody has measured a gain. "auto" is what the package
takes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from common import Report, benchmark_options, set_threads, use_checkout
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

use_checkout()

SDPA_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


def kernels() -> dict[str, Kernel]:
    """By name, each from q, k, v (P, T, H, D) to (P, T, H, D)."""
    from sta_adapter import attend

    return {
        "auto": attend,
        "SDPA": sdpa,
        **{f"SDPA {name}": partial(sdpa, one=one) for name, one in SDPA_BACKENDS.items()},
        "SDPA in float32": lambda q, k, v: sdpa(q.float(), k.float(), v.float()).to(q.dtype),
        "matrix products": lambda q, k, v: attend(q, k, v, backend="eager"),
        "xformers": lambda q, k, v: attend(q, k, v, backend="xformers"),
        "varlen": varlen,
    }


def sdpa(q: Tensor, k: Tensor, v: Tensor, one: SDPBackend | None = None) -> Tensor:
    """Torch's own choice of kernel, in the tensors' dtype; or one of them by name."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with contextlib.nullcontext() if one is None else sdpa_kernel(one):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def varlen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """All sequences packed into one."""
    from torch.nn.attention.varlen import varlen_attn

    count, length = q.shape[:2]
    starts = torch.arange(0, (count + 1) * length, length, dtype=torch.int32, device=q.device)
    packed = (x.flatten(0, 1).contiguous() for x in (q, k, v))
    return varlen_attn(*packed, starts, starts, length, length).view(q.shape)  # type: ignore[union-attr]


def call(kernel: Kernel, qkv: Tensor, backward: bool) -> Callable[[], None]:
    """The kernel on views of qkv (T, P, 3, H, D)."""

    def run() -> None:
        with torch.set_grad_enabled(backward):
            q, k, v = qkv.permute(1, 0, 2, 3, 4).unbind(2)
            out = kernel(q, k, v)
            if backward:
                torch.autograd.grad(out, qkv, torch.ones_like(out))

    return run


@click.command()
@benchmark_options
@click.option("--frames", default="4,8,16,32,64,256", show_default=True, help="Of the clips.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="[default: bf16]")
@click.option("--tokens", type=int, help="In all. [default: 2048 on the CPU, 16384 on a GPU]")
@click.option("--heads", default=4, show_default=True)
@click.option("--head-dim", default=80, show_default=True)
def main(
    device: str,
    repeats: int,
    threads: int | None,
    out: Path,
    frames: str,
    dtype: str | None,
    tokens: int | None,
    heads: int,
    head_dim: int,
) -> None:
    """Measure attention alone: forward, and forward with backward."""
    set_threads(threads)
    name = dtype or "bf16"
    tokens = tokens or (16384 if device == "cuda" else 2048)
    title = f"Attention alone, {heads} heads of {head_dim}, {name}, {tokens} tokens"
    report = Report(f"kernels-{name}", title, device, out, baseline="SDPA", ratio_label="time / SDPA")
    for length in map(int, frames.split(",")):
        shape = (length, tokens // length, 3, heads, head_dim)
        qkv = torch.randn(shape, device=device, dtype=DTYPES[name], requires_grad=True)
        for backward in (False, True):
            case = f"T = {length}, {'step' if backward else 'forward'}"
            calls = {}
            for kernel_name, kernel in kernels().items():
                run = call(kernel, qkv, backward)
                try:
                    run()
                except Exception as error:
                    report.note(case, kernel_name, f"{type(error).__name__}: {str(error).splitlines()[0][:80]}")
                else:
                    calls[kernel_name] = run
            report.measure(case, calls, repeats=repeats)
    report.finish()


if __name__ == "__main__":
    main()
