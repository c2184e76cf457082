"""Benchmarks as they lie on disk once downloaded: one file each, from annotation to `Sample`.

Clips are not copied, and not touched before they are decoded: a missing one is a bad sample of the evaluation. What can't
be asked or scored is left out and said in `EvalSet.notes`.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from sta_adapter.errors import ConfigError, DataError
from sta_adapter.evaluation.benchmarks.base import EvalSet

__all__ = ["BENCHMARKS", "EvalSet", "load_benchmark"]

BENCHMARKS = ("mvbench", "vitatecs", "tempcompass", "videomme", "ssv2-t10")


def load_benchmark(name: str, folder: str | Path) -> EvalSet:
    """The questions of a local copy.

    Args:
        name: one of `BENCHMARKS`.
        folder: the copy, in its published layout, archives unpacked.

    Raises:
        ConfigError: there is no such benchmark.
        DataError: the folder doesn't hold it; what was looked for is named.
        MissingExtraError: its annotations are parquet and pyarrow is missing.
    """
    if name not in BENCHMARKS:
        raise ConfigError(f"benchmark is {name!r}, expected one of {', '.join(BENCHMARKS)}.")
    place = Path(folder)
    if not place.is_dir():
        raise DataError(f"there is no folder {str(place)!r}; expected a local copy of {name}.")
    module = importlib.import_module(f"sta_adapter.evaluation.benchmarks.{name.replace('-', '_')}")
    found: EvalSet = module.load(place)
    if not found.samples:
        raise DataError(f"{place} holds no question of {name} that can be asked. " + " ".join(found.notes))
    return found
