"""The files of an adapter, and reading them, without any model; see `save` for writing and `sta_adapter.injection.load` for both with one."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypedDict, cast

import torch
from torch import Tensor

from sta_adapter.adapter.atomic_write import SAVED, finish_write
from sta_adapter.adapter.lora_options import OURS
from sta_adapter.adapter.lora_weights import LORA_CONFIG, LORA_WEIGHTS, STA_BESIDE, read_lora
from sta_adapter.adapter.safe_read import compare_shapes, opened, parse_tensors, read_bytes, read_json, read_tensors
from sta_adapter.compatibility.module_names import STA_TENSOR
from sta_adapter.config import STAConfig
from sta_adapter.errors import CheckpointError, ConfigError

WEIGHTS = "sta_adapter.safetensors"
CONFIG = "sta_config.json"
FORMAT_VERSION = 1


class Description(TypedDict, total=False):
    """Contents of `sta_config.json`: `require_description` sees to the first four, and the others are as the file has them."""

    format_version: int
    backbone: str
    encoder: Mapping[str, object]
    config: Mapping[str, object]
    sta_adapter_version: object
    transformers_version: object
    base_model: object
    language_model: object
    positions: object
    lora: object
    converted: object
    sta_merged_lora: object
    base_changed: object
    frames: object
    frames_of_records: object


def is_lora_alone(folder: Path) -> bool:
    """Whether a folder holds LoRA and none of our files: a baseline, or what PEFT itself saved."""
    return (folder / LORA_CONFIG).exists() and not (folder / CONFIG).exists() and not (folder / SAVED).exists()


def require_lora(folder: Path, description: Description) -> None:
    """Refuse a folder without the LoRA that was saved with it: a copy that lacks a file would load, and compute something else."""
    if description.get("lora") is True and not (folder / LORA_CONFIG).exists():
        raise CheckpointError(
            f"the adapter in {folder} was saved with LoRA weights, but {LORA_CONFIG} is missing. Copy or download it "
            f'again; to use STA without its LoRA, write "lora": false into {CONFIG}.'
        )


def saved_config(description: Description, path: Path) -> STAConfig:
    """STA's settings in the description at `path`, or a CheckpointError."""
    try:
        return STAConfig.from_dict(description["config"])
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def read_description(folder: Path) -> Description:
    """The checked contents of an adapter's `sta_config.json`.

    Raises:
        CheckpointError: missing, too large, not JSON, or of a newer format.
    """
    path = folder / CONFIG
    try:
        finish_write(folder)
    except OSError as error:
        raise CheckpointError(
            f"saving into {folder} was interrupted and can't be completed: {error}. Make the folder writable, or copy it "
            "with its hidden files to one that is."
        ) from error
    try:
        found = read_json(path)
    except FileNotFoundError:
        there = ", ".join(sorted(p.name for p in folder.iterdir())[:10]) if folder.is_dir() else "no such folder"
        raise CheckpointError(
            f"{folder} holds no {CONFIG}, so it is no STA adapter; found: {there or 'nothing'}.{_of_whole_model(folder)}"
        ) from None
    return require_description(found, path)


def _of_whole_model(folder: Path) -> str:
    """What to do where STA lies among a whole model's weights, as accelerate saves them, without the settings that it computed with."""
    for file in sorted(folder.glob("*.safetensors")):
        with contextlib.suppress(CheckpointError, FileNotFoundError), opened(file) as opened_file:
            if keys := [key for key in opened_file.keys() if STA_TENSOR.search(key)]:  # noqa: SIM118
                return (
                    f" {file.name} holds STA among a model's weights ({keys[0]}, for one), without its settings. Bring it back by inject_sta(model, "
                    "STAConfig(...)) with the settings of the training, then model.load_state_dict of these weights, and handle.save_pretrained."
                )
    return ""


def require_description(found: Mapping[str, object], path: Path) -> Description:
    """What was `found` in the file at `path` as a description; a CheckpointError where it has another version, or lacks something."""
    if type(found.get("format_version")) is not int:
        raise CheckpointError(f"{path} has no format_version; it is not an adapter's configuration.")
    if found["format_version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has the format version {found['format_version']}; this sta-adapter reads {FORMAT_VERSION}. Upgrade sta-adapter."
        )
    missing = [
        k for k, kind in (("backbone", str), ("encoder", dict), ("config", dict)) if not isinstance(found.get(k), kind)
    ]
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}, or holds another type there.")
    return cast("Description", found)


