"""Files of samples from our form to a training tool's, and from theirs to ours."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from sta_adapter.adapter.atomic_write import atomic_folder_write
from sta_adapter.data.conversation import Sample, parse_sample
from sta_adapter.data.formats import read_classes
from sta_adapter.data.message import Record
from sta_adapter.data.records import read_records
from sta_adapter.data.samples import EMPTY, check_format
from sta_adapter.data.shards import is_shards
from sta_adapter.errors import ConfigError, DataError
from sta_adapter.integrations.records import TOOLS, as_ours, settings_lost, to_record
from sta_adapter.requirements import require_free

__all__ = ["Converted", "convert_data"]

INSTEAD = {  # what says the same for all clips of a run
    "ms-swift": "the environment variables FPS, FPS_MIN_FRAMES, FPS_MAX_FRAMES, VIDEO_MIN_TOKEN_NUM and VIDEO_MAX_TOKEN_NUM",
    "llamafactory": "video_fps, video_maxlen, video_min_pixels and video_max_pixels in its YAML",
}
INFO = "dataset_info.json"


@dataclass(frozen=True)
class Converted:
    """What was written."""

    path: Path  # of the file
    samples: int  # how many
    clips: int  # how many videos and images they name
    # settings that the tool's records have no place for, and how many samples had them
    left_out: dict[str, int] = field(default_factory=dict)


def convert_data(
    source: str | Path,
    out: str | Path,
    *,
    to: str,
    format: str | None = None,
    videos: str | Path | None = None,
    drop: Collection[str] = (),
    overwrite: bool = False,
) -> Converted:
    """Write a file of samples in another tool's form; for LLaMA-Factory its `dataset_info.json` beside it as well.

    Args:
        source: a file of samples, ours or one of the tools'.
        out: the JSON Lines file to write.
        to: "ms-swift", "llamafactory", "trl", "axolotl", or "sta-adapter" for ours.
        format: of the records, see `read_samples`.
        videos: the folder that relative paths start from; None takes the file's own. Written paths are absolute.
        drop: settings of single clips ("nframes", "loss" ...) that may be left out where the tool has no place for
            them.
        overwrite: replace a file that is there.

    Raises:
        ConfigError: there is no such tool or format, or `out` is there.
        DataError: a record is no sample, or something of it would be lost that `drop` doesn't name.
    """
    if to not in TOOLS:
        raise ConfigError(f"to={to!r}: expected one of {', '.join(TOOLS)}.")
    file, target = Path(source), Path(out)
    require_free(target.parent, [target.name], overwrite)
    samples = _read(file, format, file.parent if videos is None else Path(videos))
    lost = Counter(name for sample in samples for name in settings_lost(sample, to))
    kept = {name: count for name, count in lost.items() if name not in drop}
    if kept:
        found = ", ".join(f"{name} ({count} samples)" for name, count in sorted(kept.items()))
        instead = (
            f"Say it of all clips of the run instead, by {INSTEAD[to]}. "
            if kept.keys() - {"loss"} and to in INSTEAD
            else ""
        )
        raise DataError(
            f"{file} says of single clips or answers what {to} has no place for: {found}. {instead}Leave it out here with "
            f"--drop {','.join(sorted(kept))}."
        )
    pairs = sum("rejected" in sample.extra for sample in samples)
    if pairs not in (0, len(samples)):
        raise DataError(f"{pairs} of {len(samples)} samples have a 'rejected' answer, expected all or none.")
    records = [to_record(sample, to) for sample in samples]
    files = {target.name: "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()}
    if to == "llamafactory":
        files[INFO] = _dataset_info(target, records, bool(pairs))
    try:
        atomic_folder_write(target.parent, files)
    except OSError as error:
        raise DataError(f"can't write {str(target)!r}: {error}") from error
    return Converted(target, len(samples), sum(len(sample.visuals) for sample in samples), dict(lost))


def _read(file: Path, format: str | None, folder: Path) -> list[Sample]:
    check_format(format)
    if is_shards(str(file)):
        raise DataError(f"{file}: shards hold their clips inside, and other tools read files; unpack them first.")
    folder, classes = folder.resolve(), read_classes(file)
    samples = []
    for source, record in read_records(file):
        try:
            if isinstance(record, DataError):
                raise record
            ours = as_ours(record) if isinstance(record, dict) else record
        except DataError as error:
            raise DataError(error.reason, source=source) from error
        samples.append(parse_sample(ours, source=source, folder=folder, format=format, classes=classes))
    if not samples:
        raise DataError(f"{file}: {EMPTY}")
    return samples


def _dataset_info(target: Path, records: list[Record], pairs: bool) -> bytes:
    """LLaMA-Factory's list of data sets, with this one in it under the file's name without its suffix."""
    file = target.parent / INFO
    try:
        known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise DataError(f"{file} is not JSON ({error}); mend or remove it.") from error
    if not isinstance(known, dict):
        raise DataError(f"{file} holds a {type(known).__name__}, expected an object of data sets by name.")
    columns = {"messages": "messages"}
    columns |= {key: key for key in ("videos", "images", "chosen", "rejected") if any(key in r for r in records)}
    tags = {f"{name}_tag": name for name in ("role", "content", "user", "assistant", "system")}
    entry = {"file_name": target.name, "formatting": "sharegpt", "columns": columns, "tags": tags}
    known[target.stem] = {**entry, "ranking": True} if pairs else entry
    return (json.dumps(known, indent=2, ensure_ascii=False) + "\n").encode()
