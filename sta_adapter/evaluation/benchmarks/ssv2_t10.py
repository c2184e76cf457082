"""SSv2-T10: ten classes of Something-Something v2 that differ in time; the answer is the class in words.

`labels/validation.json` and the clips in `20bn-something-something-v2/` (or `videos/`), as `ID.webm`. The published
split, a fifth of train.json drawn without a seed, can't be drawn again, so the official validation clips of the ten
classes are asked. Question and answer are the published ones; the class's name alone is right as well.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from sta_adapter.data.conversation import Sample
from sta_adapter.data.message import Record
from sta_adapter.errors import DataError
from sta_adapter.evaluation.benchmarks.base import (
    EvalSet,
    clip_file,
    find,
    first_folder,
    question,
    read_annotations,
    text_field,
)

CLASSES = (
    "Pulling [something] from left to right",
    "Pulling [something] from right to left",
    "Throwing [something] in the air and catching it",
    "Throwing [something] in the air and letting it fall",
    "[Something] falling like a rock",
    "Rolling [something] on a flat surface",
    "Poking a stack of [something] so the stack collapses",
    "Picking [something] up",
    "Moving [something] away from [something]",
    "Moving [something] closer to [something]",
)
BEFORE = "Look at the provided video and answer the question."
QUESTION = "What is the action happening in this video?"
ANSWERS = [f"The action happening in this video is: {name}" for name in CLASSES]


def load(folder: Path) -> EvalSet:
    """The validation clips of the ten classes."""
    files = find(folder, "labels/*validation.json", "*validation.json")
    clips = first_folder(folder, ("20bn-something-something-v2", "videos", "video", "data"))
    if not files or clips is None:
        raise DataError(
            f"{folder} holds no labels/validation.json with 20bn-something-something-v2/ beside it; expected a copy of "
            "Something-Something v2."
        )
    found = EvalSet(
        notes=["The official validation clips of the ten classes; the published split can't be drawn again."]
    )
    rows = [row for row in read_annotations(files[0]) if row.get("template") in CLASSES]
    found.add(files[0], rows, partial(_sample, clips=clips))
    return found


def _sample(row: Record, source: str, clips: Path) -> Sample:
    template = row["template"]
    number = {**row, "id": str(row["id"])} if type(row.get("id")) is int else row
    clip = clip_file(clips, f"{text_field(number, 'id', source)}.webm")
    right, category = CLASSES.index(template), template.replace("[", "").replace("]", "")
    return question(clip, QUESTION, ANSWERS, CLASSES, right, source=source, category=category, before=BEFORE)
