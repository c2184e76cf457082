"""Time to import the package (over `import torch`), to inject into a 32-block tower, to save and to load its adapter.

Imports are timed in processes of their own, in turn. The adapter is that of Qwen2-VL's tower in bfloat16, 105 MB; it is
loaded from a disk whose cache is warm.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from common import ROOT, Report, benchmark_options, set_threads
from towers import FULL_DEPTH, tower

IMPORTS = {"import torch": "import torch", "import sta_adapter": "import torch, sta_adapter"}


def import_seconds(statement: str) -> float:
    """Seconds of an import in a fresh process, as that process sees them."""
    code = f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def injection_and_files(device: str, folder: Path, depth: int) -> Callable[[], dict[str, float]]:
    """A function that injects, saves, removes and loads once, and gives the seconds of each."""
    from sta_adapter import inject_sta, load_sta

    model: Any = tower(depth, device, torch.bfloat16)

    def once() -> dict[str, float]:
        seconds = {}
        start = time.perf_counter()
        handle = inject_sta(model)
        seconds["inject"] = time.perf_counter() - start
        start = time.perf_counter()
        handle.save_pretrained(folder)
        seconds["save"] = time.perf_counter() - start
        handle.remove()
        start = time.perf_counter()
        handle = load_sta(model, folder)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds["load"] = time.perf_counter() - start
        handle.remove()
        return seconds

    return once


@click.command()
@benchmark_options
@click.option("--depth", default=FULL_DEPTH, show_default=True, help="Blocks.")
def main(device: str, repeats: int, threads: int | None, out: Path, depth: int) -> None:
    """Measure what happens once: import, injection, saving, loading."""
    set_threads(threads)
    title = f"Import, and injection, saving and loading for a tower of {depth} blocks in bfloat16"
    report = Report("startup", title, device, out, ratio_label="time / first of its case")
    seconds: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for turn in range(repeats + 1):
        for name, statement in IMPORTS.items():
            elapsed = import_seconds(statement)
            if turn:  # the first reads the files from the disk
                seconds[name].append(elapsed)
    report.add("import", seconds)
    first, second = (statistics.median(found) for found in seconds.values())
    report.settings["import_over_torch_s"] = second - first
    click.echo(f"import over import torch: {second - first:.3f} s")
    with tempfile.TemporaryDirectory() as folder:
        once = injection_and_files(device, Path(folder), depth)
        once()
        rounds = [once() for _ in range(repeats)]
        report.settings["adapter_MB"] = sum(p.stat().st_size for p in Path(folder).glob("*.safetensors")) / 1e6
    report.add("adapter", {name: [r[name] for r in rounds] for name in rounds[0]})
    report.finish()


if __name__ == "__main__":
    main()
