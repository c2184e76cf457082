"""Data sets' own files as conversations: Something-Something v2's label files and multiple-choice files.

Public: `FORMATS`, `recognise(record)`, `as_conversation(record, format, classes)`, `read_classes(path)`. A format is told from a record's
keys alone, and only where they leave no doubt; everything else is an error that lists the formats.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sta_adapter.errors import DataError

FORMATS = {
    "conversations": "'messages' (or 'conversations'), a list of turns",
    "multiple-choice": "'question', 'options' (or 'candidates') and 'answer', with the clip as 'video'",
    "ssv2": "'id' and 'template', as in Something-Something v2's train.json and validation.json",
}
SSV2_QUESTION = "Which action does the video show? Say 'something' for every object."
CHOICE_REQUEST = "Answer with the letter of the right option alone."
_SPLIT_NAME = re.compile(r"(train|validation|test)(?=\.json$)")
_PART_KEYS = ("fps", "nframes", "min_frames", "max_frames", "min_pixels", "max_pixels", "video_start", "video_end")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def recognise(record: dict[str, Any]) -> str:
    """The name of a record's format.

    Raises:
        DataError: it has none of the formats' keys.
    """
    if "messages" in record or "conversations" in record:
        return "conversations"
    if "question" in record and ("options" in record or "candidates" in record):
        return "multiple-choice"
    if "id" in record and "template" in record:
        return "ssv2"
    keys = ", ".join(list(record)[:8]) + (", ..." if len(record) > 8 else "") or "none"
    known = "; ".join(f"{name}: {what}" for name, what in FORMATS.items())
    raise DataError(f"a record of no known format. Keys: {keys}. Expected one of: {known}.")


def as_conversation(record: dict[str, Any], format: str | None, classes: dict[str, int] | None = None) -> Any:
    """A record of any format as one with 'messages'.

    Args:
        record: the object of one sample.
        format: one of `FORMATS`; None to recognise it.
        classes: of Something-Something v2, by name, where the list is at hand.

    Raises:
        DataError: the record is not of that format.
    """
    convert = _CONVERT[format or recognise(record)]
    return record if convert is None else convert(record, classes)


def read_classes(path: Path) -> dict[str, int] | None:
    """Something-Something v2's class names and numbers, from the labels.json beside a train.json or validation.json."""
    name, replaced = _SPLIT_NAME.subn("labels", path.name)
    file = path.with_name(name)
    if not replaced or not file.is_file():
        return None
    try:
        return {str(label): int(number) for label, number in json.loads(file.read_text(encoding="utf-8")).items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise DataError(f"{file} is no list of classes; expected an object of names and numbers.") from error


def _from_ssv2(record: dict[str, Any], classes: dict[str, int] | None) -> dict[str, Any]:
    """The class is the template without its brackets: "Holding [something] next to [something]"."""
    template, name = record.get("template"), record.get("id")
    if not isinstance(template, str) or not template.strip():
        raise DataError(
            "no 'template' to learn (the official test.json has none): use train.json or validation.json of "
            "Something-Something v2."
        )
    if not isinstance(name, (str, int)) or isinstance(name, bool) or not str(name).strip():
        raise DataError(f"'id' is {name!r}, expected the video's number.")
    label = template.replace("[", "").replace("]", "")
    extra = {key: value for key, value in record.items() if key != "template"}
    if classes is not None:
        if label not in classes:
            raise DataError(f"the class {label!r} is not among the {len(classes)} of labels.json beside this file.")
        extra["class"] = classes[label]
    return {
        **extra,
        "messages": _turns("<video>" + SSV2_QUESTION, label),
        "videos": [f"{name}.webm"],
        "category": label,
    }


def _from_choices(record: dict[str, Any], classes: dict[str, int] | None) -> dict[str, Any]:
    """The options are listed under letters, and the answer is a letter."""
    question = record.get("question")
    if not isinstance(question, str) or not question.strip():
        raise DataError(f"'question' is {question!r}, expected a text.")
    options = _options(record.get("options", record.get("candidates")))
    letters = list(_LETTERS[: len(options)])
    answer = letters[_answer_index(record.get("answer"), options)]
    visuals = {f"{kind}s": _paths(record, kind) for kind in ("video", "image")}
    places = "".join(f"<{key[:-1]}>" * len(paths) for key, paths in visuals.items())
    if "<video>" in question or "<image>" in question:
        places = ""
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip(letters, options, strict=True))
    used = {"question", "options", "candidates", "answer", "video", "image", "start", "end", *_PART_KEYS}
    return {
        **{key: value for key, value in record.items() if key not in used},
        "messages": _turns(f"{places}{question.strip()}\n{listed}\n{CHOICE_REQUEST}", answer),
        **visuals,
        "options": letters,
        "option_texts": options,
    }


