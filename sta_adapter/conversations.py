"""One sample for training or evaluation: a conversation, checked.

Public: `Sample`, `BadSample`, `parse_sample(record)`. Two ways of writing a conversation are understood: visual parts inside the messages'
content (`{"type": "video", "video": "a.mp4", "nframes": 8}`), and `<video>` / `<image>` in plain text with the paths in
lists beside the messages (`"videos": ["a.mp4"]`). Records of other formats become conversations first, see `sta_adapter.formats`.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sta_adapter.errors import CompatibilityError, DataError, MissingExtraError, STAError
from sta_adapter.formats import as_conversation

_POSITIVE = {
    **dict.fromkeys(("nframes", "min_frames", "max_frames", "min_pixels", "max_pixels"), int),
    **dict.fromkeys(("fps", "folder_fps"), float),  # folder_fps: of a folder of pictures in the place of a video file
}
_SECONDS = ("video_start", "video_end")
_PART_KEYS = {
    "text": {"type", "text"},
    "image": {"type", "image", "min_pixels", "max_pixels"},
    "video": {"type", "video", *_POSITIVE, *_SECONDS},
}
_ROLES = {"human": "user", "gpt": "assistant"}
_NOT_OF_A_SAMPLE = (KeyboardInterrupt, SystemExit, GeneratorExit)
_PLACEHOLDER = re.compile(r"<(video|image)>")


@dataclass(frozen=True)
class Sample:
    """One conversation.

    Attributes:
        messages: `{"role": ..., "content": [part, ...]}`; parts are of type text, image or video, with absolute paths. An
            answer with `"loss": False` is not learned.
        source: where it stands, "file, line 3".
        category: what evaluation groups by.
        options: the answers to choose from, for multiple choice.
        extra: other fields of the record, as they were.
    """

    messages: list[dict[str, Any]]
    source: str = "sample"
    category: str | None = None
    options: list[str] | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def prompt(self) -> list[dict[str, Any]]:
        """The messages up to the last answer."""
        return self.messages[: self._last_answer()]

    @property
    def answer(self) -> str:
        """The text of the last answer."""
        return "".join(part["text"] for part in self.messages[self._last_answer()]["content"] if part["type"] == "text")

    def _last_answer(self) -> int:
        for index in range(len(self.messages) - 1, -1, -1):
            if self.messages[index]["role"] == "assistant":
                return index
        raise DataError(
            f"{self.source}: no message with role 'assistant'; expected an answer to learn or to compare with."
        )


@dataclass(frozen=True)
class BadSample:
    """A sample that can't be used, and why."""

    source: str
    reason: str

    @classmethod
    def of(cls, source: str, error: BaseException) -> BadSample:
        """What an error says about a sample, whichever library raised it.

        Raises:
            BaseException: the error itself, if it says nothing about the sample: a package is missing, or the user has had enough.
        """
        if isinstance(error, (MissingExtraError, CompatibilityError)) or type(error) in _NOT_OF_A_SAMPLE:
            raise error
        return cls(source, reason_of(error).removeprefix(f"{source}: "))


def reason_of(error: BaseException) -> str:
    """An error's words; those of another library with the error's kind in front, without which they often say little."""
    if isinstance(error, (STAError, OSError)) and str(error):
        return str(error)
    return ": ".join(filter(None, (type(error).__name__, str(error))))


def parse_sample(
    record: Any,
    *,
    source: str = "sample",
    folder: str | Path = ".",
    format: str | None = None,
    classes: dict[str, int] | None = None,
) -> Sample:
    """Check one record and bring it into the form of `Sample`.

    Args:
        record: the object of one line.
        source: how errors name it.
        folder: what relative paths are relative to.
        format: one of `sta_adapter.formats.FORMATS`; None recognises it by its keys.
        classes: names and numbers of Something-Something v2's classes, to check against.

    Raises:
        DataError: with the source, what was found and what was expected.
    """
    try:
        if not isinstance(record, dict):
            raise DataError(f"found {_kind(record)}, expected an object.")
        return _parse(as_conversation(record, format, classes), source, Path(folder))
    except DataError as error:
        raise DataError(f"{source}: {error}") from error


def _parse(record: dict[str, Any], source: str, folder: Path) -> Sample:
    raw = record.get("messages", record.get("conversations"))
    if not isinstance(raw, list) or not raw:
        raise DataError(f"'messages' is {_kind(raw)}, expected a list of messages. Keys: {', '.join(record)}.")
    paths = {kind: _path_list(record, kind) for kind in ("video", "image")}
    messages = [*_system(record, raw), *(_message(turn, index, folder, paths) for index, turn in enumerate(raw))]
    for kind, left in paths.items():
        if left:
            raise DataError(f"'{kind}s' holds {len(left)} more than there are <{kind}> in the text, first {left[0]!r}.")
    options = record.get("options")
    if options is not None and not (
        isinstance(options, list) and len(options) > 1 and all(isinstance(option, str) and option for option in options)
    ):
        raise DataError(f"'options' is {options!r}, expected a list of at least two texts.")
    last = messages[-1]
    if options is not None and last["role"] == "assistant":
        said = "".join(part.get("text", "") for part in last["content"])
        if said not in options:
            raise DataError(f"the answer is {said!r}, expected one of the options {options!r}.")
    known = {"messages", "conversations", "system", "videos", "images", "options", "category"}
    extra = {key: value for key, value in record.items() if key not in known}
    category = record.get("category")
    return Sample(messages, source, None if category is None else str(category), options, extra)