def read_weights(folder: Path, description: Description | None = None) -> dict[str, Tensor]:
    """The tensors of an adapter's `sta_adapter.safetensors`, on the CPU.

    Raises:
        CheckpointError: missing, damaged, holding non-floating or non-finite tensors, or not belonging to
            `description`, or to the LoRA weights beside it.
    """
    path = folder / WEIGHTS
    try:
        state, metadata = read_tensors(path)
    except FileNotFoundError:
        raise CheckpointError(f"{folder} holds no {WEIGHTS}.") from None
    if description is not None:
        require_same_settings(folder, description, metadata)
        if (
            all((folder / name).exists() for name in (LORA_CONFIG, LORA_WEIGHTS))
            and (lora := read_lora(folder)).holds_sta
        ):
            require_sta_of_same_save(folder, read_json(folder / LORA_CONFIG), lora.read_sta, state)
    return state


def require_same_settings(folder: Path, description: Description, metadata: Mapping[str, str]) -> None:
    """Raise a CheckpointError where the weights, by their file's metadata, were not saved with this description."""
    digest = metadata.get("sta_config_sha256")
    if digest is not None and digest != description_digest(description):
        raise CheckpointError(
            f"{WEIGHTS} and {CONFIG} in {folder} were not saved together: the weights belong to other settings. "
            "Copy both files again from where they come from."
        )


def require_sta_of_same_save(
    folder: Path, fields: Mapping[str, object], read: Callable[[], Mapping[str, Tensor]], state: Mapping[str, Tensor]
) -> None:
    """Refuse a folder in which PEFT itself saved over an adapter: LoRA and STA are of another training than our files.

    Args:
        folder: named in the error.
        fields: LoRA's settings.
        read: gives the STA beside LoRA, asked for only where PEFT itself saved it.
        state: the tensors of our file, under its names.
    """
    if fields.get(OURS) == STA_BESIDE:
        return
    theirs = read()
    if theirs.keys() != state.keys() or any(not torch.equal(t.to(state[k].dtype), state[k]) for k, t in theirs.items()):
        raise CheckpointError(
            f"{folder} holds two adapters: PEFT saved LoRA and STA into {LORA_WEIGHTS}, and {WEIGHTS}, which "
            f"handle.save_pretrained wrote, holds another STA. Delete {WEIGHTS} and {CONFIG} to load what PEFT saved, or "
            "save again by handle.save_pretrained."
        )


def compare_tensors(file: Path, state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise a CheckpointError that lists every key and shape that `state`, read from `file`, has otherwise."""
    found, wanted = ({key: tuple(value.shape) for key, value in side.items()} for side in (state, expected))
    compare_shapes(file, found, wanted)


def description_digest(description: Description) -> str:
    """Fingerprint of what the weights depend on, so that files of two adapters can't be mixed up."""
    parts = {"backbone": description["backbone"], "encoder": description["encoder"], "config": description["config"]}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def weights_digest(folder: Path) -> str:
    """SHA-256, in hexadecimal, of an adapter's tensors, LoRA's as well, and of the settings that STA's depend on.

    By it results of an evaluation tell which adapter they are of. The same adapter saved or published again has the same:
    the files' metadata, the base's name and frames are no part. Of LoRA without our files (a baseline, what PEFT itself
    saves) it is that of LoRA's tensors.
    """
    found, lora = hashlib.sha256(), folder / LORA_WEIGHTS
    if not is_lora_alone(folder):
        found.update(description_digest(read_description(folder)).encode())
        found.update(_tensors_digest(folder / WEIGHTS))
        if not lora.exists():
            return found.hexdigest()
    found.update(_tensors_digest(lora))
    return found.hexdigest()


def _tensors_digest(path: Path) -> bytes:
    """Of a safetensors file without its metadata, whose fields come in any order."""
    try:
        content = read_bytes(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} holds no {path.name}.") from None
    parse_tensors(content, path)  # refuses what is damaged
    end = 8 + int.from_bytes(content[:8], "little")
    header = {name: tensor for name, tensor in json.loads(content[8:end]).items() if name != "__metadata__"}
    found = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    found.update(memoryview(content)[end:])
    return found.digest()
