"""Every benchmark of the encoder, each in a process of its own, so that one failure does not lose the others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
from common import RESULTS, benchmark_options

PARTS: dict[str, list[str]] = {
    "startup": ["startup.py"],
    "forward": ["forward.py", "--part", "forward"],
    "lengths": ["forward.py", "--part", "lengths"],
    "packed": ["forward.py", "--part", "packed"],
    "step": ["training_step.py", "--kinds", "STA"],
    "step-lora": ["training_step.py", "--kinds", "LoRA + STA"],
    "step-checkpointed": ["training_step.py", "--kinds", "checkpointed"],
    "kernels-bf16": ["kernels.py", "--dtype", "bf16"],
    "kernels-fp32": ["kernels.py", "--dtype", "fp32"],
    "compiled": ["compiled.py"],
    "host-time": ["host_time.py", "--threads", "1"],
    "streaming": ["streaming.py"],
}


@click.command()
@benchmark_options
@click.option("--only", help=f"Some of {','.join(PARTS)}.")
@click.option("--limit", default=1200, show_default=True, help="Seconds that a part may take.")
def main(device: str, repeats: int, threads: int | None, out: Path, only: str | None, limit: int) -> None:
    """Run all parts, then write the page of results."""
    failed = []
    for name in only.split(",") if only else PARTS:
        script, *options = PARTS[name]
        command = [sys.executable, str(Path(__file__).with_name(script)), *options, "--device", device]
        command += ["--repeats", str(repeats), *(["--threads", str(threads)] if threads else [])]
        command += [] if out == RESULTS else ["--out", str(out)]
        click.echo(f"== {name}", err=True)
        try:
            status = subprocess.run(command, timeout=limit, check=False).returncode
        except subprocess.TimeoutExpired:
            status = -1
        if status:
            failed.append(name)
    if failed:
        raise click.ClickException(f"these parts failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
