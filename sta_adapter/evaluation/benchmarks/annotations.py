"""Annotation files of benchmarks: JSON, JSON Lines, CSV and parquet, as lists of records."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sta_adapter.data.message import Record
from sta_adapter.errors import DataError, MissingExtraError

__all__ = ["clip_file", "field", "find", "first_folder", "read_annotations", "read_file"]

KINDS = (".json", ".jsonl", ".csv", ".parquet")


def read_file(file: Path) -> Any:
    """What a file holds; parquet needs pyarrow.

    Raises:
        DataError: it is not what its ending says.
        MissingExtraError: pyarrow is missing.
    """
    try:
        if file.suffix == ".parquet":
            return _parquet(file)
        if file.suffix == ".csv":
            with file.open(encoding="utf-8-sig", newline="") as lines:
                return list(csv.DictReader(lines))
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix == ".jsonl":
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        return json.loads(text)
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise DataError(f"{file} can't be read as {file.suffix.removeprefix('.')}: {error}") from error


def read_annotations(file: Path) -> list[Record]:
    """The records of a file, see `read_file`.

    Raises:
        DataError: it holds no list of records.
    """
    rows = read_file(file)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{file} holds no list of records; expected the benchmark's own annotation file.")
    return rows


def _parquet(file: Path) -> list[Record]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise MissingExtraError(f"{file} needs pyarrow: pip install 'sta-adapter[eval]'.") from error
    try:
        return parquet.read_table(file).to_pylist()
    except ArrowException as error:
        raise ValueError(str(error)) from error


def find(folder: Path, *patterns: str) -> list[Path]:
    """The files of the first pattern that has any, in order of their names; one file a stem, whatever its kinds."""
    for pattern in patterns:
        found = {file.stem: file for file in sorted(folder.glob(pattern)) if file.suffix in KINDS}
        if found:
            return list(found.values())
    return []


def first_folder(folder: Path, names: Iterable[str]) -> Path | None:
    """The first of these folders that is there."""
    return next((folder / name for name in names if (folder / name).is_dir()), None)


def field(row: Record, name: str, source: str) -> Any:
    """A record's field that must be there.

    Raises:
        DataError: it is missing; the fields that are there are named.
    """
    if row.get(name) in (None, ""):
        raise DataError(f"{source} has no {name!r}; its fields: {', '.join(row)}.")
    return row[name]


def clip_file(folder: Path, name: str) -> Path:
    """A clip by its name, also where a copy of the benchmark keeps it under another ending; else the name as it is."""
    exact = folder / name
    others = (exact.with_suffix(ending) for ending in (".mp4", ".webm", ".mkv", ".avi", ".MP4"))
    return exact if exact.exists() else next((file for file in others if file.is_file()), exact)
