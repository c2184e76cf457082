"""Which run a folder holds: what must be the same for it to be taken up again, and what may have grown."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from torch import nn

from sta_adapter.adapter.atomic_write import atomic_folder_write
from sta_adapter.adapter.format import WEIGHTS
from sta_adapter.adapter.lora_weights import LORA_CONFIG, LORA_WEIGHTS
from sta_adapter.adapter.run_file import RECORDS_FIELD, RUN_FILE, read_run_file
from sta_adapter.data.dataset import VideoDataset
from sta_adapter.data.fingerprint import fingerprint, fingerprint_processor
from sta_adapter.data.stream import StreamDataset
from sta_adapter.errors import ConfigError
from sta_adapter.injection.text_positions import rule_in_use
from sta_adapter.requirements import require_free
from sta_adapter.training.config import HARMLESS, LENGTH, TrainingConfig

Data = VideoDataset | StreamDataset
RUN_FORMAT = 5  # raised when the same settings train other weights than before


def identity_of(
    stage: str,
    config: TrainingConfig,
    dataset: Data,
    eval_dataset: Data | None,
    start: Mapping[str, str],
    model: nn.Module,
) -> dict[str, object]:
    """What must be the same for a run to be taken up again: settings, data, base, and what an adapter brought along."""
    found = {
        "format": RUN_FORMAT,
        "stage": stage,
        **_of_weights(config.to_dict()),
        "model": str(getattr(getattr(model, "config", None), "_name_or_path", "")),
        "data": dataset.digest(),
        "eval_data": None if eval_dataset is None else fingerprint(eval_dataset.digest(), _made_with(eval_dataset)),
        **_made_with(dataset),
        "processor": fingerprint_processor(dataset.processor),
        "positions": rule_in_use(model),
        **start,
    }
    plain: dict[str, object] = json.loads(json.dumps(found))
    return plain


def _of_weights(values: Mapping[str, object]) -> dict[str, object]:
    """Settings without those that don't change the weights that come out, of all stages and of each."""
    kept = {key: value for key, value in values.items() if key not in HARMLESS}
    stages = {name: of for name in ("stage1", "stage2") if isinstance(of := kept.get(name), dict)}
    return {**kept, **{name: _of_weights(of) for name, of in stages.items()}}


def _made_with(dataset: Data) -> dict[str, object]:
    """How a data set makes tensors of its samples, which may have been said when it was made."""
    encoder = dataset.encoder
    order = {} if encoder.frame_order == "ordered" else {"frame_order": [encoder.frame_order, encoder.seed]}
    if isinstance(dataset, StreamDataset):
        frames, of_records = dataset.frames, {RECORDS_FIELD: "unknown"}  # records may say it themselves
    else:
        clips = [part for sample in dataset.samples for part in sample.visuals]
        frames, differ = encoder.reader.settings_of(clips)
        of_records = {RECORDS_FIELD: "differ"} if differ else {}
    return {"frames": dataclasses.asdict(frames), **of_records, "max_length": encoder.max_length, **order}


def claim(folder: Path, identity: Mapping[str, object], overwrite: bool) -> None:
    """Make the output folder this run's; a run of other settings in it is only thrown away if asked for."""
    file = folder / RUN_FILE
    if not file.exists():
        require_free(folder, (WEIGHTS, LORA_CONFIG, LORA_WEIGHTS), overwrite)
    if overwrite:
        for name in ("stage1", "stage2"):
            shutil.rmtree(folder / name, ignore_errors=True)
        file.unlink(missing_ok=True)
    if file.exists():
        found = read_run_file(file)
        found |= {name: _of_weights(run) for name in ("stage1", "stage2") if isinstance(run := found.get(name), dict)}
        differ = [
            key for key in identity.keys() | found.keys() if identity.get(key) != found.get(key) and key not in HARMLESS
        ]
        if differ and not _is_longer(found, identity, differ):
            anew = (
                " The model was trained already, or brings another adapter: load it anew." if "start" in differ else ""
            )
            raise ConfigError(
                f"{folder} holds a run that differs in {', '.join(sorted(differ))}. Repeat that run's settings to go on with "
                "it (epochs and max_steps may be raised), take another output folder, or overwrite it (overwrite=True, "
                f"--overwrite).{anew}"
            )
    write_json(file, identity)


def _is_longer(found: Mapping[str, Any], identity: Mapping[str, Any], differ: list[str]) -> bool:
    """Whether a run is the one that was found but for more epochs or more steps."""
    if not set(differ) <= {*LENGTH, "stage1", "stage2"}:
        return False
    for name in ("stage1", "stage2"):
        if not isinstance(found.get(name, {}), dict):
            return False
        was, now = ({**run, **run.get(name, {})} for run in (found, identity))
        if not isinstance(was.get("epochs"), (int, float)) or not isinstance(was.get("max_steps", ""), (int, NoneType)):
            return False  # not as a run writes them
        rest = (
            {key: value for key, value in run.get(name, {}).items() if key not in LENGTH} for run in (found, identity)
        )
        steps = (was["max_steps"], now["max_steps"])
        shorter = now["epochs"] < was["epochs"] if steps == (None, None) else None in steps or steps[1] < steps[0]
        if shorter or next(rest) != next(rest):
            return False
    return True


def write_json(path: Path, values: object) -> None:
    """Write a JSON file all at once or not at all."""
    atomic_folder_write(path.parent, {path.name: f"{json.dumps(values, indent=1)}\n".encode()})
