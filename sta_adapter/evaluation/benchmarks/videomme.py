"""Video-MME, without subtitles: `videomme/test-*.parquet` and the clips in `data/` (or `videos/`), by their YouTube names.

Grouped by `task_type`; `duration`, `domain` and `sub_category` are there to group by as well. Prompt as in the
benchmark's own readme.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from sta_adapter.data.conversation import Sample
from sta_adapter.data.message import Record
from sta_adapter.errors import DataError
from sta_adapter.evaluation.benchmarks.base import (
    LETTERS,
    EvalSet,
    clip_file,
    find,
    first_folder,
    options_field,
    question,
    read_annotations,
    text_field,
)

REQUEST = (
    "Select the best answer to the following multiple-choice question based on the video. "
    "Respond with only the letter (A, B, C, or D) of the correct option."
)
GROUPS = ("duration", "domain", "sub_category", "task_type")


def load(folder: Path) -> EvalSet:
    """All questions."""
    files = find(folder, "videomme/test*", "test*", "*.parquet")
    clips = first_folder(folder, ("data", "videos", "video"))
    if not files or clips is None:
        raise DataError(
            f"{folder} holds no videomme/test-*.parquet with data/ beside it; expected a copy of Video-MME."
        )
    found = EvalSet(notes=["Asked without subtitles."])
    for file in files:
        found.add(file, read_annotations(file), partial(_sample, clips=clips))
    return found


def _sample(row: Record, source: str, clips: Path) -> Sample:
    asked, answer, name = (text_field(row, key, source) for key in ("question", "answer", "videoID"))
    options = options_field(row, "options", source)
    labels = LETTERS[: len(options)]
    if len(answer) != 1 or answer not in labels:
        raise DataError(f"{source}: the answer {answer!r} is none of the letters {', '.join(labels)}.")
    texts = [re.sub(r"^[A-Z][.)]\s*", "", option) for option in options]
    text = "\n".join([REQUEST, asked, *options, "The best answer is:"])
    groups = {key: text_field(row, key, source) for key in GROUPS if row.get(key)}
    category = text_field(row, "task_type", source)
    clip = clip_file(clips, f"{name}.mp4")
    return question(clip, text, labels, texts, labels.index(answer), source=source, category=category, extra=groups)
