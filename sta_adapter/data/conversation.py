"""One sample for training or evaluation: a conversation, checked.

Two ways of writing a conversation are understood: visual parts inside the messages' content (`{"type": "video",
"video": "a.mp4", "nframes": 8}`), and `<video>` / `<image>` in plain text with the paths in lists beside the messages
(`"videos": ["a.mp4"]`). Records of other formats become conversations first, see `sta_adapter.data.formats`.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from sta_adapter._validate import shown, suggestion
from sta_adapter.data.formats import as_conversation
from sta_adapter.data.message import Message, Part, Record, text_of
from sta_adapter.data.placeholders import PLACEHOLDER, require_clips
from sta_adapter.data.sample_keys import SETTINGS, VISUAL_KEYS, extra_fields, kind_of, printable, visuals
from sta_adapter.errors import DataError

_SECONDS = ("video_start", "video_end")  # which may be 0
_FRACTIONS = ("fps", "folder_fps", *_SECONDS)  # all other settings are whole numbers
_LARGEST = 10**12  # beyond it no number is meant, and arithmetic overflows
_PART_KEYS = {
    "text": {"type", "text"},
    "image": {"type", "image", "min_pixels", "max_pixels"},
    "video": {"type", "video", *SETTINGS},
}
_ROLES = {"human": "user", "gpt": "assistant"}
_MESSAGE_KEYS = ("role", "from", "content", "value", "loss", "loss_scale")
_RECORD_KEYS = VISUAL_KEYS | {"messages", "conversations", "system", "options", "category"}
_ADDRESS = re.compile(r"(?!file:)[a-z][a-z0-9+.-]+://|data:\w+/", re.IGNORECASE)


@dataclass(frozen=True)
class Sample:
    """One conversation.

    Attributes:
        messages: `{"role": ..., "content": [part, ...]}`; parts are of type text, image or video, with absolute paths.
            An answer with `"loss": False` is not learned.
        source: where it stands, "file, line 3".
        category: what evaluation groups by.
        options: the answers to choose from, for multiple choice.
        extra: other fields of the record, as they were.
        problem: why the record is no sample; then it holds no message, and loading it gives a `BadSample`.
    """

    messages: list[Message]
    source: str = "sample"
    category: str | None = None
    options: list[str] | None = None
    extra: Record = field(default_factory=dict)
    problem: str | None = None

    @property
    def prompt(self) -> list[Message]:
        """The messages up to the last answer."""
        return [] if self.problem is not None else self.messages[: self._last_answer()]

    @property
    def visuals(self) -> list[Part]:
        """The clips and pictures of all messages, in their order."""
        return [part for message in self.messages for part in message["content"] if part["type"] != "text"]

    @property
    def answered(self) -> bool:
        """Whether there is an answer to learn or to compare with."""
        return any(message["role"] == "assistant" for message in self.messages)

    @property
    def answer(self) -> str:
        """The text of the last answer."""
        return text_of(self.messages[self._last_answer()])

    def _last_answer(self) -> int:
        for index in range(len(self.messages) - 1, -1, -1):
            if self.messages[index]["role"] == "assistant":
                return index
        raise DataError(
            "no message with role 'assistant'; expected an answer to learn or to compare with.", source=self.source
        )


def parse_sample(
    record: object,
    *,
    source: str = "sample",
    folder: str | Path = ".",
    format: str | None = None,
    classes: dict[str, int] | None = None,
) -> Sample:
    """Check one record and bring it into the form of `Sample`; errors name its `source`.

    Relative paths start from `folder`. `format` is one of `sta_adapter.data.formats.FORMATS`, None for that which the keys tell;
    `classes` are names and numbers of Something-Something v2's classes, to check against.

    Raises:
        DataError: with the source, what was found and what was expected.
    """
    try:
        if not isinstance(record, dict):
            raise DataError(f"found {kind_of(record)}, expected an object.")
        given = {str(key): value for key, value in record.items() if value is not None}
        return _parse(as_conversation(given, format, classes), source, Path(folder))
    except (DataError, RecursionError) as error:
        reason = "it is nested too deeply." if isinstance(error, RecursionError) else str(error)
        raise DataError(reason, source=source) from error


def _parse(record: Record, source: str, folder: Path) -> Sample:
    if "messages" in record and "conversations" in record:
        raise DataError("both 'messages' and 'conversations' are given, expected one of them.")
    raw = record.get("messages", record.get("conversations"))
    if not isinstance(raw, list) or not raw:
        raise DataError(f"'messages' is {kind_of(raw)}, expected a list of messages. Keys: {', '.join(record)}.")
    paths = visuals(record)
    if "video" in record and not paths["image"]:
        raw = [_llava(turn) for turn in raw] if not any("<video>" in _text(turn) for turn in raw) else raw
    turns = [_message(turn, index, folder, paths) for index, turn in enumerate(raw)]
    if turns[0]["role"] == "assistant":
        raise DataError("message 0 is an answer, expected a question before it.")
    messages = [*_system(record, raw), *turns]
    for kind, left in paths.items():
        if left:
            key = kind if kind in record else f"{kind}s"
            raise DataError(
                f"'{key}' holds {len(left)} more than there are <{kind}> in the text, first {shown(left[0])}."
            )
    require_clips(messages)
    return Sample(messages, source, _category(record), _options(record, messages), extra_fields(record, _RECORD_KEYS))


def _text(turn: object) -> str:
    """The words of a turn in which placeholders may stand; in answers they are words."""
    if not isinstance(turn, dict) or turn.get("role", turn.get("from")) in ("assistant", "gpt"):
        return ""
    text = turn.get("content", turn.get("value"))
    return text if isinstance(text, str) else ""


def _llava(turn: object) -> object:
    """A turn of LLaVA's, where <image> may stand for the record's 'video'."""
    text = _text(turn)
    if not isinstance(turn, dict) or "<image>" not in text:
        return turn
    return {**turn, "content" if "content" in turn else "value": text.replace("<image>", "<video>")}


def _options(record: Record, messages: list[Message]) -> list[str] | None:
    options, texts = record.get("options"), record.get("option_texts")
    for key, given in (("options", options), ("option_texts", texts)):
        right = isinstance(given, list) and len(given) > 1 and all(isinstance(text, str) and text for text in given)
        if given is not None and not right:
            raise DataError(f"'{key}' is {shown(given)}, expected a list of at least two texts.")
    if texts is not None and len(texts) != len(options or ()):
        raise DataError(f"'option_texts' holds {len(texts)} texts, expected one for each of 'options'.")
    said = text_of(messages[-1])
    if options is not None and messages[-1]["role"] == "assistant" and said not in options:
        raise DataError(f"the answer is {shown(said)}, expected one of the options {shown(options)}.")
    return options


def _category(record: Record) -> str | None:
    category = record.get("category")
    if not isinstance(category, (str, int, float, type(None))):
        raise DataError(f"'category' is {kind_of(category)}, expected a text or a number.")
    return None if category is None else printable(category)


def _system(record: Record, raw: list[object]) -> list[Message]:
    """The system's words where they stand beside the messages."""
    text = record.get("system")
    if text is None or text == "":
        return []
    if not isinstance(text, str):
        raise DataError(f"'system' is {kind_of(text)}, expected a text.")
    if any(isinstance(turn, dict) and "system" in (turn.get("role"), turn.get("from")) for turn in raw):
        raise DataError("'system' is given beside the messages and among them, expected one of them.")
    return [{"role": "system", "content": [{"type": "text", "text": text}]}]


