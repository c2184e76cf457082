"""VITATECS: is a caption or its counterfactual true of the clip, which differ in one aspect of time.

`data/ASPECT.jsonl` with clips in `videos/MSRVTT` and `videos/VATEX` (its repository), or `ASPECT/test-*.parquet` with
clips in `MSRVTT` and `VATEX` (the Hub). As a question with two options it is worded, and its options ordered, as in
lmms-eval.
"""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

from sta_adapter.data.conversation import Sample
from sta_adapter.data.message import Record
from sta_adapter.errors import DataError
from sta_adapter.evaluation.benchmarks.base import EvalSet, clip_file, find, question, read_annotations, text_field

ASPECTS = ("Direction", "Intensity", "Sequence", "Compositionality", "Localization", "Type")


def load(folder: Path) -> EvalSet:
    """The questions of every aspect whose annotations are there."""
    found, missing = EvalSet(), []
    clips = folder / "videos" if (folder / "videos").is_dir() else folder
    for aspect in ASPECTS:
        files = find(folder, f"data/{aspect}.*", f"{aspect}/test*", f"{aspect}.*")
        if not files:
            missing.append(aspect)
        for file in files:
            found.add(file, read_annotations(file), partial(_sample, clips=clips, aspect=aspect))
    if missing:
        found.notes.append(f"No annotations of {', '.join(missing)}.")
    if not found.samples:
        raise DataError(
            f"{folder} holds no data/Direction.jsonl or Direction/test-*.parquet; expected a copy of VITATECS."
        )
    return found


def _sample(row: Record, source: str, clips: Path, aspect: str) -> Sample:
    true, false, origin, name = (
        text_field(row, key, source) for key in ("caption", "counterfactual", "src_dataset", "video_name")
    )
    seed = sum(map(ord, true + false)) % 100
    right = 0 if random.Random(seed).random() > 0.5 else 1
    texts = [_sentence(caption) for caption in ((true, false) if right == 0 else (false, true))]
    text = (
        f"Which of the following best describes the content of the video: \n(A) {texts[0]} \n(B) {texts[1]}"
        "\nPlease response with a single letter (A or B):"
    )
    return question(clip_file(clips / origin, name), text, "AB", texts, right, source=source, category=aspect)


def _sentence(caption: str) -> str:
    return (caption if caption.endswith(".") else f"{caption}.").capitalize()
