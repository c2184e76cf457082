"""Whether every attention kernel that runs here computes what a float64 reference does, forward and backward.

Shapes are those of short and long clips at head sizes 64, 72, 80 and 88, whole and causal. A kernel that is wrong ends
this with an error.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import torch
from common import benchmark_options, circumstances, set_threads, use_checkout
from torch import Tensor

use_checkout()

DTYPES = {
    torch.float32: 1e-4,
    torch.bfloat16: 3e-2,
    torch.float16: 4e-3,
}  # largest difference, relative to the reference's largest value
BACKENDS = ("auto", "sdpa", "eager", "xformers")
REFUSED = "refused: "


def reference(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Attention of (P, T, H, D) in float64, written plainly."""
    scores = torch.einsum("pthd,pshd->phts", q, k) / q.shape[-1] ** 0.5
    if causal:
        scores = scores.masked_fill(
            torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1), -torch.inf
        )
    return torch.einsum("phts,pshd->pthd", scores.softmax(-1), v)


def largest_difference(found: Tensor, expected: Tensor) -> float:
    """Relative to the expected values' largest."""
    return float((found.detach().double() - expected.detach()).abs().max() / expected.detach().abs().max())


def check(backend: str, dtype: torch.dtype, shape: tuple[int, int, int, int], causal: bool, device: str) -> Any:
    """The largest differences of output and gradients; or why the kernel refuses the call."""
    from sta_adapter import attend
    from sta_adapter.errors import STAError

    torch.manual_seed(0)
    leaves = [torch.randn(shape, device=device).to(dtype).requires_grad_(True) for _ in range(3)]
    exact = [leaf.detach().double().requires_grad_(True) for leaf in leaves]
    weight = torch.randn(shape, device=device).to(dtype)
    try:
        out = attend(*leaves, causal=causal, backend=backend)
        grads = torch.autograd.grad(out, leaves, weight)
    except (STAError, NotImplementedError) as error:
        return REFUSED + str(error).splitlines()[0][:120]
    expected = reference(*exact, causal)
    expected_grads = torch.autograd.grad(expected, exact, weight.double())
    pairs = zip([out, *grads], [expected, *expected_grads], strict=True)
    return max(largest_difference(one, other) for one, other in pairs)


@click.command(help=__doc__)
@benchmark_options
@click.option("--positions", type=int, help="[default: 16 on the CPU, 1024 on a GPU]")
def main(device: str, repeats: int, threads: int | None, out: Path, positions: int | None) -> None:
    """Check every kernel and write what was found."""
    set_threads(threads)
    count = positions or (1024 if device == "cuda" else 16)
    rows, wrong = [], []
    for backend in BACKENDS:
        for dtype, most in DTYPES.items():
            for frames, head_dim in ((4, 80), (8, 64), (16, 72), (32, 88), (64, 80)):
                for causal in (False, True):
                    found = check(backend, dtype, (count, frames, 4, head_dim), causal, device)
                    case = f"{backend}, {str(dtype).partition('.')[2]}, T = {frames}, D = {head_dim}{', causal' if causal else ''}"
                    refused = isinstance(found, str)
                    rows.append(
                        {"case": case, "most": most, **({"refused": found} if refused else {"difference": found})}
                    )
                    if not refused and not found <= most:
                        wrong.append(f"{case}: {found:.2e}, at most {most:g}")
    out.mkdir(parents=True, exist_ok=True)
    record = {"name": "kernel-checks", "device": device, **circumstances(device), "checks": rows}
    (out / f"kernel-checks-{device}.json").write_text(json.dumps(record, indent=1) + "\n")
    refused = sum("refused" in row for row in rows)
    click.echo(f"{len(rows) - refused} of {len(rows)} calls run here, {refused} are refused, {len(wrong)} are wrong")
    if wrong:
        raise click.ClickException("; ".join(wrong))


if __name__ == "__main__":
    main()
