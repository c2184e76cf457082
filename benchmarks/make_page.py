"""Write the tables of docs/benchmarks.md from the committed JSON, so that no figure is typed by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from common import RESULTS, ROOT

PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN = "\n## Results\n"  # all below is written
GLANCE = (  # what is aimed at, of which benchmark, case and variant, and the bound on its ratio
    ("forward", "forward", "T = 8", "STA", "at most 1.10"),
    ("training step, STA alone", "step-sta", "STA", "STA", "at most 1.12"),
    ("training step, LoRA beside", "step-lora", "LoRA + STA", "STA", "at most 1.12"),
    ("training step, checkpointed", "step-checkpointed", "checkpointed", "STA", "at most 1.12"),
    ("memory of a step, STA alone", "memory-sta", "STA", "STA", "at most 1.15"),
    ("host time of a block, forward", "host-time", "forward, one clip", "STA", "at most 1.45"),
    ("host time of a block, step", "host-time", "step, all parameters, one clip", "STA", "at most 1.60"),
    ("clips a second of training the tiny base", "training-throughput", "stage two: LoRA", "STA", "at least 0.92"),
    ("samples a second, by the clock, to decord's frames", "data-loading", "4 s, 8 frames", "samples", "at least 0.80"),
    ("the same by a worker's CPU time", "data-loading", "4 s, 8 frames, by CPU time", "samples", "at least 0.80"),
    ("eight packed unequal clips, to one by one", "packed", "STA", "packed", "at most 1.00"),
    ("one frame in a stream, frame 10,000", "streaming", "frame 10,000", "STA", "at most 1.15"),
    ("T = 256, to T = 32", "lengths", "long against short", "STA, T = 256", "at most 1.10"),
)


def tables(folder: Path) -> str:
    """A section for each JSON of a benchmark in a folder."""
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    sections = [section(record) for record in records if "ratio" in record and "rows" in record]
    return "\n".join(sections) if sections else "No results are committed yet.\n"


def glance(folder: Path) -> str:
    """The main ratios beside what is aimed at, for each device that was measured."""
    lines: list[str] = []
    for device in ("cpu", "cuda"):
        for what, name, case, variant, aim in GLANCE:
            path = folder / f"{name}-{device}.json"
            rows = json.loads(path.read_text())["rows"] if path.exists() else []
            for row in rows:
                if (row["case"], row["variant"]) == (case, variant) and "skipped" not in row:
                    ratio = f"{row['ratio']:.3f} [{row['ratio_low']:.3f}, {row['ratio_high']:.3f}]"
                    lines.append(f"| {what} | {device} | {ratio} | {aim} |")
    head = ["| what | device | ratio [quartiles] | aim |", "| --- | --- | --- | --- |"]
    return "\n".join([*head, *lines]) + "\n\n" if lines else ""


def section(record: Mapping[str, Any]) -> str:
    """Title, circumstances and table of one benchmark."""
    hardware = record["hardware"]
    machine = hardware.get("gpu") or f"{hardware['cpu']}, {hardware['threads']} of {hardware['cores']} cores"
    machine += f", load {hardware['load']}" if "load" in hardware else ""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [
        f"### {record['title']}",
        "",
        f"`{record['command']}`, {record['date']}, {machine}; {versions}.",
        "",
        f"| case | variant | median [quartiles] | {record['ratio']} |",
        "| --- | --- | --- | --- |",
    ]
    skipped: dict[tuple[str, str], list[str]] = {}
    for row in record["rows"]:
        if "skipped" in row:
            skipped.setdefault((row["variant"], row["skipped"]), []).append(row["case"])
            continue
        value = f"{row['median']:.4g} {row['unit']} [{row['low']:.4g}, {row['high']:.4g}]"
        ratio = f"{row['ratio']:.3f} [{row['ratio_low']:.3f}, {row['ratio_high']:.3f}]"
        lines.append(f"| {row['case']} | {row['variant']} | {value} | {ratio} |")
    count = len({row["case"] for row in record["rows"]})
    for (variant, reason), cases in skipped.items():
        where = "" if len(cases) == count else f" ({'; '.join(cases)})"
        lines += ["", f"Not measured: {variant}{where}: {reason}"]
    numbers = {k: v for k, v in record.get("settings", {}).items() if isinstance(v, float)}
    lines += ["", *(f"{name.replace('_', ' ')}: {value:.3g}" for name, value in numbers.items())]
    return "\n".join(lines).rstrip() + "\n"


def with_tables(page: str, folder: Path) -> str:
    """The page with fresh tables below the heading of its results, which is its last."""
    return f"{page.partition(BEGIN)[0]}{BEGIN}\n{glance(folder)}{tables(folder)}"


@click.command()
def main() -> None:
    """Write the tables into docs/benchmarks.md."""
    PAGE.write_text(with_tables(PAGE.read_text(), RESULTS))
    click.echo(PAGE)


if __name__ == "__main__":
    main()
