"""TempCompass: five aspects of time, asked in four kinds. Clips in `videos/`.

`questions/KIND.json` (its repository), or `KIND/test-*.parquet` (the Hub). Three kinds are scored by matching the
answer with the options; captioning needs a language model as a judge and is left out. Prompts as in the benchmark's
own scripts.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from sta_adapter._validate import shown
from sta_adapter.data.conversation import Sample
from sta_adapter.data.message import Record
from sta_adapter.errors import DataError
from sta_adapter.evaluation.benchmarks.base import (
    EvalSet,
    clip_file,
    find,
    question,
    read_annotations,
    read_file,
    text_field,
)

BEST = "\nPlease directly give the best option:"
REQUESTS = {"multi-choice": BEST, "yes_no": "\nPlease answer yes or no:", "caption_matching": BEST}
JUDGED = "captioning"
_OPTION = re.compile(r"\s*((?:Sentence|Option|Caption) \w|[A-Z])[.:)]?\s*(.*\S)\s*")


def load(folder: Path) -> EvalSet:
    """The questions of the three kinds that matching can score."""
    found = EvalSet()
    for kind in (*REQUESTS, JUDGED):
        files = find(folder, f"questions/{kind}.*", f"{kind}/test*")
        rows = {file: _rows(file) for file in files}
        if kind == JUDGED and rows:
            count = sum(map(len, rows.values()))
            found.notes.append(f"{kind}: {count} questions left out, as scoring them takes a language model as judge.")
        elif rows:
            for file, asked in rows.items():
                found.add(file, asked, partial(_sample, clips=folder / "videos", kind=kind))
        elif kind != JUDGED:
            found.notes.append(f"No annotations of {kind}.")
    if not found.samples:
        raise DataError(
            f"{folder} holds no questions/multi-choice.json or multi-choice/test-*.parquet; expected TempCompass."
        )
    return found


def _rows(file: Path) -> list[Record]:
    """One record a question: JSON is nested as clip, aspect, questions; parquet is flat."""
    rows = read_file(file)
    if not isinstance(rows, dict):
        return read_annotations(file)
    found: list[Record] = []
    for clip, aspects in rows.items():
        for aspect, asked in aspects.items() if isinstance(aspects, dict) else [("", None)]:
            if not isinstance(asked, list) or not all(isinstance(row, dict) for row in asked):
                raise DataError(f"{file}: {shown(clip)} holds no lists of questions by aspect; expected TempCompass.")
            found += [{"video_id": clip, "dim": aspect, **row} for row in asked]
    return found


def _sample(row: Record, source: str, clips: Path, kind: str) -> Sample:
    asked, answer, name, aspect = (text_field(row, key, source) for key in ("question", "answer", "video_id", "dim"))
    if kind == "yes_no":
        lines = labels = ["yes", "no"]
        texts: list[str] = []
    else:
        lines = asked.split("\n")[1:]
        read = [match for line in lines if (match := _OPTION.fullmatch(line))]
        labels, texts = ([match[group] for match in read] for group in (1, 2))
    if answer not in lines or len(labels) < len(lines):
        raise DataError(f"{source}: the answer {answer!r} is none of the options {lines!r}.")
    right = lines.index(answer)
    clip = clip_file(clips, f"{name}.mp4")
    about = {"kind": kind, "aspect": aspect}
    return question(
        clip, asked + REQUESTS[kind], labels, texts, right, source=source, category=f"{kind}: {aspect}", extra=about
    )
