"""Writing an adapter's files, all of them or none; a model is not needed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from sta_adapter.adapter.atomic_write import atomic_folder_write
from sta_adapter.adapter.base_model import BaseModel
from sta_adapter.adapter.format import (
    CONFIG,
    FORMAT_VERSION,
    WEIGHTS,
    Description,
    description_digest,
    read_description,
)
from sta_adapter.adapter.lora_weights import LORA_CONFIG, LORA_WEIGHTS, weights_file
from sta_adapter.compatibility.releases import version
from sta_adapter.config import STAConfig
from sta_adapter.errors import CheckpointError

# settings newer than the format, as before them: left out, so that older releases read the file
ADDED = (("window", None),)


def write_adapter(
    folder: str | os.PathLike[str],
    tensors: dict[str, Tensor],
    description: Description,
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
    tensors: dict[str, Tensor], description: Description, others: Mapping[str, bytes] | None = None
) -> dict[str, bytes]:
    """Contents of an adapter's files by name; arguments and errors as `write_adapter`."""
    description = {**description, "lora": bool(others)}
    return {
        WEIGHTS: weights_file(tensors, "STA", {"sta_config_sha256": description_digest(description)}),
        CONFIG: (json.dumps(description, indent=2) + "\n").encode(),
        **(others or {}),
    }


def lora_of_others(folder: Path) -> Path | None:
    """LoRA's settings that would stay in a folder when an adapter without LoRA is written there."""
    config = folder / LORA_CONFIG
    return config if os.path.isfile(config) and not _own_lora_files(folder) else None


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
    base: BaseModel | None = None,
    positions: str | None = None,
) -> Description:
    """The contents of `sta_config.json`.

    Args:
        backbone: its name.
        encoder: `width`, `depth`, the branch's `num_heads`, `head_dim`.
        config: settings in force.
        base: of the base model, as `describe_base` gives it: `id`, `revision`, and the sizes of its `language_model`.
        positions: the rule of the text positions that it was trained with; None where there is one rule only.
    """
    base = base or {}
    return {
        "format_version": FORMAT_VERSION,
        "sta_adapter_version": version("sta-adapter"),
        "transformers_version": version("transformers"),
        "backbone": backbone,
        "base_model": {"id": base.get("id") or None, "revision": base.get("revision")},
        "language_model": base.get("language_model"),
        "positions": positions,
        "encoder": dict(encoder),
        "config": {name: value for name, value in config.to_dict().items() if (name, value) not in ADDED},
    }
