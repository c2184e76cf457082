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


def tables(folder: Path) -> str:
    """A section for each JSON of a benchmark in a folder."""
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    sections = [section(record) for record in records if "ratio" in record and "rows" in record]
    return "\n".join(sections) if sections else "No results are committed yet.\n"


def section(record: Mapping[str, Any]) -> str:
    """Title, circumstances and table of one benchmark."""
    hardware = record["hardware"]
    machine = hardware.get("gpu") or f"{hardware['cpu']}, {hardware['threads']} of {hardware['cores']} cores"
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [
        f"### {record['title']}",
        "",
        f"`{record['command']}`, {record['date']}, {machine}; {versions}.",
        "",
        f"| case | variant | median [quartiles] | {record['ratio']} |",
        "| --- | --- | --- | --- |",
    ]
    for row in record["rows"]:
        if "skipped" in row:
            lines.append(f"| {row['case']} | {row['variant']} | not measured | {row['skipped']} |")
            continue
        value = f"{row['median']:.4g} {row['unit']} [{row['low']:.4g}, {row['high']:.4g}]"
        ratio = f"{row['ratio']:.3f} [{row['ratio_low']:.3f}, {row['ratio_high']:.3f}]"
        lines.append(f"| {row['case']} | {row['variant']} | {value} | {ratio} |")
    numbers = {k: v for k, v in record.get("settings", {}).items() if isinstance(v, float)}
    lines += ["", *(f"{name.replace('_', ' ')}: {value:.3g}" for name, value in numbers.items())]
    return "\n".join(lines).rstrip() + "\n"


def with_tables(page: str, folder: Path) -> str:
    """The page with fresh tables below the heading of its results, which is its last."""
    return f"{page.partition(BEGIN)[0]}{BEGIN}\n{tables(folder)}"


@click.command()
def main() -> None:
    """Write the tables into docs/benchmarks.md."""
    PAGE.write_text(with_tables(PAGE.read_text(), RESULTS))
    click.echo(PAGE)


if __name__ == "__main__":
    main()
