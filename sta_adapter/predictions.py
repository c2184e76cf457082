"""A file of predictions, one a line, that an interrupted evaluation goes on with.

Public: `PredictionLog`. The first line holds the settings; a last line that was cut off by a crash is dropped.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from sta_adapter.errors import ConfigError


class PredictionLog:
    """Predictions by sample, in memory and, with a path, in a file.

    Args:
        path: the file; None keeps them in memory only.
        settings: what the file's predictions must have been made with.

    Attributes:
        done: the predictions by sample index.
        bad: why samples could not be used, by sample index.
    """

    def __init__(self, path: str | Path | None, settings: dict[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.settings = json.loads(json.dumps(settings))
        self.done: dict[int, dict[str, Any]] = {}
        self.bad: dict[int, str] = {}
        self._file: TextIO | None = None

    def __enter__(self) -> PredictionLog:
        """Read what is there, and open the file for more.

        Raises:
            ConfigError: the file is of another evaluation.
        """
        if self.path is None:
            return self
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = self._read() if self.path.exists() else 0
        self._file = self.path.open("r+" if whole else "w", encoding="utf-8")
        self._file.seek(whole)
        self._file.truncate()
        if not whole:
            self._write({"settings": self.settings})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def add(self, index: int, prediction: dict[str, Any]) -> None:
        """Keep a prediction."""
        self.done[index] = prediction
        self._write({"index": index, "prediction": prediction})

    def add_bad(self, index: int, reason: str) -> None:
        """Keep why a sample could not be used. It is tried again when the evaluation is repeated."""
        self.bad[index] = reason

    def _write(self, line: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def _read(self) -> int:
        """Take over the file's predictions; gives the length of its whole lines in bytes."""
        whole = 0
        for number, line in enumerate(Path(str(self.path)).read_bytes().splitlines(keepends=True)):
            if not line.endswith(b"\n"):
                break
            try:
                entry = json.loads(line)
            except ValueError as error:
                raise ConfigError(f"{self.path}, line {number + 1} is not a prediction; take another file.") from error
            if number == 0:
                self._compare(entry.get("settings") if isinstance(entry, dict) else None)
            else:
                self.done[entry["index"]] = entry["prediction"]
            whole += len(line)
        return whole

    def _compare(self, found: Any) -> None:
        found = found if isinstance(found, dict) else {}
        differ = sorted(key for key in self.settings.keys() | found.keys() if self.settings.get(key) != found.get(key))
        if differ:
            raise ConfigError(
                f"{self.path} holds predictions of an evaluation that differs in {', '.join(differ)}. "
                "Take another file, or delete this one."
            )
