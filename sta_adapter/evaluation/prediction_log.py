"""A file of predictions, one a line, that an evaluation goes on with after an interruption.

The first line holds the settings, each further one a question's fingerprint and what the model said to it. A last line
that was cut off by a crash is dropped; so are predictions for questions that are no longer asked in just that way. Of
several processes each but the first writes a file of its own beside it (`NAME.part1`, ...), which the first takes over
at the end, or when an evaluation goes on.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from sta_adapter.adapter.atomic_write import atomic_folder_write
from sta_adapter.errors import ConfigError

Kept = dict[str, Any]
"""The fields of a `Prediction`, as the file has them."""


class PredictionLog:
    """Predictions by sample, in memory and, with a path, in a file.

    Args:
        path: the file; None keeps them in memory only.
        part: the process's number.
        overwrite: throw the file's predictions away.
    """

    def __init__(self, path: str | Path | None, part: int = 0, overwrite: bool = False) -> None:
        self.path = None if path is None else Path(f"{path}.part{part}" if part else path)
        self.part = part
        self.overwrite = overwrite
        self.done: dict[int, Kept] = {}  # by sample index
        self.bad: dict[int, str] = {}  # why samples could not be used
        self._file: TextIO | None = None

    def __enter__(self) -> PredictionLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def read(
        self,
        settings: Mapping[str, object],
        questions: Sequence[str],
        renew: Callable[[int, Kept], Kept] = lambda index, prediction: prediction,
    ) -> dict[int, Kept]:
        """What the file holds of an evaluation, by sample index; the first process reads, and refuses a file of another one.

        Args:
            settings: what all predictions must have been made with.
            questions: the fingerprint of each question, by its index: of whatever its prediction depends on besides.
            renew: makes of a prediction read from the file, and the question's index, what it says today.
        """
        self.settings = json.loads(json.dumps(settings))
        self.questions = list(questions)
        if self.path is not None and not self.part:
            for path in [self.path, *self._parts(self.path)]:
                if path.exists() and not self.overwrite:
                    self._read(path, renew)
            self._write_all(self.path)
        return self.done

    def open(self, done: dict[int, Kept]) -> None:
        """Begin to write, with what the first process has read."""
        self.done = dict(done)
        if self.path is None:
            return
        if self.part:
            self.path.write_text(json.dumps({"settings": self.settings}) + "\n", encoding="utf-8")
        self._file = self.path.open("a", encoding="utf-8")

    def finish(self, done: dict[int, Kept], bad: dict[int, str]) -> None:
        """Take over what all processes have made, and bring the file into the questions' order."""
        self.done, self.bad = dict(sorted(done.items())), dict(sorted(bad.items()))
        if self._file is not None:
            self._file.close()
            self._file = None
        if self.path is not None and not self.part:
            self._write_all(self.path)

    @staticmethod
    def _parts(path: Path) -> list[Path]:
        """Of other processes, now or of an evaluation that was cut off."""
        return sorted(path.parent.glob(f"{glob.escape(path.name)}.part*"))

    def _write_all(self, path: Path) -> None:
        """One file of all that is known; the parts' predictions are in it."""
        lines = [{"settings": self.settings}, *(self._line(index) for index in sorted(self.done))]
        content = "".join(json.dumps(line) + "\n" for line in lines)
        atomic_folder_write(path.parent, {path.name: content.encode()})
        for part in self._parts(path):
            part.unlink()

    def add(self, index: int, prediction: Kept) -> None:
        """Keep a prediction."""
        self.done[index] = prediction
        if self._file is not None:
            self._file.write(json.dumps(self._line(index)) + "\n")
            self._file.flush()

    def add_bad(self, index: int, reason: str) -> None:
        """Keep why a sample could not be used. It is tried again when the evaluation is repeated."""
        self.bad[index] = reason

    def _line(self, index: int) -> dict[str, object]:
        return {"index": index, "question": self.questions[index], "prediction": self.done[index]}

    def _read(self, path: Path, renew: Callable[[int, Kept], Kept]) -> None:
        """Take over the file's predictions for the questions that are asked."""
        asked: dict[str, list[int]] = {}
        for index, question in enumerate(self.questions):
            asked.setdefault(question, []).append(index)
        for number, line in enumerate(path.read_bytes().splitlines(keepends=True)):
            if not line.endswith(b"\n"):
                break
            try:
                entry = json.loads(line)
                if number == 0:
                    self._compare(path, entry.get("settings"))
                    continue
                kept = entry["prediction"]
                places = [index for index in asked.get(entry["question"], []) if index not in self.done]
                if places:
                    index = places[0]
                    self.done[index] = renew(index, kept)
            except ConfigError:
                raise
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                raise ConfigError(f"{path}, line {number + 1} is not a prediction; take another file.") from error

    def _compare(self, path: Path, found: object) -> None:
        found = found if isinstance(found, dict) else {}
        differ = sorted(key for key in self.settings.keys() | found.keys() if self.settings.get(key) != found.get(key))
        if differ:
            raise ConfigError(
                f"{path} holds predictions of an evaluation that differs in {', '.join(differ)}. Take another file or "
                "folder, or throw them away (overwrite=True, --overwrite)."
            )
