"""Records as they lie in files: JSON Lines, a JSON array or CSV, each with where it stands.

What is no record comes as a `DataError` in its place, so that the others can be used.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path

from sta_adapter._validate import shown
from sta_adapter.data.sample_keys import SETTINGS
from sta_adapter.errors import DataError

EXPECTED = "Expected a JSON Lines file, a JSON array or a CSV file."
TABLES = {".csv": ",", ".tsv": "\t"}
_NUMBERS = (*SETTINGS, "start", "end")  # cells that are numbers; all others are texts


def read_records(file: Path) -> Iterator[tuple[str, object]]:
    """Where each record stands, and the record, or the `DataError` in its place; it raises one where the file can't be read at all."""
    text = _read_text(file)
    if file.suffix.lower() in TABLES:
        yield from _rows(text, file, TABLES[file.suffix.lower()])
        return
    whole = _whole(text, file)
    if whole is not None:
        yield from ((f"{file}, entry {number}", record) for number, record in enumerate(whole, start=1))
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{file}, line {number}", or_error(line)


def load_json(text: str | bytes) -> object:
    """A JSON value.

    Raises:
        DataError: it is none, is nested too deeply, has an object with a key twice or a number of thousands of digits.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise DataError(f"not JSON ({error.msg} at column {error.colno}); expected one object.") from error
    except RecursionError as error:
        raise DataError("not JSON that can be read (it is nested too deeply).") from error
    except ValueError as error:
        raise DataError(f"not JSON that can be read ({error}).") from error


def or_error(text: str | bytes) -> object:
    """A JSON value, or the `DataError` in its place."""
    try:
        return load_json(text)
    except DataError as error:
        return error


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {shown(next(name for name in names if names.count(name) > 1))} stands there twice")
    return found


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise DataError(f"{str(file)!r} is not UTF-8 text (byte {error.start}). {EXPECTED}") from error
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"can't read the data file {str(file)!r}: {reason}. {EXPECTED}") from error


def _whole(text: str, file: Path) -> list[object] | None:
    """The entries of a JSON array, or one object written over several lines; None for JSON Lines."""
    start = text.lstrip()
    if start.startswith("["):
        try:
            entries = load_json(text)
            return entries if isinstance(entries, list) else [entries]
        except DataError as error:
            cause = error.__cause__
            if isinstance(cause, json.JSONDecodeError):
                raise DataError(
                    f"{file}: not a JSON array ({cause.msg} at line {cause.lineno}, column {cause.colno})."
                ) from error
            raise DataError(f"{file}: {error}") from error
    if start.startswith("{") and "\n" in start.rstrip():
        try:
            json.loads(start.split("\n", 1)[0])
        except (ValueError, RecursionError):
            try:
                return [load_json(text)]
            except DataError:
                return None
    return None


def _rows(text: str, file: Path, delimiter: str) -> Iterator[tuple[str, object]]:
    """The rows of a table whose first one names the columns; empty cells are left out."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        head = next(reader, [])
    except csv.Error as error:
        raise DataError(f"{file}: no table ({error}); expected a first line with the columns' names.") from error
    columns = [name.strip() for name in head]
    if not all(columns) or len(set(columns)) < len(columns):
        raise DataError(
            f"{file}: the first line is {shown(head)}, expected a name for each column, none twice, such as video,question,answer."
        )
    while True:
        source = f"{file}, line {reader.line_num + 1}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield source, DataError(f"no row of a table ({error}); expected cells in quotes to end.")
            continue
        if cells is None:
            return
        if any(cells):
            yield source, _row(columns, cells)


def _row(columns: list[str], cells: list[str]) -> dict[str, object] | DataError:
    if len(cells) != len(columns):
        return DataError(f"{len(cells)} cells, expected {len(columns)}: {', '.join(columns)}.")
    try:
        return {name: _cell(name, cell) for name, cell in zip(columns, cells, strict=True) if cell.strip()}
    except DataError as error:
        return error


def _cell(name: str, cell: str) -> object:
    """Numbers of the clip, and lists and objects written as JSON; everything else is text."""
    text = cell.strip()
    if name in _NUMBERS:
        try:
            return float(text) if "." in text or "e" in text.lower() else int(text)
        except ValueError as error:
            raise DataError(f"{name!r} is {shown(cell)}, expected a number.") from error
    if text[0] + text[-1] in ("[]", "{}") and name not in ("question", "answer", "system"):
        try:
            return load_json(text)
        except DataError as error:
            raise DataError(f"{name!r} is {error}") from error
    return cell