def _message(message: object, index: int, folder: Path, paths: dict[str, list[object]]) -> Message:
    where = f"message {index}"
    if not isinstance(message, dict):
        raise DataError(f"{where} is {kind_of(message)}, expected an object with 'role' and 'content'.")
    message = {key: value for key, value in message.items() if value is not None}
    for key in message:
        if key not in _MESSAGE_KEYS:
            raise DataError(f"{where} has the unknown key {shown(key)}. {suggestion(key, _MESSAGE_KEYS)}")
    for one, other in (("role", "from"), ("content", "value")):
        if one in message and other in message:
            raise DataError(f"{where} has both {one!r} and {other!r}, expected one of them.")
    role = message.get("role", message.get("from"))
    role = _ROLES.get(role, role) if isinstance(role, str) else role
    if role not in ("system", "user", "assistant"):
        raise DataError(f"{where} has the role {shown(role)}, expected system, user or assistant.")
    content = message.get("content", message.get("value"))
    if isinstance(content, str):
        parts = [{"type": "text", "text": content}] if role == "assistant" else _split(content, where, paths)
    elif isinstance(content, list) and content:
        parts = content
    else:
        raise DataError(f"{where} has {kind_of(content)} as content, expected a text or a list of parts.")
    checked = [_part(part, f"{where}, part {number}", folder) for number, part in enumerate(parts)]
    made: Message = {"role": role, "content": checked}
    if role == "assistant" and not text_of(made).strip():
        raise DataError(f"{where} is an empty answer; expected words to learn.")
    if not _learned(message, where):
        return {**made, "loss": False}
    clips = [part["type"] for part in checked if part["type"] != "text"]
    if role == "assistant" and clips:
        raise DataError(f"{where} is an answer with a {clips[0]} in it, expected words to learn, or 'loss': false.")
    return made


