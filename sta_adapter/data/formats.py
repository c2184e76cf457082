"""Data sets' own files as conversations: Something-Something v2's label files and multiple-choice files.

A format is told from a record's keys alone, and only where they leave no doubt; everything else is an error that lists
the formats.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Collection
from pathlib import Path
from string import ascii_uppercase as LETTERS

from sta_adapter._validate import shown
from sta_adapter.data.message import Record
from sta_adapter.data.sample_keys import VISUAL_KEYS, extra_fields, visuals
from sta_adapter.errors import DataError

FORMATS = {
    "conversations": "'messages' (or 'conversations'), a list of turns; or 'question' and 'answer', with the clip as 'video'",
    "multiple-choice": "'question', 'options' (or 'candidates', 'choices') and 'answer', with the clip as 'video'",
    "ssv2": "'id' and 'template', as in Something-Something v2's train.json and validation.json",
}
SSV2_QUESTION = "Which action does the video show? Say 'something' for every object."
CHOICE_REQUEST = "Answer with the letter of the right option alone."
_CONVERSATION = {"system", "category"}
_SPLIT_NAME = re.compile(r"(train|validation|test)(?=\.json$)")
_OPTIONS = ("options", "candidates", "choices")


def recognise(record: Record) -> str:
    """The name of a record's format, by its keys."""
    if "messages" in record or "conversations" in record:
        return "conversations"
    if "question" in record and (_option_keys(record) or _options_in_columns(record)):
        return "multiple-choice"
    if "question" in record and "answer" in record:
        return "conversations"
    if "id" in record and "template" in record:
        return "ssv2"
    keys = ", ".join(list(record)[:8]) + (", ..." if len(record) > 8 else "") or "none"
    known = "; ".join(f"{name}: {what}" for name, what in FORMATS.items())
    raise DataError(f"a record of no known format. Keys: {keys}. Expected one of: {known}.")


def as_conversation(record: Record, format: str | None, classes: dict[str, int] | None = None) -> Record:
    """A record of a format, None for that which its keys tell, as one with 'messages'."""
    name = format or recognise(record)
    if name == "ssv2":
        return _from_ssv2(record, classes)
    return _from_choices(record) if name == "multiple-choice" else _from_question(record)


def read_classes(path: Path) -> dict[str, int] | None:
    """Something-Something v2's class names and numbers, from the labels.json beside a train.json or validation.json."""
    name, replaced = _SPLIT_NAME.subn("labels", path.name)
    if not replaced or not path.with_name(name).is_file():
        return None
    file = path.with_name(name)
    try:
        found = json.loads(file.read_text(encoding="utf-8-sig"))
        return {str(label): int(number) for label, number in found.items()}
    except (OSError, ValueError, OverflowError, AttributeError, TypeError, RecursionError) as error:
        raise DataError(f"{file} is no list of classes; expected an object of names and numbers.") from error


def _from_ssv2(record: Record, classes: dict[str, int] | None) -> Record:
    """The class is the template without its brackets: "Holding [something] next to [something]"."""
    template, name = record.get("template"), record.get("id")
    if not isinstance(template, str) or not template.strip():
        raise DataError(
            "no 'template' to learn (the official test.json has none): use train.json or validation.json of "
            "Something-Something v2."
        )
    if not isinstance(name, (str, int)) or isinstance(name, bool) or not str(name).strip():
        raise DataError(f"'id' is {shown(name)}, expected the video's number.")
    label = template.replace("[", "").replace("]", "")
    if not VISUAL_KEYS.isdisjoint(record):
        raise DataError(
            "a record of Something-Something v2 names its clip by its 'id' alone, without 'video' and settings."
        )
    extra = extra_fields(record, {"template"})
    if classes is not None:
        if label not in classes:
            raise DataError(
                f"the class {shown(label)} is not among the {len(classes)} of labels.json beside this file."
            )
        extra["class"] = classes[label]
    return {
        **extra,
        "messages": _turns("<video>" + SSV2_QUESTION, label),
        "videos": [f"{name}.webm"],
        "category": label,
    }


def _from_question(record: Record) -> Record:
    """A question with its answer in words is a conversation of one turn; what has turns stays as it is."""
    if "messages" in record or "conversations" in record:
        return record
    answer = record.get("answer")
    if isinstance(answer, int) and not isinstance(answer, bool):
        answer = str(answer)
    if not isinstance(answer, str) or not answer.strip():
        raise DataError(f"'answer' is {shown(answer)}, expected a text.")
    return _asked(record, _question(record), answer)


