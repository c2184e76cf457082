"""What the benchmarks share: variants measured in turn, the machine they ran on, JSON, a table and a plot.

A benchmark is a click command with `benchmark_options`. It makes a `Report`, adds the rows of each case by
`report.measure("T = 8", {"untouched": f, "STA": g})` (or `report.add(...)` for numbers that are not times) and ends
with `report.finish()`, which prints the table and writes `results/NAME-DEVICE.json` and `.png`.
"""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "transformers", "peft", "vllm", "xformers", "triton", "numpy", "av", "decord", "torchcodec")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
MARKERS = "osD^vPX"


def use_checkout() -> None:
    """Import `sta_adapter` from this checkout where it is not installed: a GPU machine needs only the repository."""
    try:
        importlib.metadata.distribution("sta-adapter")
    except importlib.metadata.PackageNotFoundError:
        sys.path.insert(0, str(ROOT))
        import sta_adapter

        sta_adapter.__path__.append(str(ROOT))  # `backbones/` is installed as `sta_adapter.backbones`
        from sta_adapter.backbones.qwen2_vl import BACKBONE

        sta_adapter.register_backbone(BACKBONE)


def benchmark_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that every benchmark has: --device, --repeats, --threads, --out."""
    options = (
        click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True),
        click.option("--repeats", type=click.IntRange(min=1), default=7, show_default=True, help="Rounds."),
        click.option("--threads", type=click.IntRange(min=1), help="CPU threads. [default: torch's]"),
        click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=RESULTS, help="For the files."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def set_threads(threads: int | None) -> None:
    """Let torch use so many CPU threads; None leaves its own choice."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def measure_in_turn(
    variants: Mapping[str, Callable[[], Any]],
    *,
    repeats: int = 7,
    device: str = "cpu",
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each call: the variants take turns (A B A B ...), so that what else the machine does hits all alike.

    Args:
        variants: calls without arguments, by name. What they return is let go outside of the measured time.
        repeats: rounds.
        device: "cuda" waits for the GPU before and after each call.
        warmup: rounds before, not counted.
        clock: seconds, such as `time.process_time`, which other programs' turns on the processor don't count in.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for turn in range(warmup + repeats):
            for name, call in variants.items():
                elapsed = _time_once(call, device, clock)
                if turn >= warmup:
                    seconds[name].append(elapsed)
    finally:
        if enabled:
            gc.enable()
    return seconds


def _time_once(call: Callable[[], Any], device: str, clock: Callable[[], float]) -> float:
    synchronize(device)
    start = clock()
    result = call()
    synchronize(device)
    elapsed = clock() - start
    del result
    return elapsed


def synchronize(device: str) -> None:
    """Wait until a GPU has done what it was given."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and the quartiles around it."""
    if len(values) < 2:
        return {"median": values[0], "low": values[0], "high": values[0]}
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