def _path_list(record: dict[str, Any], kind: str) -> list[Any]:
    """The paths beside the messages, as a list that `_message` consumes."""
    paths = record.get(f"{kind}s") or []
    if not isinstance(paths, list):
        raise DataError(f"'{kind}s' is {_kind(paths)}, expected a list of paths.")
    return list(paths)


def _system(record: dict[str, Any], raw: list[Any]) -> list[dict[str, Any]]:
    """The system's words where they stand beside the messages."""
    text = record.get("system")
    if text is None or text == "":
        return []
    if not isinstance(text, str):
        raise DataError(f"'system' is {_kind(text)}, expected a text.")
    if any(isinstance(turn, dict) and "system" in (turn.get("role"), turn.get("from")) for turn in raw):
        raise DataError("'system' is given beside the messages and among them, expected one of them.")
    return [{"role": "system", "content": [{"type": "text", "text": text}]}]


def _message(message: Any, index: int, folder: Path, paths: dict[str, list[Any]]) -> dict[str, Any]:
    where = f"message {index}"
    if not isinstance(message, dict):
        raise DataError(f"{where} is {_kind(message)}, expected an object with 'role' and 'content'.")
    role = message.get("role", message.get("from"))
    role = _ROLES.get(role, role) if isinstance(role, str) else role
    if role not in ("system", "user", "assistant"):
        raise DataError(f"{where} has the role {role!r}, expected system, user or assistant.")
    content = message.get("content", message.get("value"))
    if isinstance(content, str):
        parts = [{"type": "text", "text": content}] if role == "assistant" else _split(content, where, paths)
    elif isinstance(content, list) and content:
        parts = content
    else:
        raise DataError(f"{where} has {_kind(content)} as content, expected a text or a list of parts.")
    checked = [_part(part, f"{where}, part {number}", folder) for number, part in enumerate(parts)]
    if role == "assistant" and not "".join(part.get("text", "") for part in checked).strip():
        raise DataError(f"{where} is an empty answer; expected words to learn.")
    return {"role": role, "content": checked, **_loss(message, where)}


def _loss(message: dict[str, Any], where: str) -> dict[str, bool]:
    """`{"loss": False}` of an answer that is part of the conversation, and not learned."""
    if message.get("loss_scale") not in (None, 1):
        raise DataError(
            f"{where} has the loss_scale {message['loss_scale']!r}; an answer counts fully or, with 'loss': false, not."
        )
    loss = message.get("loss")
    if loss is not None and not isinstance(loss, bool):
        raise DataError(f"{where}: 'loss' is {loss!r}, expected true or false.")
    return {"loss": False} if loss is False else {}


def _split(text: str, where: str, paths: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Turn "<video>What is it?" into parts, taking the paths from the lists."""
    parts: list[dict[str, Any]] = []
    for number, piece in enumerate(_PLACEHOLDER.split(text)):
        if number % 2 == 0:
            if piece.strip():
                parts.append({"type": "text", "text": piece})
            continue
        if not paths[piece]:
            raise DataError(f"{where} has a <{piece}> for which '{piece}s' holds no path.")
        value = paths[piece].pop(0)
        parts.append({"type": piece, **(value if isinstance(value, dict) else {piece: value})})
    return parts


def _part(part: Any, where: str, folder: Path) -> dict[str, Any]:
    if not isinstance(part, dict) or part.get("type") not in _PART_KEYS:
        found = repr(part.get("type")) if isinstance(part, dict) else _kind(part)
        raise DataError(f"{where} is {found}, expected an object whose 'type' is text, image or video.")
    kind = part["type"]
    given = {key: value for key, value in part.items() if value is not None}
    for key in given.keys() - _PART_KEYS[kind]:
        near = difflib.get_close_matches(key, _PART_KEYS[kind], n=1)
        hint = f" Did you mean {near[0]!r}?" if near else f" Known: {', '.join(sorted(_PART_KEYS[kind]))}."
        raise DataError(f"{where} ({kind}) has the unknown key {key!r}.{hint}")
    value = given.get(kind)
    if not isinstance(value, str) or (kind != "text" and not value):
        raise DataError(f"{where}: {kind!r} is {_kind(value)}, expected {'a text' if kind == 'text' else 'a path'}.")
    if kind != "text":
        _check_numbers(given, where)
        given[kind] = str(folder / value.removeprefix("file://"))
    return given


def _check_numbers(part: dict[str, Any], where: str) -> None:
    for key in part.keys() & {*_POSITIVE, *_SECONDS}:
        value, whole = part[key], _POSITIVE.get(key) is int
        right = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if not right or value < 0 or (key not in _SECONDS and value == 0):
            raise DataError(f"{where}: {key!r} is {value!r}, expected a positive {'whole ' if whole else ''}number.")
    if "fps" in part and "nframes" in part:
        raise DataError(f"{where} gives both 'fps' and 'nframes', expected one of them.")
    if part.get("video_end", float("inf")) <= part.get("video_start", 0):
        raise DataError(f"{where}: 'video_end' is not after 'video_start'.")


def _kind(value: Any) -> str:
    """How an error names what was found."""
    if value is None:
        return "missing"
    if value in ("", []):
        return "empty"
    names = {dict: "an object", list: "a list", str: "a text", bool: "true/false", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)