def _from_choices(record: Record) -> Record:
    """The options are listed under letters, and the answer is a letter."""
    question, keys = _question(record), _option_keys(record)
    if len(keys) > 1:
        raise DataError(f"{' and '.join(map(repr, keys))} are given, expected one of them.")
    columns = {} if keys else _options_in_columns(record)
    options = _options(record.get(keys[0]) if keys else list(columns.values()) or None)
    letters, right = list(LETTERS[: len(options)]), record.get("answer")
    if isinstance(right, str) and f"a{right}" in columns:
        right = int(right)  # cells of a table are texts
    answer = letters[_answer_index(right, options)]
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip(letters, options, strict=True))
    conversation = _asked(record, question, answer, f"\n{listed}\n{CHOICE_REQUEST}", {*keys, *columns})
    return {**conversation, "options": letters, "option_texts": options}


def _question(record: Record) -> str:
    question = record.get("question")
    if not isinstance(question, str) or not question.strip():
        raise DataError(f"'question' is {shown(question)}, expected a text.")
    return question.strip()


def _asked(record: Record, question: str, answer: str, behind: str = "", read: Collection[str] = ()) -> Record:
    """A conversation of one turn: the question, `behind` it the options, and the answer; clips and pictures in front, unless placed.

    `read` are further keys of the record that were read.
    """
    beside = visuals(record)
    if not any(beside.values()):
        raise DataError("there is no 'video' and no 'image' that the question is about.")
    if "<video>" not in question and "<image>" not in question:
        question = "".join(f"<{kind}>" * len(paths) for kind, paths in beside.items()) + question
    return {
        **extra_fields(record, VISUAL_KEYS | _CONVERSATION | {"question", "answer", *read}),
        **{key: record[key] for key in _CONVERSATION & record.keys()},
        "messages": _turns(question + behind, answer),
        **{f"{kind}s": paths for kind, paths in beside.items()},
    }


def _option_keys(record: Record) -> list[str]:
    return [key for key in _OPTIONS if key in record]


def _options_in_columns(record: Record) -> Record:
    """Options in fields of their own, as tables have them: A, B, ... or a0, a1, ...; nothing where there are fewer than two."""
    for names in (list(LETTERS), [f"a{number}" for number in range(len(LETTERS))]):
        found = list(itertools.takewhile(record.__contains__, names))
        if len(found) > 1:
            beyond = next((name for name in names[len(found) :] if name in record), None)
            if beyond is not None:
                missing = names[len(found)]
                raise DataError(
                    f"the options {', '.join(found)} are followed by {beyond}, expected {missing}: none may be empty."
                )
            return {name: record[name] for name in found}
    return {}


def _options(given: object) -> list[str]:
    """The options' texts, without letters of their own."""
    if isinstance(given, dict):
        if [str(key).upper() for key in given] != list(LETTERS[: len(given)]):
            raise DataError(f"'options' has the keys {', '.join(map(str, given))}, expected A, B, ... in order.")
        given = list(given.values())
    right = isinstance(given, list) and all(isinstance(option, str) and option.strip() for option in given)
    if not isinstance(given, list) or not right or not 2 <= len(given) <= len(LETTERS):
        raise DataError(f"'options' is {shown(given)}, expected a list of 2 to {len(LETTERS)} texts.")
    own = [re.match(rf"\(?{letter}[.):]\s*(?=\S)", text) for letter, text in zip(LETTERS, given, strict=False)]
    if all(own):
        return [text[match.end() :].strip() for text, match in zip(given, own, strict=True) if match]
    return [text.strip() for text in given]


def _answer_index(answer: object, options: list[str]) -> int:
    """Which option is right: given as its text, its letter ("B", "(b)", "B."), both ("B. up") or its index, counted from 0."""
    expected = f"expected a letter up to {LETTERS[len(options) - 1]}, an index from 0 to {len(options) - 1}, or an option's text"
    given = isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(options)
    if not given and (not isinstance(answer, str) or not answer.strip()):
        raise DataError(f"'answer' is {shown(answer)}, {expected}.")
    said = str(answer).strip()
    found = {index for index, option in enumerate(options) if option == said}
    if isinstance(answer, int):
        found.add(answer)
    if letter := re.fullmatch(r"\(?([A-Za-z])[.):]?", said):
        index = LETTERS.index(letter[1].upper())
        found |= {index} if index < len(options) else set()
    if both := re.fullmatch(r"\(?([A-Za-z])[.):]\s*(.+)", said):
        index = LETTERS.index(both[1].upper())
        found |= {index} if options[index : index + 1] == [both[2]] else set()
    if len(found) != 1:
        doubt = "could mean several options" if found else "is none of the options"
        raise DataError(f"'answer' is {shown(answer)}, which {doubt} {shown(options)}; {expected}.")
    return found.pop()


def _turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
