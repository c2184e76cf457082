"""The files of an adapter and what may stand in them, without any model; see `checkpoint` for saving and loading one.

Public: `write_adapter`, `adapter_files`, `make_description`, `read_description`, `read_weights`, `compare_tensors`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sta_adapter.adapter.atomic_write import atomic_folder_write, finish_write
from sta_adapter.adapter.lora_weights import LORA_CONFIG, LORA_WEIGHTS
from sta_adapter.adapter.safe_read import compare_shapes, read_json, read_tensors
from sta_adapter.compatibility.seams import version
from sta_adapter.config import STAConfig
from sta_adapter.errors import CheckpointError

WEIGHTS = "sta_adapter.safetensors"
CONFIG = "sta_config.json"
FORMAT_VERSION = 1
ADDED = (
    ("window", None),
)  # settings newer than the format, as before them: left out, so that older releases read the file


def write_adapter(
    folder: str | os.PathLike[str],
    tensors: dict[str, Tensor],
    description: Mapping[str, Any],
    others: Mapping[str, bytes] | None = None,
) -> None:
    """Write an adapter's files.

    Args:
        folder: made when it does not exist; an adapter in it is replaced.
        tensors: on the CPU, under the file's keys.
        description: contents of `sta_config.json`, from `make_description`.
        others: contents of further files by name.

    Raises:
        CheckpointError: weights are not finite, or the folder can't be written; what was there stays.
    """
    replace_files(folder, adapter_files(tensors, description, others))


def replace_files(folder: str | os.PathLike[str], files: Mapping[str, bytes]) -> None:
    """Write an adapter's files, and remove those of an adapter before it that this one has not.

    Raises:
        CheckpointError: the folder can't be written; what was there stays.
    """
    try:
        stale = () if LORA_CONFIG in files else _own_lora_files(Path(folder))
        atomic_folder_write(Path(folder), files, stale)
    except OSError as error:
        raise CheckpointError(f"can't write the adapter to {os.fspath(folder)!r}: {error}") from error


def adapter_files(
    tensors: dict[str, Tensor], description: Mapping[str, Any], others: Mapping[str, bytes] | None = None
) -> dict[str, bytes]:
    """Contents of an adapter's files by name; arguments and errors as `write_adapter`."""
    from safetensors.torch import save

    broken = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise CheckpointError(f"{len(broken)} STA tensors hold NaN or infinity, the first is {broken[0]}; not saved.")
    description = {**description, "lora": bool(others)}
    return {
        WEIGHTS: save(tensors, {"format": "pt", "sta_config_sha256": _digest(description)}),
        CONFIG: (json.dumps(description, indent=2) + "\n").encode(),
        **(others or {}),
    }


def _own_lora_files(folder: Path) -> tuple[str, ...]:
    """LoRA's files of an adapter that is about to be replaced by one without LoRA; not those that others put there."""
    try:
        replaced = read_description(folder)
    except CheckpointError:
        return ()
    return (LORA_CONFIG, LORA_WEIGHTS) if replaced.get("lora") is True else ()


def make_description(
    backbone: str,
    encoder: Mapping[str, int],
    config: STAConfig,
    base: Mapping[str, Any] | None = None,
    positions: str | None = None,
) -> dict[str, Any]:
    """The contents of `sta_config.json`.

    Args:
        backbone: its name.
        encoder: `width`, `depth`, the branch's `num_heads`, `head_dim`.
        config: settings in force.
        base: of the base model, as `describe_base` gives it: `id`, `revision`, and the sizes of its `language_model`.
        positions: the rule of the text positions that it was trained with; None where there is one rule only.
    """
    import sta_adapter

    base = base or {}
    return {
        "format_version": FORMAT_VERSION,
        "sta_adapter_version": sta_adapter.__version__,
        "transformers_version": version("transformers"),
        "backbone": backbone,
        "base_model": {"id": base.get("id") or None, "revision": base.get("revision")},
        "language_model": base.get("language_model"),
        "positions": positions,
        "encoder": dict(encoder),
        "config": {name: value for name, value in config.to_dict().items() if (name, value) not in ADDED},
    }


def read_description(folder: Path) -> dict[str, Any]:
    """The checked contents of an adapter's `sta_config.json`.

    Raises:
        CheckpointError: missing, too large, not JSON, or of a newer format.
    """
    path = folder / CONFIG
    try:
        finish_write(folder)
    except OSError as error:
        raise CheckpointError(
            f"saving into {folder} was cut off, and can't be finished: {error}. Make the folder writable, or copy it "
            "with its hidden files to one that is."
        ) from error
    try:
        found = read_json(path)
    except FileNotFoundError:
        there = ", ".join(sorted(p.name for p in folder.iterdir())[:10]) if folder.is_dir() else "no such folder"
        raise CheckpointError(
            f"{folder} holds no {CONFIG}, so it is no STA adapter; found: {there or 'nothing'}."
        ) from None
    return require_description(found, path)


def require_description(found: dict[str, Any], path: Path) -> dict[str, Any]:
    """The description of an adapter, `found` in the file at `path`, if it is one.

    Raises:
        CheckpointError: it has no version, a newer one, or lacks something.
    """
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
    return found


def read_weights(folder: Path, description: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """The tensors of an adapter's `sta_adapter.safetensors`, on the CPU.

    Raises:
        CheckpointError: missing, damaged, holding non-floating or non-finite tensors, or not belonging to `description`.
    """
    path = folder / WEIGHTS
    try:
        state, metadata = read_tensors(path)
    except FileNotFoundError:
        raise CheckpointError(f"{folder} holds no {WEIGHTS}.") from None
    if description is not None:
        require_same_settings(folder, description, metadata)
    return state


def require_same_settings(folder: Path, description: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Raise a CheckpointError where the weights, by their file's metadata, were not saved with this description."""
    digest = metadata.get("sta_config_sha256")
    if digest is not None and digest != _digest(description):
        raise CheckpointError(
            f"{WEIGHTS} and {CONFIG} in {folder} were not saved together: the weights belong to other settings. "
            "Copy both files again from where they come from."
        )


def compare_tensors(file: Path, state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise a CheckpointError that lists every key and shape that `state`, read from `file`, has otherwise."""
    found, wanted = ({key: tuple(value.shape) for key, value in side.items()} for side in (state, expected))
    compare_shapes(file, found, wanted)


def _digest(description: Mapping[str, Any]) -> str:
    """Fingerprint of what the weights depend on, so that files of two adapters can't be mixed up."""
    parts = {k: description[k] for k in ("backbone", "encoder", "config")}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
