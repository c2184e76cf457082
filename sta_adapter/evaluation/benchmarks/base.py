"""What every benchmark's file makes: questions with labelled options about one clip."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sta_adapter.data.conversation import Sample
from sta_adapter.data.message import Message, Part, Record
from sta_adapter.errors import DataError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass
class EvalSet:
    """Questions, and what was left out of them."""

    samples: list[Sample] = field(default_factory=list)  # in the order of the annotation files
    notes: list[str] = field(default_factory=list)  # sentences for the reader of the results

    def add(self, file: Path, rows: Iterable[Record], make: Callable[[Record, str], Sample]) -> None:
        """Make a sample of each record of a file, from it and where it stands; those that don't add up become a note."""
        bad = []
        for number, row in enumerate(rows, start=1):
            try:
                self.samples.append(make(row, f"{file}, entry {number}"))
            except DataError as error:
                bad.append(str(error))
        if bad:
            self.notes.append(f"{len(bad)} left out, as their annotations don't add up. The first: {bad[0]}")


def question(
    clip: Path,
    text: str,
    labels: Sequence[str],
    texts: Sequence[str],
    right: int,
    *,
    source: str,
    category: str,
    settings: Mapping[str, float] | None = None,
    before: str | None = None,
    extra: Mapping[str, str] | None = None,
) -> Sample:
    """A sample that asks about a clip, which is a file or a folder of pictures.

    `before` stands in front of the clip, `text` behind it, as the benchmark words them. Options are called `labels`, and
    say `texts`; the answer is the label `right`. `settings` are the clip's, such as `video_start`; `extra` are further
    fields to group results by.
    """
    lead = [{"type": "text", "text": before}] if before else []
    user: list[Part] = [
        *lead,
        {"type": "video", "video": str(clip), **(settings or {})},
        {"type": "text", "text": text},
    ]
    messages: list[Message] = [
        {"role": "user", "content": user},
        {"role": "assistant", "content": [{"type": "text", "text": labels[right]}]},
    ]
    return Sample(messages, source, category, list(labels), {"option_texts": list(texts), **(extra or {})})
