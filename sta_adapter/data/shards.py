"""Samples in tar shards, as webdataset lays them out: `000123.mp4` and `000123.json` (or `.jsonl`) one after the other.

The files of one sample share their name up to the first dot; a record calls its clips by their file names, as in a
file of samples. `read_shard` reads a shard from front to back, for training; `scan_shards` notes where clips lie, so
that samples can be asked for in any order.
"""

from __future__ import annotations

import glob
import gzip
import io
import re
import sys
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, cast

from sta_adapter._lazy import importing
from sta_adapter.data.bad_sample import BadSample
from sta_adapter.data.conversation import Sample
from sta_adapter.data.records import or_error
from sta_adapter.data.shard_clips import Packed, Span
from sta_adapter.errors import DataError

SUFFIXES = (".tar", ".tar.gz", ".tgz")
_ASIDE = re.compile(r"__[^/]*__($|/)")  # members that webdataset takes for notes
MOST_INFLATED = 1 << 30  # bytes of one member of a compressed shard, whose claims the size on disk doesn't bound
MOST_TIMES = 20  # so many times its size on disk, and MOST_INFLATED, may a whole compressed shard grow; clips hardly do
MOST_RECORD = 64 << 20  # bytes of a .json or .jsonl
MOST_HEADER = 1 << 20  # bytes of a header's own texts, which are read at once


def is_shards(name: str | Path) -> bool:
    """Whether a path or pattern means tar shards, not a file of samples."""
    return str(name).endswith(SUFFIXES)


def find_shards(pattern: str | Path) -> list[Path]:
    """The shards that a path, a glob pattern or a brace pattern means: `train-{000..009}.tar`."""
    with importing("tar shards need more packages ({}): pip install 'sta-adapter[stream]'."):
        from braceexpand import braceexpand
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


def read_shard(path: Path, *, lookup: bool = False) -> Iterator[Packed | BadSample]:
    """The records of a shard in order; a `BadSample` stands for each that can't be read, and one for a shard that is cut off.

    `lookup` says where clips lie in the place of their contents, which a compressed shard can't (DataError).
    """
    from webdataset.tariterators import group_by_keys

    problems: list[Exception] = []

    def noted(error: Exception) -> bool:
        problems.append(error)
        return True

    count = 0
    for group in group_by_keys(_members(path, lookup, noted), lcase=False, handler=noted):
        count += 1
        yield from _records(path, group)
    if problems:
        yield BadSample(str(path), f"the shard is cut off or damaged after {count} samples: {_words(problems[0])}")
    elif not count:
        yield BadSample(str(path), "there is no sample in the shard; expected members like 000123.mp4 and 000123.json.")


def scan_shards(pattern: str | Path, *, format: str | None = None) -> list[Sample | BadSample]:
    """Every sample of shards, in order; clips are read from where they lie when they are asked for."""
    found: list[Sample | BadSample] = []
    for shard in find_shards(pattern):
        for item in read_shard(shard, lookup=True):
            try:
                found.append(item if isinstance(item, BadSample) else item.sample(format))
            except DataError as error:
                found.append(BadSample(item.source, error.reason))
    return found


def _members(path: Path, lookup: bool, noted: Callable[[Exception], bool]) -> Iterator[dict[str, str | bytes | Span]]:
    """A shard's files, as webdataset groups them, up to its end or its first damage."""
    try:
        with path.open("rb") as raw, gzip.open(raw) as inflated:
            compressed = raw.peek(2)[:2] == b"\x1f\x8b"
            if compressed and lookup:
                raise DataError(
                    f"{str(path)!r} is compressed, so samples can't be looked up in it; training alone reads such shards, from "
                    "front to back. Unpack it with gunzip: clips are hardly larger then."
                )
            size = path.stat().st_size
            file = _Bounded(inflated, MOST_INFLATED + MOST_TIMES * size) if compressed else _Bounded(raw, sys.maxsize)
            with tarfile.open(fileobj=cast(IO[bytes], file), mode="r:") as tar:
                while (member := _next(tar, file)) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                    if member.isreg() and not _ASIDE.match(member.name):
                        data = _contents(path, tar, member, lookup, compressed)
                        yield {"fname": member.name, "data": data, "__url__": str(path)}
                _check_end(cast(IO[bytes], file), None if compressed else tar.offset)
    except DataError:
        raise
    except Exception as error:  # whatever a damaged or hostile header makes tarfile raise
        noted(error)


