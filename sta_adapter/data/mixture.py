"""Several files of samples in one run, each with a weight: how often a pass over the data has its samples."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from pathlib import Path

from sta_adapter.data.conversation import Sample
from sta_adapter.data.samples import open_samples
from sta_adapter.data.shards import is_shards
from sta_adapter.errors import ConfigError

__all__ = ["mixed_samples", "weighted"]

_WEIGHTED = re.compile(r"(?P<path>.+):(?P<weight>\d+(?:\.\d+)?|\.\d+)")


def weighted(text: str | Path) -> tuple[str, float]:
    """A file and its weight, from "clips.jsonl:2"; 1 without one, and for a file whose name ends like that.

    Raises:
        ConfigError: the weight is 0.
    """
    match = _WEIGHTED.fullmatch(str(text))
    if match is None or Path(text).exists():
        return str(text), 1.0
    weight = float(match["weight"])
    if not 0 < weight < math.inf:
        raise ConfigError(f"the weight of {match['path']!r} is {match['weight']}, expected a number above 0.")
    return match["path"], weight


def mixed_samples(
    files: Sequence[str | Path],
    *,
    seed: int = 0,
    format: str | None = None,
    videos: str | Path | None = None,
    on_bad_sample: str = "skip",
) -> list[Sample]:
    """The samples of one pass over several files, each "PATH" or "PATH:WEIGHT"; further arguments as for `open_samples`.

    Weight 2 has each sample of a file twice, 0.5 half of them, drawn by the seed: the same ones in each pass.

    Raises:
        DataError: a file can't be read.
        ConfigError: one is tar shards, which are read as a stream, or a weight leaves none of a file's samples.
    """
    found: list[Sample] = []
    for path, weight in map(weighted, files):
        if is_shards(path):
            raise ConfigError(
                f"{path!r} are tar shards, which are read as a stream and can't be mixed with other files or weighted; give them "
                "alone, or write the mixture into the shards."
            )
        samples = open_samples(path, format=format, videos=videos, on_bad_sample=on_bad_sample)
        whole, rest = divmod(weight, 1)
        drawn = sorted(
            random.Random(f"{seed} {Path(path).name}").sample(range(len(samples)), round(rest * len(samples)))
        )
        taken = samples * int(whole) + [samples[index] for index in drawn]
        if not taken:
            raise ConfigError(f"the weight {weight:g} leaves none of the {len(samples)} samples of {path!r}; raise it.")
        found += taken
    return found
