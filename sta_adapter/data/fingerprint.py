"""Fingerprints of samples, with the contents of their clips, and of a processor."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sta_adapter.compatibility.processors import Processor, fingerprint_parts
from sta_adapter.data.message import Message, Part, files_of

ENDS = 1 << 16  # bytes at the beginning and at the end of a clip's file that stand for it, with its size
THREADS = 8
MISSING = "missing"
NAMELESS = ("_name_or_path", "name_or_path", "_commit_hash", "transformers_version")  # don't change what comes out
PLAIN = (str, int, float, type(None))  # values of settings


def fingerprint(*values: object) -> str:
    """Of plain values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def fingerprint_samples(asked: Sequence[tuple[list[Message], object]]) -> list[str]:
    """One for each sample: of its messages, its clips' contents wherever these lie, and what else its outcome depends on."""
    parts = [part for messages, _ in asked for message in messages for part in message["content"]]
    clips = {_place(part): part for part in parts if part["type"] != "text"}
    with ThreadPoolExecutor(THREADS) as pool:
        contents = dict(zip(clips, pool.map(_contents, clips.values()), strict=True))

    def plain(part: Part) -> Part:
        if part["type"] == "text":
            return part
        settings = {key: value for key, value in part.items() if key != "packed"}
        return {**settings, part["type"]: contents[_place(part)]}

    return [
        fingerprint([{**m, "content": [plain(part) for part in m["content"]]} for m in messages], rest)
        for messages, rest in asked
    ]


def _place(part: Part) -> tuple[str, str]:
    packed = part.get("packed")
    return str(part[part["type"]]), "in memory" if isinstance(packed, bytes) else str(packed)


def _contents(part: Part) -> str:
    """Of a clip's file, of a folder's pictures, or of what lies in a shard."""
    packed = part.get("packed")
    if isinstance(packed, bytes):
        return hashlib.sha256(packed).hexdigest()
    if packed is not None:
        shard, start, size = (getattr(packed, name, None) for name in ("shard", "start", "size"))
        return MISSING if shard is None else fingerprint_file(shard, start or 0, size)
    path, *others = map(Path, map(str, files_of(part)))
    if others:
        found = [fingerprint_file(file) for file in (path, *others)]
        return MISSING if MISSING in found else fingerprint(found)
    if path.is_dir():
        return fingerprint([(file.name, fingerprint_file(file)) for file in sorted(path.iterdir()) if file.is_file()])
    return fingerprint_file(path)


def fingerprint_clip(part: Part) -> str | None:
    """Of a clip's contents and, where these are files, of when they were written; None where one is missing."""
    contents, packed = _contents(part), part.get("packed")
    if contents == MISSING:
        return None
    if isinstance(packed, bytes):
        return contents
    paths = [Path(str(name)) for name in files_of(part)] if packed is None else [packed.shard]
    try:
        files = sorted(paths[0].iterdir()) if paths[0].is_dir() else paths
        return fingerprint(contents, [file.stat().st_mtime_ns for file in files])
    except OSError:
        return None


def fingerprint_file(path: Path, start: int = 0, size: int | None = None) -> str:
    """Of a file's size, beginning and end, where a container keeps the sizes of all its frames; whole, if it is short."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size if size is None else size
            file.seek(start)
            found = hashlib.sha256(f"{size} ".encode() + file.read(min(size, ENDS)))
            if size > ENDS:
                file.seek(start + max(ENDS, size - ENDS))
                found.update(file.read(min(ENDS, size - ENDS)))
    except (OSError, ValueError):  # not there, or of a name that no file has
        return MISSING
    return found.hexdigest()


def fingerprint_processor(processor: Processor) -> str:
    """Of what a processor makes of a conversation: its template, vocabulary, tokens of turns, own settings and sizes."""
    tokenizer = getattr(processor, "tokenizer", None)
    template = getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items()) if tokenizer else None
    ends = getattr(tokenizer, "special_tokens_map", None)
    own = {
        name: value for name, value in vars(processor).items() if isinstance(value, PLAIN) and not name.startswith("_")
    }
    return fingerprint(template, words, ends, own, [without_names(part) for part in fingerprint_parts(processor)])


def without_names(values: object) -> object:
    """A configuration without names of places and versions, at any depth."""
    if isinstance(values, Mapping):
        return {str(key): without_names(value) for key, value in values.items() if key not in NAMELESS}
    return [without_names(value) for value in values] if isinstance(values, (list, tuple)) else values
