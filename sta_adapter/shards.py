"""Samples in tar shards, as webdataset lays them out: `000123.mp4` and `000123.json` (or `.jsonl`) one after the other.

Public: `is_shards(name)`, `find_shards(pattern)`, `read_shard(path)`, `Packed`. The files of one sample share their name up to the first dot;
a record calls its clips by their file names, as in a file of samples. Shards are read from front to back, nothing is unpacked.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from sta_adapter.errors import DataError, MissingExtraError
from sta_adapter.samples import BadSample

SUFFIXES = (".tar", ".tar.gz", ".tgz")
_END = 1024  # zeros that close a tar file


@dataclass(frozen=True)
class Packed:
    """One record of a shard and the files beside it.

    Attributes:
        source: where it stands, "train-000003.tar, 000123".
        record: as in a line of a file of samples.
        files: contents by the names that the record calls them by.
    """

    source: str
    record: Any
    files: dict[str, bytes]


def is_shards(name: str | Path) -> bool:
    """Whether a path or pattern means tar shards, not a file of samples."""
    return str(name).endswith(SUFFIXES)


def find_shards(pattern: str | Path) -> list[Path]:
    """The shards that a path, a glob pattern or a brace pattern means: `train-{000..009}.tar`.

    Raises:
        DataError: a shard is not there, or the pattern fits none.
        MissingExtraError: webdataset is not installed.
    """
    try:
        from braceexpand import braceexpand
    except ImportError as error:
        raise MissingExtraError(
            f"tar shards need more packages ({error}): pip install 'sta-adapter[stream]'."
        ) from error
    if re.match(r"[a-z0-9]{2,}:", str(pattern)):
        raise DataError(f"{str(pattern)!r} is an address, expected files: mount the storage, or copy the shards near.")
    try:
        names = list(braceexpand(str(pattern)))
    except ValueError as error:
        raise DataError(
            f"{str(pattern)!r} has a brace too many or too few; expected such as 'train-{{000..009}}.tar'."
        ) from error
    paths = [Path(path) for name in names for path in (sorted(glob.glob(name)) if glob.has_magic(name) else [name])]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing or not paths:
        what = f"{len(missing)} shards are not there, first {missing[0]!r}" if missing else "no shard fits"
        raise DataError(
            f"{what} (from {str(pattern)!r}); expected tar files, as a path, a glob or like 'train-{{000..009}}.tar'."
        )
    return list(dict.fromkeys(paths))


def read_shard(path: Path) -> Iterator[Packed | BadSample]:
    """The records of a shard in order; a `BadSample` stands for each that can't be read, and one for a shard that is cut off."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    problems: list[Exception] = []

    def noted(error: Exception) -> bool:
        problems.append(error)
        return True

    count = 0
    try:
        with path.open("rb") as file:
            members = tar_file_expander([{"url": str(path), "stream": file}], handler=noted)
            for group in group_by_keys(members, lcase=False, handler=noted):
                count += 1
                yield from _records(path, group)
        if not problems and not _is_closed(path):
            problems.append(DataError("it has no end mark"))
    except OSError as error:
        problems.append(error)
    if problems:
        yield BadSample(str(path), f"the shard is cut off or damaged after {count} samples: {_words(problems[0])}")
    elif not count:
        yield BadSample(str(path), "there is no sample in the shard; expected members like 000123.mp4 and 000123.json.")


def _records(path: Path, group: dict[str, Any]) -> Iterator[Packed | BadSample]:
    """The records of one group: a `.json` holds one or a list of them, a `.jsonl` one a line."""
    key = group["__key__"]
    source, name = f"{path}, {key}", PurePosixPath(key).name
    members = {suffix: value for suffix, value in group.items() if not suffix.startswith("__")}
    files = {f"{name}.{suffix}": data for suffix, data in members.items() if suffix not in ("json", "jsonl")}
    try:
        records: list[Any] = []
        if "json" in members:
            found = json.loads(members["json"])
            records += found if isinstance(found, list) else [found]
        if "jsonl" in members:
            records += [json.loads(line) for line in members["jsonl"].splitlines() if line.strip()]
    except ValueError as error:
        yield BadSample(source, f"its record is not JSON: {error}")
        return
    if not records:
        yield BadSample(source, f"no record; expected {name}.json or {name}.jsonl beside {', '.join(files) or 'it'}.")
    for number, record in enumerate(records, start=1):
        yield Packed(source if len(records) == 1 else f"{source}, entry {number}", record, files)


def _is_closed(path: Path) -> bool:
    """Whether an uncompressed tar ends as it should; cut off between two members, it could be read without an error."""
    if path.suffix != ".tar":
        return True
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - _END, 0))
        return file.read() == bytes(_END)


def _words(error: Exception) -> str:
    """What happened, without what webdataset adds to an error's arguments."""
    text = str(error.args[0]) if error.args else ""
    return f"{text.split(' @ ')[0] or type(error).__name__}."
