"""The keys of a record: which clips and pictures stand beside the words, and which keys are not what was meant.

A key that a record has is read, or kept for grouping (`Sample.extra`), or refused: so are misspelt ones, those of a clip
that would be left out, and those that other tools read and this one doesn't.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable

from sta_adapter._validate import shown
from sta_adapter.data.message import Record
from sta_adapter.errors import DataError

SETTINGS = ("fps", "nframes", "min_frames", "max_frames", "min_pixels", "max_pixels", "video_start", "video_end", "folder_fps")  # fmt: skip
_SHORT = {"start": "video_start", "end": "video_end"}  # as MVBench has them
KINDS = ("video", "image")
VISUAL_KEYS = frozenset((*KINDS, *(f"{kind}s" for kind in KINDS), *SETTINGS, *_SHORT))
_KNOWN = (
    *("messages", "conversations", "system", "question", "answer", "options", "candidates", "choices", "category"),
    *sorted(VISUAL_KEYS),
)
_NOT_READ = (  # what other tools do something with
    *("audio", "audios", "tools", "objects", "history", "subtitle", "subtitles", "subtitle_path"),
    *("kto_tag", "chosen", "rejected_response", "rejected_messages", "rejected_images", "loss", "loss_mask"),
    *("total_pixels", "resized_height", "resized_width"),
)
_UNIT = r"(_?(time(stamp)?|s|secs?|seconds?|ms|frame(_?(id|idx|index|num|number))?))?"
_MEANT = {
    "nframes": re.compile(r"(video_)?n(um|_|um_)?frames?", re.IGNORECASE),
    "fps": re.compile(r"(video|sampled?|sampling)_?fps", re.IGNORECASE),
    "max_frames": re.compile(r"(fps|video)_?max_?(frames|len)", re.IGNORECASE),
    "min_frames": re.compile(r"(fps|video)_?min_?frames", re.IGNORECASE),
    "max_pixels": re.compile(r"(video|image)_?max_?pixels", re.IGNORECASE),
    "min_pixels": re.compile(r"(video|image)_?min_?pixels", re.IGNORECASE),
    "video_start": re.compile(
        rf"(video|clip)?_?(start|begin){_UNIT}|(time|frame)_?(start|begin)|(video|clip|time)_?(range|span|segment|interval|window)", re.IGNORECASE
    ),
    "video_end": re.compile(rf"(video|clip)?_?(end|stop){_UNIT}|(time|frame)_?(end|stop)", re.IGNORECASE),
    "system": re.compile(r"system_?(prompt|message|instruction|text)s?", re.IGNORECASE),
    "options": re.compile(r"(answer_?)?(option|choice|candidate)s?[ _]?(\d{1,2}|[a-h])", re.IGNORECASE),
    "video": re.compile(r"(videos?|clips?|media)(_?(files?|filenames?|paths?|urls?|uris?|list))?", re.IGNORECASE),
    "image": re.compile(
        r"(images?|imgs?|pictures?|photos?)(_?(files?|filenames?|paths?|urls?|uris?|list))?", re.IGNORECASE
    ),
}  # fmt: skip


def visuals(record: Record) -> dict[str, list[object]]:
    """The clips and pictures beside a record's words, in order; settings beside a single one go with it."""
    found = {kind: _listed(record, kind) for kind in KINDS}
    settings = {key: record[key] for key in SETTINGS if key in record}
    for short, name in _SHORT.items():
        if short in record:
            if name in settings:
                raise DataError(f"both {short!r} and {name!r} are given, expected one of them.")
            settings[name] = record[short]
    if not settings:
        return found
    if "folder_fps" in settings and isinstance(record.get("video"), list) and len(record["video"]) > 1:
        return {**found, "video": [{"video": record["video"], **settings}]}  # pictures of one clip
    kind = "image" if "image" in record and "video" not in record else "video"
    if kind not in record or len(found[kind]) != 1 or not isinstance(found[kind][0], (str, os.PathLike)):
        names = ", ".join(repr(key) for key in record if key in (*SETTINGS, *_SHORT))
        raise DataError(
            f"{names} beside the words belongs to no single 'video' beside them. Write it with the clip that it is about: "
            '{"video": "clip.mp4", "fps": 2} in \'videos\', or in the message\'s own part.'
        )
    return {**found, kind: [{kind: found[kind][0], **settings}]}


def _listed(record: Record, kind: str) -> list[object]:
    """What stands under 'video' or 'videos'."""
    several = f"{kind}s"
    if kind in record and record.get(several):
        raise DataError(f"both '{kind}' and '{several}' are given, expected one of them.")
    if kind in record:
        return record[kind] if isinstance(record[kind], list) else [record[kind]]
    paths = record.get(several, [])
    if not isinstance(paths, list):
        raise DataError(f"'{several}' is {kind_of(paths)}, expected a list of paths.")
    return list(paths)


def extra_fields(record: Record, used: Iterable[str]) -> Record:
    """What a record holds besides the keys that are used; a DataError for a key that was certainly meant to be read."""
    extra = {key: value for key, value in record.items() if key not in used}
    for key, value in extra.items():
        if key in _NOT_READ or (key == "label" and isinstance(value, bool)):  # whether the answer is a good one
            raise DataError(f"{key!r} is not read, so the sample would not be what it says; leave it out.")
        if key in _KNOWN:
            raise DataError(f"{key!r} has no effect in a record of this format; leave it out, or write it another way.")
        near = _near(key)
        if near is not None:
            raise DataError(f"unknown key {shown(key)}. Did you mean {near!r}?")
    return extra


def _near(key: str) -> str | None:
    """The known key that one was meant to be; None for a name of its own, such as question_id or videoid."""
    meant = next((name for name, pattern in _MEANT.items() if pattern.fullmatch(key)), None)
    own_name = key.lower().endswith("id") or any(key.startswith(f"{name}_") for name in _KNOWN)
    if meant is not None or own_name:
        return meant
    return next(iter(difflib.get_close_matches(key.lower(), _KNOWN, n=1, cutoff=0.82)), None)


def printable(value: object) -> str:
    """A value as a text that any output takes: half a character, as a text that was cut within an emoji has it, by its number."""
    return str(value).encode(errors="backslashreplace").decode()


def kind_of(value: object) -> str:
    """How an error names what was found."""
    if value is None:
        return "missing"
    if isinstance(value, (str, list)) and not value:
        return "empty"
    names = {dict: "an object", list: "a list", str: "a text", bool: "true/false", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)
