"""What the benchmarks' files share: their annotations as records, and questions with labelled options about one clip."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_uppercase as LETTERS

from sta_adapter._lazy import importing
from sta_adapter._validate import shown
from sta_adapter.data.conversation import Sample
from sta_adapter.data.message import Message, Part, Record
from sta_adapter.data.sample_keys import kind_of
from sta_adapter.errors import DataError

MOST_SECONDS = 1e6
KINDS = (".json", ".jsonl", ".csv", ".parquet")


@dataclass
class EvalSet:
    """Questions, and what was left out of them."""

    samples: list[Sample] = field(default_factory=list)  # in the order of the annotation files
    notes: list[str] = field(default_factory=list)  # sentences for the reader of the results

    def add(self, file: Path, rows: Iterable[Record], make: Callable[[Record, str], Sample]) -> None:
        """Make a sample of each record of a file, from it and where it stands; those that don't add up become a note."""
        bad = []
        for number, row in enumerate(rows, start=1):
            try:
                self.samples.append(make(row, f"{file}, entry {number}"))
            except DataError as error:
                bad.append(str(error))
        if bad:
            self.notes.append(f"{len(bad)} left out, as their annotations don't add up. The first: {bad[0]}")


def question(
    clip: Path,
    text: str,
    labels: Sequence[str],
    texts: Sequence[str],
    right: int,
    *,
    source: str,
    category: str,
    settings: Mapping[str, float] | None = None,
    before: str | None = None,
    extra: Mapping[str, str] | None = None,
) -> Sample:
    """A sample that asks about a clip, which is a file or a folder of pictures.

    `before` stands in front of the clip, `text` behind it, as the benchmark words them. Options are called `labels`, and
    say `texts`; the answer is the label `right`. `settings` are the clip's, such as `video_start`; `extra` are further
    fields to group results by.
    """
    lead = [{"type": "text", "text": before}] if before else []
    user: list[Part] = [
        *lead,
        {"type": "video", "video": str(clip), **(settings or {})},
        {"type": "text", "text": text},
    ]
    messages: list[Message] = [
        {"role": "user", "content": user},
        {"role": "assistant", "content": [{"type": "text", "text": labels[right]}]},
    ]
    return Sample(messages, source, category, list(labels), {"option_texts": list(texts), **(extra or {})})


def read_file(file: Path) -> object:
    """What a file holds, which must be what its ending says; parquet needs pyarrow."""
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
    """The records of a file, see `read_file`."""
    rows = read_file(file)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{file} holds no list of records; expected the benchmark's own annotation file.")
    return rows


def _parquet(file: Path) -> list[Record]:
    with importing(f"{file} needs pyarrow: pip install 'sta-adapter[eval]'."):
        from pyarrow import ArrowException, parquet
    try:
        rows: list[Record] = parquet.read_table(file).to_pylist()
        return rows
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


def text_field(row: Record, name: str, source: str) -> str:
    """A record's words that must be there; if not, the error names the fields that are."""
    _require(row, name, source)
    found = row[name]
    if not isinstance(found, str):
        raise DataError(f"{source}: {name!r} is {kind_of(found)}, expected a text.")
    return found


def options_field(row: Record, name: str, source: str) -> list[str]:
    """A record's options: at least two texts, no more than there are letters."""
    _require(row, name, source)
    options = row[name]
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise DataError(f"{source}: {name!r} is {kind_of(options)}, expected a list of texts.")
    if not 2 <= len(options) <= len(LETTERS):
        raise DataError(f"{source}: {name!r} has {len(options)} options, expected 2 to {len(LETTERS)}.")
    return options


def seconds_field(row: Record, name: str, source: str) -> float:
    """A record's time in a clip."""
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < MOST_SECONDS:
        raise DataError(f"{source}: {name!r} is {shown(value)}, expected seconds in the clip.")
    return float(value)


def _require(row: Record, name: str, source: str) -> None:
    if row.get(name) is None or row[name] == "":
        raise DataError(f"{source} has no {name!r}; its fields: {', '.join(map(str, row))}.")


def clip_file(folder: Path, name: str) -> Path:
    """A clip by its name, also where a copy of the benchmark keeps it under another ending; else the name as it is."""
    exact = folder / name
    others = (exact.with_suffix(ending) for ending in (".mp4", ".webm", ".mkv", ".avi", ".MP4"))
    return exact if exact.exists() else next((file for file in others if file.is_file()), exact)
