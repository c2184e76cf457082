"""Samples as other training tools write them, to ours and back; see `convert_data` for whole files."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from sta_adapter.data.conversation import Sample
from sta_adapter.data.message import Message, Record
from sta_adapter.data.sample_keys import SETTINGS
from sta_adapter.errors import DataError

__all__ = ["TOOLS", "as_ours", "settings_lost", "to_record"]

PATH_KEYS = ("path", "url")  # what a part is also called by, beside its type


def as_ours(record: Mapping[str, object]) -> Record:
    """A record of ms-swift, LLaMA-Factory (sharegpt and alpaca), TRL or axolotl as one of ours; ours stay as they are.

    Preferences become a conversation that ends with the better answer, with the worse one's text under `rejected`.

    Raises:
        DataError: an answer of a pair is missing, or not one text.
    """
    found: Record = {key: value for key, value in record.items() if value is not None}
    if "instruction" in found:
        asked = "\n".join(str(text) for text in (found.pop("instruction"), found.pop("input", "")) if text)
        found |= _turns(asked, found.pop("output", ""), found.pop("history", []))
    elif "query" in found:
        found |= _turns(found.pop("query"), found.pop("response", ""), found.pop("history", []))
    elif isinstance(found.get("prompt"), list):
        found["messages"] = [*found.pop("prompt"), *(found.pop("completion", None) or [])]
    for key in ("video", "image") if isinstance(found.get("chat_template_kwargs"), Mapping) else ():
        given = {k: v for k, v in found["chat_template_kwargs"].items() if k in SETTINGS and v is not None}
        paths = found.get(f"{key}s") or []
        found[f"{key}s"] = [{key: path, **_meant_for(key, given)} for path in paths if isinstance(path, str)] or paths
    found.pop("chat_template_kwargs", None)
    if others := [key for key in ("rejected_videos", "rejected_images") if found.get(key)]:
        raise DataError(
            f"{others[0]!r} gives the worse answer clips of its own, and a pair is two answers to the same ones."
        )
    turns = found.get("messages", found.get("conversations"))
    if not isinstance(turns, list):
        return found
    better, worse = found.pop("chosen", None), found.pop("rejected_response", found.pop("rejected", None))
    turns = [_plain_turn(turn) for turn in turns]
    if "rejected_messages" in found:  # ms-swift's, a whole conversation again
        *before, worse = [_plain_turn(turn) for turn in found.pop("rejected_messages") or [None]]
        if before != turns[:-1]:
            raise DataError("'rejected_messages' differs from 'messages' in more than the last answer.")
    if better is not None:
        turns.append({"role": "assistant", "content": _text(better, "chosen")})
    if worse is not None:
        found["rejected"] = _text(worse, "rejected")
    found.pop("conversations", None)
    return {**found, "messages": turns}


def _turns(asked: object, answer: object, history: object) -> Record:
    if not isinstance(history, list) or any(not isinstance(pair, list) or len(pair) != 2 for pair in history):
        raise DataError(
            f"'history' is {str(history)[:60]!r}, expected a list of pairs, a question and its answer each."
        )
    pairs = [*history, *([(asked, answer)] if answer else [])]
    turns = [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    return {"messages": turns if answer else [*turns, {"role": "user", "content": asked}]}


def _plain_turn(turn: object) -> object:
    """Without the empty fields that `datasets` adds, and with a part's path under its type's name."""
    if not isinstance(turn, Mapping):
        return turn
    turn = {key: value for key, value in turn.items() if value is not None}
    content = turn.get("content")
    if isinstance(content, list):
        turn["content"] = [_plain_part(part) for part in content]
    return turn


def _plain_part(part: object) -> object:
    if not isinstance(part, Mapping):
        return part
    part = {key: value for key, value in part.items() if value is not None}
    kind = part.get("type")
    if kind in ("video", "image") and kind not in part:
        named = next((key for key in PATH_KEYS if key in part), None)
        if named is not None:
            part[kind] = part.pop(named)
    if kind in ("video", "image") and str(part.get(kind, "")).startswith(("http://", "https://", "data:")):
        raise DataError(f"{kind} {str(part[kind])[:60]!r} is no file; download it and give its path.")
    return part


def _text(answer: object, name: str) -> str:
    """The one text of an answer: a text, a message, or a list of one message."""
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    if isinstance(answer, Mapping):
        answer = answer.get("content", answer.get("value"))
    if isinstance(answer, list) and len(answer) == 1 and isinstance(answer[0], Mapping):
        answer = answer[0].get("text")
    if not isinstance(answer, str) or not answer.strip():
        raise DataError(f"{name!r} is {str(answer)[:60]!r}, expected one answer: a text, or a message with one.")
    return answer


def _settings(part: Mapping[str, object]) -> Record:
    """How a clip is sampled, where the record says so."""
    return {key: value for key, value in part.items() if key not in ("type", part["type"])}


def settings_lost(sample: Sample, tool: str) -> set[str]:
    """What of a sample the tool's records have no place for, by the names that it has in ours."""
    if tool == "sta-adapter":
        return set()
    answers = any("loss" in message for message in sample.messages)
    # of a pair the last answer alone counts
    knows_loss = tool in ("ms-swift", "trl") and "rejected" not in sample.extra
    lost = {"loss"} if answers and not knows_loss else set()
    visuals = sample.visuals
    if tool == "trl" or (tool == "ms-swift" and _common(visuals) is not None):  # TRL's rows are read by our collator
        return lost
    return lost.union(*map(_settings, visuals))