def _options(given: Any) -> list[str]:
    """The options' texts, without letters of their own."""
    if isinstance(given, dict):
        if [str(key).upper() for key in given] != list(_LETTERS[: len(given)]):
            raise DataError(f"'options' has the keys {', '.join(map(str, given))}, expected A, B, ... in order.")
        given = list(given.values())
    fits = isinstance(given, list) and 2 <= len(given) <= len(_LETTERS)
    if not fits or not all(isinstance(option, str) and option.strip() for option in given):
        raise DataError(f"'options' is {given!r}, expected a list of 2 to {len(_LETTERS)} texts.")
    own = [re.match(rf"\(?{letter}[.):]\s*(?=\S)", text) for letter, text in zip(_LETTERS, given, strict=False)]
    if all(own):
        return [text[match.end() :].strip() for text, match in zip(given, own, strict=True) if match]
    return [text.strip() for text in given]


def _answer_index(answer: Any, options: list[str]) -> int:
    """Which option is right: given as its text, its letter ("B", "(b)", "B."), both ("B. up") or its index, counted from 0."""
    expected = f"expected a letter up to {_LETTERS[len(options) - 1]}, an index from 0 to {len(options) - 1}, or an option's text"
    if isinstance(answer, int) and not isinstance(answer, bool):
        if not 0 <= answer < len(options):
            raise DataError(f"'answer' is {answer}, {expected}.")
        return answer
    if not isinstance(answer, str) or not answer.strip():
        raise DataError(f"'answer' is {answer!r}, {expected}.")
    found = {index for index, option in enumerate(options) if option == answer.strip()}
    if letter := re.fullmatch(r"\(?([A-Za-z])[.):]?", answer.strip()):
        index = _LETTERS.index(letter[1].upper())
        found |= {index} if index < len(options) else set()
    if both := re.fullmatch(r"\(?([A-Za-z])[.):]\s*(.+)", answer.strip()):
        index = _LETTERS.index(both[1].upper())
        found |= {index} if options[index : index + 1] == [both[2]] else set()
    if len(found) != 1:
        doubt = "could mean several options" if found else "is none of the options"
        raise DataError(f"'answer' is {answer!r}, which {doubt} {options!r}; {expected}.")
    return found.pop()


def _paths(record: dict[str, Any], kind: str) -> Any:
    """What stands under 'video' or 'videos'; settings beside a single 'video' go with it."""
    single, several = record.get(kind), record.get(f"{kind}s")
    if single is None:
        return several or []
    if several:
        raise DataError(f"both '{kind}' and '{kind}s' are given, expected one of them.")
    if kind == "image":
        return [single]
    settings = {key: record[key] for key in _PART_KEYS if record.get(key) is not None}
    for short in ("start", "end"):  # as MVBench has them
        if record.get(short) is not None:
            settings.setdefault(f"video_{short}", record[short])
    return [{"video": single, **settings}]


def _turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


_CONVERT: dict[str, Callable[[dict[str, Any], dict[str, int] | None], dict[str, Any]] | None] = {
    "conversations": None,
    "multiple-choice": _from_choices,
    "ssv2": _from_ssv2,
}
