"""What training and evaluation leave beside an adapter, read as a file from anybody: `run.json`, `result.json`, `results.json`.

Numbers are numbers, within their ranges, and text has no more than its characters, so that neither ends up in code or as
markup; what has another form is a `CheckpointError`.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal, TypedDict

from sta_adapter.adapter.format import Description, saved_config
from sta_adapter.adapter.safe_read import read_json
from sta_adapter.errors import CheckpointError, ConfigError
from sta_adapter.video.frame_settings import FrameSettings

RUN_FILE = "run.json"
RECORDS_FIELD: Final = "frames_of_records"  # where `frames` are not those of every clip
RECORDS = {
    "differ": "its records set how their clips are sampled themselves, each otherwise",
    "unknown": "its records, in tar shards, may have set how their clips are sampled themselves",
}
MAX_BYTES = 64 << 20  # a stage's history has a line for each step that was logged
MAX_SIZE = 1 << 20  # of an encoder
SCORES = ("accuracy", "low", "high", "total")
NAMES = ("backbone", "sta_adapter_version", "positions")
Variant = Literal["base", "adapter"]
VARIANTS: tuple[Variant, ...] = ("base", "adapter")
WORDS = re.compile(r"(?!.*www\.)[\w .,:()+-]{0,80}")


class Stage(TypedDict, total=False):
    """A finished stage: numbers, but for `history`, whose entries have a `loss` each."""

    trainable_parameters: float
    steps: float
    history: list[dict[str, float]]


class Results(TypedDict, total=False):
    """An evaluation: for each model by the order of the frames, the `overall` scores, which are numbers."""

    base: dict[str, dict[str, dict[str, float]]]
    adapter: dict[str, dict[str, dict[str, float]]]
    benchmark: str | float
    reading: list[str]
    adapter_sha256: str  # `weights_digest` of the adapter that was evaluated


class Run(TypedDict, total=False):
    """What training and evaluation have left; the `settings` are numbers and words, but for those of `frames`.

    `of_stages` has those that hold in stage "1" or "2" alone. `left_out` says which files are of another adapter.
    """

    settings: dict[str, object]
    of_stages: dict[str, dict[str, object]]
    stages: dict[str, Stage]
    results: Results
    left_out: list[str]


def read_run_file(path: Path) -> dict[str, object]:
    """The object in one of these files; empty where there is none."""
    return read_json(path, MAX_BYTES) if path.exists() else {}


def read_frames(found: object, path: Path) -> dict[str, object]:
    """Settings of frames, those of them that are given and known."""
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{path}: frames is a {type(found).__name__}, expected settings of frames.")
    known = {key: value for key, value in found.items() if key in FrameSettings.__dataclass_fields__}
    try:
        FrameSettings(**known)
    except ConfigError as error:
        raise CheckpointError(f"{path}: frames: {error}") from error
    return known


def read_settings(found: Mapping[str, object], names: Mapping[str, str], path: Path) -> dict[str, object]:
    """The settings of a run with these names, and those of its frames."""
    settings: dict[str, object] = {
        name: _plain(found[name], name, path) for name in names if found.get(name) is not None
    }
    if found.get("frames"):
        settings["frames"] = read_frames(found["frames"], path)
    if str(found.get(RECORDS_FIELD)) in RECORDS:
        settings[RECORDS_FIELD] = found[RECORDS_FIELD]
    return settings


def read_about(description: Description, path: Path = Path("sta_config.json")) -> Description:
    """What a page shows of an adapter's `sta_config.json`: names of a few words, whole numbers, and the settings of STA."""
    encoder = description["encoder"]
    sizes = {name: encoder.get(name) for name in ("depth", "width", "num_heads", "head_dim")}
    wrong = [name for name, value in sizes.items() if type(value) is not int or not 0 < value <= MAX_SIZE]
    if wrong:
        raise CheckpointError(f"{path}: {', '.join(wrong)} of the encoder must be whole numbers from 1 to {MAX_SIZE}.")
    names = {name: _plain(description.get(name) or "", name, path) for name in NAMES}
    config = saved_config(description, path)
    told: Description = {
        "backbone": str(names["backbone"]),
        "sta_adapter_version": names["sta_adapter_version"],
        "positions": names["positions"] or None,
    }
    return {**description, **told, "encoder": sizes, "config": config.to_dict()}


def read_stage(found: Mapping[str, object], path: Path) -> Stage:
    """Sizes and losses of a finished stage; empty where there is none."""
    if not found:
        return {}
    history = found.get("history", [])
    entries = history if isinstance(history, list) else [history]
    logged = (entry if isinstance(entry, Mapping) else {"loss": entry} for entry in entries)
    where = f"{path}: trainable_parameters, steps and losses"
    return {
        "trainable_parameters": _number(found.get("trainable_parameters"), where),
        "steps": _number(found.get("steps"), where),
        "history": [{"loss": _number(entry["loss"], where)} for entry in logged if "loss" in entry],
    }


def read_results(found: Mapping[str, object], path: Path) -> Results:
    """Scores of an evaluation and how they are to be read; only such parts as have that form."""
    results: Results = {}
    for variant in VARIANTS:
        runs = found.get(variant)
        for order, run in runs.items() if isinstance(runs, Mapping) else ():
            score = run.get("overall") if isinstance(run, Mapping) else None
            if not isinstance(score, Mapping) or not set(SCORES) <= set(score):
                continue
            shown = str(_plain(order, variant, path))
            where = f"{path}: the scores of {variant}, {shown},"
            kept = {name: _number(score[name], where) for name in SCORES}
            results.setdefault(variant, {})[shown] = {"overall": kept}
    if found.get("benchmark"):
        results["benchmark"] = _plain(found["benchmark"], "benchmark", path)
    if found.get("adapter_sha256"):
        results["adapter_sha256"] = str(_plain(found["adapter_sha256"], "adapter_sha256", path))
    reading = found.get("reading")
    lines = [line for line in reading if isinstance(line, str)] if isinstance(reading, list) else []
    if lines:
        results["reading"] = [_as_text(line) for line in lines[:100]]
    return results


def _number(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise CheckpointError(f"{where} must be numbers.")
    return value


def _plain(value: object, name: str, path: Path) -> str | float:
    if isinstance(value, (int, float)) or (isinstance(value, str) and WORDS.fullmatch(value)):
        return value
    raise CheckpointError(f"{path}: {name} is {str(value)[:80]!r}, expected a number or a few words.")


def _as_text(line: str) -> str:
    """A sentence on one line that is no markup."""
    escaped = html.escape(" ".join(line.split())[:500], quote=False)
    return escaped.replace("](", "] (").replace("`", "'").replace("://", ": //")