def _common(visuals: list[Record]) -> Record | None:
    """The settings that hold for all clips of a row, in ms-swift's `chat_template_kwargs`; None if there are none such."""
    shared = _settings(next((part for part in visuals if part["type"] == "video"), visuals[0])) if visuals else {}
    fits = all(_settings(part) == _meant_for(part["type"], shared) for part in visuals)
    return shared if fits and "folder_fps" not in shared else None


def _meant_for(kind: str, settings: Record) -> Record:
    return settings if kind == "video" else {k: v for k, v in settings.items() if k in ("min_pixels", "max_pixels")}


def to_record(sample: Sample, tool: str) -> Record:
    """A sample as the tool's own record; what `settings_lost` names is left out, and what can't be left out is a DataError."""
    kept = {"category": sample.category, "options": sample.options}
    try:
        return {**_WRITE[tool](sample), **{key: value for key, value in kept.items() if value is not None}}
    except DataError as error:
        raise DataError(error.reason, source=sample.source) from error


def _tagged(messages: list[Message]) -> tuple[list[Record], dict[str, list[str]]]:
    """Messages of plain text with <video> and <image> in it, and the paths that belong there."""
    paths: dict[str, list[str]] = {"videos": [], "images": []}
    turns = []
    for message in messages:
        text = ""
        for part in message["content"]:
            if part["type"] == "text":
                if message["role"] != "assistant" and ("<video>" in part["text"] or "<image>" in part["text"]):
                    raise DataError("a text contains <video> or <image> itself, where the tool would look for a clip.")
                text += part["text"]
            else:
                text += f"<{part['type']}>"
                paths[f"{part['type']}s"].append(part[part["type"]])
        turns.append({"role": message["role"], "content": text})
    return turns, {key: value for key, value in paths.items() if value}


def _ms_swift(sample: Sample) -> Record:
    turns, paths = _tagged(sample.messages)
    for turn, message in zip(turns, sample.messages, strict=True):
        turn |= {"loss": message["loss"]} if "loss" in message else {}
    record: Record = {"messages": turns, **paths}
    if settings := _common(sample.visuals):
        record["chat_template_kwargs"] = settings
    rejected = sample.extra.get("rejected")
    return record if rejected is None else {**record, "rejected_response": rejected}


def _llamafactory(sample: Sample) -> Record:
    turns, paths = _tagged(sample.messages)
    if "rejected" not in sample.extra:
        return {"messages": turns, **paths}
    pair = {"chosen": turns[-1], "rejected": {"role": "assistant", "content": sample.extra["rejected"]}}
    return {"messages": turns[:-1], **pair, **paths}


def _typed(messages: list[Message]) -> list[Record]:
    """Every content a list of parts, as `datasets` refuses a column of texts and lists."""
    return [{**message, "content": [dict(part) for part in message["content"]]} for message in messages]


def _trl(sample: Sample) -> Record:
    turns = _typed(sample.messages)
    if "rejected" not in sample.extra:
        return {"messages": turns, "images": []}  # without the column TRL takes the rows for text
    worse = [{"role": "assistant", "content": [{"type": "text", "text": sample.extra["rejected"]}]}]
    return {"prompt": turns[:-1], "chosen": turns[-1:], "rejected": worse, "images": []}


def _axolotl(sample: Sample) -> Record:
    turns = [
        {
            "role": message["role"],
            "content": [
                {"type": "text", "text": part["text"]}
                if part["type"] == "text"
                else {"type": part["type"], "path": part[part["type"]]}
                for part in message["content"]
            ],
        }
        for message in sample.messages
    ]
    if "rejected" in sample.extra:
        raise DataError("axolotl's preference training takes no clips; pairs are for trl, ms-swift and llamafactory.")
    return {"messages": turns}


def _ours(sample: Sample) -> Record:
    return {"messages": _typed(sample.messages), **sample.extra}


_WRITE: dict[str, Callable[[Sample], Record]] = {
    "ms-swift": _ms_swift,
    "llamafactory": _llamafactory,
    "trl": _trl,
    "axolotl": _axolotl,
    "sta-adapter": _ours,
}
TOOLS = tuple(_WRITE)
