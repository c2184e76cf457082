"""Read files of samples, one or several with weights: JSON Lines, JSON arrays, CSV or tar shards, in any of the formats.

The formats are those of `sta_adapter.data.formats`; each record's is recognised by its keys unless one is given. Errors
name the file and the line, or the entry of an array, counted from 1.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from sta_adapter._validate import shown
from sta_adapter.data.bad_sample import BadSample
from sta_adapter.data.conversation import Sample, parse_sample
from sta_adapter.data.formats import FORMATS, read_classes
from sta_adapter.data.message import Record
from sta_adapter.data.records import read_records
from sta_adapter.data.sample_keys import kind_of
from sta_adapter.data.shards import is_shards, scan_shards
from sta_adapter.errors import ConfigError, DataError

EMPTY = "no sample in it; expected one JSON object a line, a JSON array of them, or rows of a table."


def read_samples(path: str | Path, *, format: str | None = None, videos: str | Path | None = None) -> list[Sample]:
    """Read every sample of a file.

    Args:
        path: JSON Lines, a JSON array, or CSV (`.csv`, `.tsv`); or tar shards, as a path, a glob or a brace pattern
            that ends in .tar.
        format: "conversations", "multiple-choice" or "ssv2"; None recognises each record by its keys.
        videos: the folder that relative paths start from; None takes the file's own.

    Raises:
        DataError: the file is missing or empty, or a record is not a sample.
        ConfigError: there is no such format, or `videos` was given for shards.
    """
    return open_samples(path, format=format, videos=videos, on_bad_sample="error")


def open_samples(
    path: str | Path, *, format: str | None = None, videos: str | Path | None = None, on_bad_sample: str = "skip"
) -> list[Sample]:
    """What a run takes: as `read_samples`, but a record that is no sample is one with a `problem`, which is skipped and counted.

    Raises:
        DataError: a record is no sample and `on_bad_sample` is "error", a shard is cut off, or the file can't be read.
    """
    found = scan_samples(path, format=format, videos=videos)
    for item in found:
        if isinstance(item, BadSample):
            item.skipped("error" if is_shards(item.source) else on_bad_sample)
    return [Sample([], item.source, problem=item.reason) if isinstance(item, BadSample) else item for item in found]


def given_samples(items: Sequence[Sample | Record], *, on_bad_sample: str = "skip") -> list[Sample]:
    """Samples of a list: such as were read before stay as they are, records (`dict`, one line of a file each) are parsed.

    Relative paths start from the working directory; of records that are no samples the same holds as for `open_samples`.
    """
    if isinstance(items, (Mapping, Sample)) or not isinstance(items, Iterable):
        raise DataError(f"samples are {kind_of(items)}, expected a file's name, or a list of records: [record, ...].")
    items = list(items)
    if items and all(isinstance(item, (str, Path)) for item in items):
        raise DataError(
            f"samples are texts, the first {shown(str(items[0]))}, expected records (dict). A file is given by its name alone, several by "
            "mixed_samples(files) of sta_adapter.data.samples, a table of pandas as table.to_dict('records')."
        )
    found = []
    for number, item in enumerate(items, start=1):
        source = f"record {number}"
        try:
            found.append(item if isinstance(item, Sample) else parse_sample(item, source=source))
        except DataError as error:
            BadSample(source, error.reason).skipped(on_bad_sample)
            found.append(Sample([], source, problem=error.reason))
    return found


def require_usable(samples: Sequence[Sample]) -> Sequence[Sample]:
    """The samples; a DataError with the first one's problem where all of them have one."""
    if samples and all(sample.problem is not None for sample in samples):
        raise DataError(str(samples[0].problem), source=samples[0].source)
    return samples


def scan_samples(
    path: str | Path, *, format: str | None = None, videos: str | Path | None = None
) -> list[Sample | BadSample]:
    """As `read_samples`, with a `BadSample` in the place of each record that is not a sample."""
    check_format(format)
    if is_shards(path):
        require_no_folder(videos)
        return scan_shards(path, format=format)
    file = Path(path)
    folder = file.parent if videos is None else Path(videos)
    classes = read_classes(file)
    if videos is not None and not folder.is_dir():
        raise DataError(f"the folder of videos {str(folder)!r} is not there.")
    found: list[Sample | BadSample] = []
    for source, record in read_records(file):
        try:
            if isinstance(record, DataError):
                raise record
            found.append(parse_sample(record, source=source, folder=folder, format=format, classes=classes))
        except DataError as error:
            found.append(BadSample(source, error.reason))
    if not found:
        raise DataError(f"{file}: {EMPTY}")
    return found


def check_format(name: str | None) -> None:
    """Refuse a format that there isn't; None stands for any."""
    if name is not None and name not in FORMATS:
        raise ConfigError(f"format is {name!r}, expected one of {', '.join(FORMATS)}.")


def require_no_folder(videos: str | Path | None) -> None:
    """Refuse a folder of videos beside shards."""
    if videos is not None:
        raise ConfigError("a folder of videos is given, but shards hold their clips themselves; leave it out.")


_WEIGHTED = re.compile(r"(?P<path>.+):(?P<weight>\d+(?:\.\d+)?|\.\d+)")


def weighted(text: str | Path) -> tuple[str, float]:
    """A file and its weight, from "clips.jsonl:2"; 1 without one, and for a file whose name ends like that."""
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
