"""Clips that lie in tar shards: as samples name them, and as files for a decoder.

A sample from a shard names its clips `SHARD/NAME` and carries where their contents are; `unpacked`
writes them to files that are there just as long as they are decoded.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sta_adapter.data.conversation import Sample, parse_sample
from sta_adapter.data.message import Part
from sta_adapter.errors import DataError, STAError
from sta_adapter.video import VideoNotFoundError


@dataclass(frozen=True)
class Span:
    """Where a file lies in a tar that isn't compressed."""

    shard: Path
    start: int
    size: int

    def read(self) -> bytes:
        """The file's contents."""
        with self.shard.open("rb") as file:
            file.seek(self.start)
            return file.read(self.size)


@dataclass(frozen=True)
class Missing:
    """In the place of a file that a record names and its shard doesn't hold beside it."""

    name: str
    beside: tuple[str, ...]


@dataclass(frozen=True)
class Packed:
    """One record of a shard and the files beside it."""

    shard: Path  # the tar file
    source: str  # where it stands in it, "train-000003.tar, 000123"
    record: object  # as in a line of a file of samples
    files: dict[str, bytes | Span]  # contents, or where they lie, by the names that the record calls them by

    def sample(self, format: str | None = None) -> Sample:
        """The record as a sample; a DataError if it is none."""
        sample = parse_sample(self.record, source=self.source, folder=self.shard, format=format)
        return replace(
            sample, messages=[{**m, "content": [self._placed(part) for part in m["content"]]} for m in sample.messages]
        )

    def _placed(self, part: Part) -> Part:
        """A part that says where its contents are; those outside of the shard are files as usual."""
        if isinstance(part.get("video"), list):
            raise DataError(
                "a clip in a shard is a list of pictures, which are not read from shards; pack it as a video."
            )
        path = Path(part.get(part["type"], "")) if part["type"] != "text" else Path()
        if self.shard not in path.parents:
            return part
        name = path.relative_to(self.shard).as_posix()
        return {**part, "packed": self.files.get(name, Missing(name, tuple(self.files)))}


@contextlib.contextmanager
def unpacked(parts: Sequence[Part]) -> Iterator[Sequence[Part]]:
    """The parts of a sample with paths that a decoder can open; errors raised meanwhile get the names that the sample has for its files."""
    if not any("packed" in part for part in parts):
        yield parts
        return
    with tempfile.TemporaryDirectory(prefix="sta-") as folder:
        try:
            yield [_as_file(part, Path(folder)) for part in parts]
        except STAError as error:
            raise type(error)(str(error).replace(f"{folder}/", "")) from error


def _as_file(part: Part, folder: Path) -> Part:
    if "packed" not in part:
        return part
    kind, contents = part["type"], part["packed"]
    if isinstance(contents, Missing):
        beside = ", ".join(contents.beside) or "nothing"
        raise VideoNotFoundError(
            f"{contents.name!r} is not beside its record in the shard; there: {beside}. Pack both one after the other, as tar --sort=name does."
        )
    file = folder / Path(part[kind]).name
    file.write_bytes(contents.read() if isinstance(contents, Span) else contents)
    return {**{key: value for key, value in part.items() if key != "packed"}, kind: str(file)}