class _Bounded:
    """A shard as tarfile reads it, up to so many bytes and, of headers, so many at once; what a header claims takes no memory."""

    def __init__(self, file: io.BufferedIOBase, most: int) -> None:
        self.file = file
        self.most = most
        self.at_once = MOST_HEADER
        self.tell: Callable[[], int] = file.tell

    def read(self, size: int) -> bytes:
        """As that of a file."""
        if size > self.at_once:
            raise tarfile.ReadError(f"a header claims {size} bytes of text, more than is read")
        found = self.file.read(size)
        self._require(self.tell())
        return found

    def seek(self, place: int) -> int:
        """As that of a file, from its beginning on; nothing is read where the place can't be."""
        self._require(place)
        return self.file.seek(place)

    def _require(self, place: int) -> None:
        if place > self.most:
            raise tarfile.ReadError(f"it goes on past byte {self.most}, more than a shard of its size on disk holds")


def _next(tar: tarfile.TarFile, file: _Bounded) -> tarfile.TarInfo | None:
    if tar.offset == 0:  # nothing is in it; Python 3.10 would seek in front of its beginning
        return None
    file.at_once = MOST_HEADER
    member = tar.next()
    file.at_once = sys.maxsize
    return member


def _contents(
    path: Path, tar: tarfile.TarFile, member: tarfile.TarInfo, lookup: bool, compressed: bool
) -> bytes | Span:
    """A file's contents; or where they lie, if it isn't a record. What a header claims is checked before it is read."""
    record = member.name.endswith((".json", ".jsonl"))
    if member.issparse():
        raise tarfile.ReadError(
            f"{member.name!r} is a sparse file, whose size is only claimed; pack it without --sparse"
        )
    if not 0 <= member.size <= (MOST_RECORD if record else MOST_INFLATED if compressed else sys.maxsize):
        raise tarfile.ReadError(f"{member.name!r} claims {member.size} bytes, more than is read")
    if not compressed and member.offset_data + member.size > path.stat().st_size:
        raise tarfile.ReadError("unexpected end of data")
    if not lookup or record:
        return cast(IO[bytes], tar.extractfile(member)).read()
    return Span(path, member.offset_data, member.size)


def _check_end(file: IO[bytes], end: int | None) -> None:
    """Where no member follows, zeros must; tarfile takes the end of a file, and a header that it can't read, for the end too."""
    if end is None:
        while file.read(1 << 20):  # gzip has a checksum at its end
            pass
        return
    file.seek(end)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("it has no end mark")
    if any(block):
        raise tarfile.ReadError(f"what stands at byte {end} is no header")


def _records(path: Path, group: Mapping[str, str | bytes | Span]) -> Iterator[Packed | BadSample]:
    """The records of one group: a `.json` holds one or a list of them, a `.jsonl` one a line."""
    key = str(group["__key__"])
    source, name = f"{path}, {key}", PurePosixPath(key).name
    members = {suffix: data for suffix, data in group.items() if not isinstance(data, str)}  # "__key__", "__url__"
    files = {f"{name}.{suffix}": data for suffix, data in members.items() if suffix not in ("json", "jsonl")}
    records: list[object] = []
    if isinstance(text := members.get("json"), bytes):
        found = or_error(text)
        records += found if isinstance(found, list) else [found]
    if isinstance(text := members.get("jsonl"), bytes):
        records += [or_error(line) for line in text.splitlines() if line.strip()]
    if not records:
        yield BadSample(source, f"no record; expected {name}.json or {name}.jsonl beside {', '.join(files) or 'it'}.")
    for number, record in enumerate(records, start=1):
        place = source if len(records) == 1 else f"{source}, entry {number}"
        if isinstance(record, DataError):
            yield BadSample(place, f"its record is not JSON: {record.__cause__}")
        else:
            yield Packed(path, place, record, files)


def _words(error: Exception) -> str:
    """What happened, without what webdataset adds to an error's arguments."""
    text = getattr(error, "strerror", None) or (str(error.args[0]) if error.args else "")
    return f"{text or type(error).__name__}."
