"""Something-Something v2: its label files as they are published, and the ten classes of SSv2-T10.

A label file is a JSON array of {"id": "78687", "label": ..., "template": "Holding [something] next to [something]", ...};
the clip of an id is `ID.webm`, which is read as it is.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sta_adapter.demo.clips import LABELS, render
from sta_adapter.errors import DataError
from sta_adapter.evaluation.benchmarks.ssv2_t10 import CLASSES as TEN
from sta_adapter.video import write_clip


@dataclass(frozen=True)
class Action:
    """A clip and its class."""

    id: str
    template: str


def read_actions(file: Path, classes: Sequence[str] | None = None) -> list[Action]:
    """The clips of a label file, of all classes or of these."""
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
        actions = [Action(str(entry["id"]), entry["template"]) for entry in entries]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{file} is no label file of Something-Something v2 ({error!r}); expected its train.json or validation.json."
        ) from error
    chosen = [action for action in actions if classes is None or action.template in classes]
    if not chosen:
        raise DataError(
            f"{file}: none of its {len(actions)} clips is of a wanted class, such as {(classes or [''])[0]!r}."
        )
    return chosen


def split(actions: Sequence[Action], test_share: float, seed: int) -> tuple[list[Action], list[Action]]:
    """Clips to train on and clips to test on, drawn at random; the same seed gives the same split."""
    shuffled = list(actions)
    random.Random(seed).shuffle(shuffled)
    border = len(shuffled) - round(len(shuffled) * test_share)
    return shuffled[:border], shuffled[border:]


def write_jsonl(file: Path, records: Sequence[dict[str, object]]) -> Path:
    """Write one record a line, and give the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return file


def make_tiny_release(folder: Path, clips: int) -> tuple[Path, Path]:
    """A label file and its clips for `--tiny`: made motions under the names of the ten classes; gives file and folder."""
    videos = folder / "videos"
    videos.mkdir(parents=True, exist_ok=True)
    entries = []
    for index in range(clips):
        write_clip(videos / f"{index}.mp4", render(LABELS[index % 10], index, frames=8, size=32), fps=8)
        entries.append({"id": str(index), "template": TEN[index % 10], "label": "", "placeholders": []})
    labels = folder / "train.json"
    labels.write_text(json.dumps(entries), encoding="utf-8")
    return labels, videos