@dataclass
class Report:
    """The rows of one benchmark, and where they go.

    Args:
        name: of the files, such as "forward".
        title: one line that says what was measured, with the sizes.
        device: "cpu" or "cuda".
        out: folder of the files.
        unit: of the rows' values.
        settings: anything else that a reader needs to repeat it.
        baseline: the variant that ratios are taken to; None: the first of each case.
        ratio_label: label of the plot's axis.
    """

    name: str
    title: str
    device: str = "cpu"
    out: Path = RESULTS
    unit: str = "s"
    settings: dict[str, Any] = field(default_factory=dict)
    baseline: str | None = None
    ratio_label: str = "time / untouched encoder"
    rows: list[dict[str, Any]] = field(default_factory=list)

    def measure(self, case: str, variants: Mapping[str, Callable[[], Any]], **options: Any) -> None:
        """Measure the variants of a case in turn (see `measure_in_turn`) and add a row for each."""
        self.add(case, measure_in_turn(variants, device=self.device, **options))

    def add(self, case: str, values: Mapping[str, Sequence[float]]) -> None:
        """Add a row for each variant; ratios are taken round by round, so that a slow moment counts in both."""
        baseline = values[self.baseline] if self.baseline in values else next(iter(values.values()))
        for variant, found in values.items():
            ratio = spread([a / b for a, b in zip(found, baseline, strict=True)])
            row = {"case": case, "variant": variant, "unit": self.unit, "rounds": len(found), **spread(found)}
            row |= {f"ratio_{key}" if key != "median" else "ratio": value for key, value in ratio.items()}
            self.rows.append(row)
            click.echo(describe(row))

    def note(self, case: str, variant: str, reason: str) -> None:
        """Add a row for what could not be measured, with the reason."""
        self.rows.append({"case": case, "variant": variant, "skipped": reason})
        click.echo(describe(self.rows[-1]))

    def finish(self) -> Path:
        """Write the JSON and the plot; returns the JSON's path."""
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / f"{self.name}-{self.device}.json"
        record = {"name": self.name, "title": self.title, "device": self.device, **circumstances(self.device)}
        record |= {"settings": self.settings, "ratio": self.ratio_label, "rows": self.rows}
        path.write_text(json.dumps(record, indent=1) + "\n")
        click.echo(path)
        try:
            plot(record, path.with_suffix(".png"))
        except ImportError:  # a GPU machine need have no matplotlib; the page has the same numbers
            click.echo(f"no plot: {path.stem} is a table only, matplotlib is not installed")
        return path


def describe(row: Mapping[str, Any]) -> str:
    """One line of the printed table."""
    head = f"{row['case']:<26} {row['variant']:<26}"
    if "skipped" in row:
        return f"{head} not measured: {row['skipped']}"
    value = f"{row['median']:.4g} {row['unit']} [{row['low']:.4g}, {row['high']:.4g}]"
    return f"{head} {value:<34} x {row['ratio']:.3f} [{row['ratio_low']:.3f}, {row['ratio_high']:.3f}]"


def circumstances(device: str) -> dict[str, Any]:
    """Date, command, versions and hardware of this run."""
    import torch

    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    hardware: dict[str, Any] = {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    # of the last minute, with this run's own; above the cores, others took part
    hardware["load"] = round(os.getloadavg()[0], 1)
    if device == "cuda":
        hardware["gpu"] = torch.cuda.get_device_name()
        versions["cuda"] = str(torch.version.cuda)
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    words = pairwise(["", *sys.argv[1:]])
    given = [word for before, word in words if before != "--out" and word.partition("=")[0] != "--out"]
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *given])
    return {"date": date, "command": command, "versions": versions, "hardware": hardware}


def cpu_name() -> str:
    """The processor, as the system names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def plot(record: Mapping[str, Any], path: Path) -> None:
    """Ratios by case, one colour and marker a variant, with the quartiles."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in record["rows"] if "skipped" not in row]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    figure, axes = plt.subplots(figsize=(max(6.0, 1.2 * len(cases) + 2), 4.2), layout="constrained")
    for index, variant in enumerate(variants):
        found = [row for row in rows if row["variant"] == variant]
        places = [cases.index(row["case"]) + 0.1 * (index - (len(variants) - 1) / 2) for row in found]
        ratios = [row["ratio"] for row in found]
        errors = [[r["ratio"] - r["ratio_low"] for r in found], [r["ratio_high"] - r["ratio"] for r in found]]
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        axes.errorbar(places, ratios, yerr=errors, fmt=marker, color=colour, capsize=3, label=variant)
    axes.axhline(1, color="0.5", linewidth=0.8)
    axes.set_xticks(range(len(cases)), cases, rotation=20 if len(cases) > 4 else 0)
    axes.set_ylabel(f"{record['ratio']}\n(median of the rounds, quartiles)")
    axes.set_title(record["title"], fontsize=9, wrap=True)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
