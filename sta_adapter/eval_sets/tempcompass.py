"""TempCompass: five aspects of time, asked in four kinds. Clips in `videos/`.

`questions/KIND.json` (its repository), or `KIND/test-*.parquet` (the Hub). Three kinds are scored by matching the answer with the
options; captioning needs a language model as a judge and is left out. Prompts as in the benchmark's own scripts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sta_adapter.errors import DataError
from sta_adapter.eval_sets.question import EvalSet, question
from sta_adapter.eval_sets.tables import clip_file, field, find, read_file
from sta_adapter.samples import Sample

BEST = "\nPlease directly give the best option:"
REQUESTS = {"multi-choice": BEST, "yes_no": "\nPlease answer yes or no:", "caption_matching": BEST}
JUDGED = "captioning"
_OPTION = re.compile(r"\s*((?:Sentence|Option|Caption) \w|[A-Z])[.:)]?\s*(.*\S)\s*")


def load(folder: Path) -> EvalSet:
    """The questions of the three kinds that matching can score."""
    found = EvalSet()
    for kind in (*REQUESTS, JUDGED):
        files = find(folder, f"questions/{kind}.*", f"{kind}/test*")
        rows = [row for file in files for row in _rows(file)]
        if kind == JUDGED:
            if rows:
                found.notes.append(
                    f"{kind}: {len(rows)} questions left out, as scoring them takes a language model as judge."
                )
        elif rows:
            found.samples += [_sample(row, source, folder / "videos", kind) for source, row in rows]
        else:
            found.notes.append(f"No annotations of {kind}.")
    if not found.samples:
        raise DataError(
            f"{folder} holds no questions/multi-choice.json or multi-choice/test-*.parquet; expected TempCompass."
        )
    return found


def _rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """One record a question: JSON is nested as clip, aspect, questions; parquet is flat."""
    rows = read_file(file)
    if isinstance(rows, dict):
        rows = [
            {"video_id": clip, "dim": aspect, **row}
            for clip, aspects in rows.items() for aspect, asked in aspects.items() for row in asked
        ]  # fmt: skip
    for number, row in enumerate(rows, start=1):
        yield f"{file}, question {number}", row


def _sample(row: dict[str, Any], source: str, clips: Path, kind: str) -> Sample:
    asked, answer, name, aspect = (field(row, key, source) for key in ("question", "answer", "video_id", "dim"))
    if kind == "yes_no":
        labels, texts, right = ["yes", "no"], [], ["yes", "no"].index(answer)
    else:
        lines = asked.split("\n")[1:]
        read = [_OPTION.fullmatch(line) for line in lines]
        if answer not in lines or not all(read):
            raise DataError(f"{source}: the answer {answer!r} is none of the options {lines!r}.")
        labels, texts = ([match[group] for match in read if match] for group in (1, 2))
        right = lines.index(answer)
    clip = clip_file(clips, f"{name}.mp4")
    names = {"kind": kind, "aspect": aspect}
    return question(
        clip, asked + REQUESTS[kind], labels, texts, right, source=source, category=f"{kind}: {aspect}", **names
    )