def _learned(message: Record, where: str) -> bool:
    """Whether an answer is to be learned, and not only part of the conversation."""
    if message.get("loss_scale") not in (None, 1):
        raise DataError(
            f"{where} has the loss_scale {shown(message['loss_scale'])}; an answer counts fully or, with 'loss': false, not."
        )
    loss = message.get("loss")
    if loss is not None and not isinstance(loss, bool):
        raise DataError(f"{where}: 'loss' is {shown(loss)}, expected true or false.")
    return loss is not False


def _split(text: str, where: str, paths: dict[str, list[object]]) -> list[Part]:
    """Turn "<video>What is it?" into parts, taking the paths from the lists."""
    parts: list[Part] = []
    for number, piece in enumerate(PLACEHOLDER.split(text)):
        if number % 2 == 0:
            if piece.strip():
                parts.append({"type": "text", "text": piece})
            continue
        if not paths[piece]:
            raise DataError(f"{where} has a <{piece}> for which '{piece}s' holds no path.")
        value = paths[piece].pop(0)
        part = value if isinstance(value, dict) else {piece: value}
        if part.get("type", piece) != piece:
            raise DataError(f"{where} has a <{piece}> for which '{piece}s' holds a part of type {shown(part['type'])}.")
        parts.append({**part, "type": piece})
    return parts


def _part(part: object, where: str, folder: Path) -> Part:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or not isinstance(kind, str) or kind not in _PART_KEYS:
        found = shown(kind) if isinstance(part, dict) else kind_of(part)
        raise DataError(f"{where} is {found}, expected an object whose 'type' is text, image or video.")
    given = {key: value for key, value in part.items() if value is not None}
    for key in given.keys() - _PART_KEYS[kind]:
        hint = suggestion(key, sorted(_PART_KEYS[kind]))
        raise DataError(f"{where} ({kind}) has the unknown key {shown(key)}. {hint}")
    value = given.get(kind)
    if kind == "video" and isinstance(value, list) and value:
        if "folder_fps" not in given:
            raise DataError(f"{where}: 'video' is a list of pictures, which needs 'folder_fps': how many are a second.")
        given[kind] = [_path(file, "video", where, folder) for file in value]
    elif kind != "text":
        given[kind] = _path(value, kind, where, folder)
    elif not isinstance(value, str):
        raise DataError(f"{where}: 'text' is {kind_of(value)}, expected a text.")
    if kind != "text":
        _check_numbers(given, where)
    return given


def _path(value: object, kind: str, where: str, folder: Path) -> str:
    value = os.fspath(value) if isinstance(value, os.PathLike) else value  # of records that Python made
    if not isinstance(value, str) or not value:
        raise DataError(f"{where}: {kind!r} is {kind_of(value)}, expected a path.")
    if _ADDRESS.match(value):
        raise DataError(f"{where}: {shown(value)} is an address, expected a file; download it first.")
    return str(folder / value.removeprefix("file://"))


def _check_numbers(part: Part, where: str) -> None:
    for key in part.keys() & set(SETTINGS):
        value, whole = part[key], key not in _FRACTIONS
        right = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if not right or not 0 <= value <= _LARGEST or (key not in _SECONDS and value == 0):
            raise DataError(
                f"{where}: {key!r} is {shown(value)}, expected a positive {'whole ' if whole else ''}number of usual size."
            )
    if "fps" in part and "nframes" in part:
        raise DataError(f"{where} gives both 'fps' and 'nframes', expected one of them.")
    idle = [key for key in ("min_frames", "max_frames") if key in part and "nframes" in part]
    if idle:
        raise DataError(f"{where} gives 'nframes', beside which {idle[0]!r} has no effect; leave one of them out.")
    for least, most in (("min_frames", "max_frames"), ("min_pixels", "max_pixels")):
        if part.get(least, 0) > part.get(most, math.inf):
            raise DataError(f"{where}: {least!r} is above {most!r}.")
    if part.get("video_end", math.inf) <= part.get("video_start", 0):
        raise DataError(f"{where}: 'video_end' is not after 'video_start'.")
