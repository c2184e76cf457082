"""An adapter's folder, checked as a whole before any byte of it leaves this machine.

Each file is opened once: what is checked are the very bytes that are uploaded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from sta_adapter.adapter.format import (
    CONFIG,
    WEIGHTS,
    Description,
    read_description,
    require_description,
    require_lora,
    require_same_settings,
    require_sta_of_same_save,
)
from sta_adapter.adapter.lora_keys import LoraFile, sta_among
from sta_adapter.adapter.lora_options import LoraOptions
from sta_adapter.adapter.lora_weights import LORA_CONFIG, LORA_WEIGHTS
from sta_adapter.adapter.run_file import read_about, read_frames
from sta_adapter.adapter.safe_read import MAX_JSON_BYTES, parse_json, parse_metadata, parse_tensors, read_bytes
from sta_adapter.errors import CheckpointError

STA_KEY = re.compile(r"blocks\.\d+\.(?:(?:norm|to_qkv|to_out)\.(?:weight|bias)|gamma)")


def read_checked(folder: Path) -> tuple[Description, int, dict[str, bytes]]:
    """The description of a folder's adapter, how many numbers its STA has, and the contents of its files by name.

    Raises:
        CheckpointError: a file is missing, damaged or a link out of the folder, holds something else than an adapter's
            files hold, or does not belong to the others.
    """
    read_description(folder)  # and finishes a saving that was cut off
    contents = {CONFIG: _contents(folder, CONFIG), WEIGHTS: _contents(folder, WEIGHTS)}
    description = require_description(parse_json(contents[CONFIG], folder / CONFIG), folder / CONFIG)
    read_about(description, folder / CONFIG)
    read_frames(description.get("frames") or {}, folder / CONFIG)
    state = parse_tensors(contents[WEIGHTS], folder / WEIGHTS)
    _require_sta(state, description, folder / WEIGHTS)
    require_same_settings(folder, description, parse_metadata(contents[WEIGHTS], folder / WEIGHTS))
    if (folder / LORA_CONFIG).exists() or (folder / LORA_CONFIG).is_symlink():
        contents |= {LORA_CONFIG: _contents(folder, LORA_CONFIG), LORA_WEIGHTS: _contents(folder, LORA_WEIGHTS)}
        fields = parse_json(contents[LORA_CONFIG], folder / LORA_CONFIG)
        options = LoraOptions.read(fields, folder / LORA_CONFIG)
        lora = parse_tensors(contents[LORA_WEIGHTS], folder / LORA_WEIGHTS)
        shapes = {key: tuple(tensor.shape) for key, tensor in lora.items()}
        file = LoraFile(folder / LORA_WEIGHTS, options, shapes)
        file.require_parts()
        if file.holds_sta:
            require_sta_of_same_save(folder, fields, lambda: sta_among(lora), state)
    else:
        require_lora(folder, description)
    return description, sum(tensor.numel() for tensor in state.values()), contents


def _contents(folder: Path, name: str) -> bytes:
    path = folder / name
    target = path.resolve()
    if not target.is_relative_to(folder.resolve()):
        raise CheckpointError(
            f"{path} is a link to {target}, outside of the folder, and is not pushed. Copy the adapter (cp -L) if that is its file."
        )
    try:
        return read_bytes(target, MAX_JSON_BYTES if name.endswith(".json") else None)
    except FileNotFoundError as error:
        pickles = "; pickled weights are not pushed" if name == LORA_WEIGHTS else ""
        raise CheckpointError(f"{folder} holds no {name}{pickles}.") from error


def _require_sta(state: Mapping[str, Tensor], description: Description, path: Path) -> None:
    """Nothing but STA's tensors, as wide as the description says; an encoder is needed for more."""
    wrong = [key for key in state if not STA_KEY.fullmatch(key)]
    width = description["encoder"].get("width")
    wrong += [key for key, tensor in state.items() if key.endswith("norm.weight") and tuple(tensor.shape) != (width,)]
    if wrong or not state:
        found = f"{wrong[0][:200]!r} is not one" if wrong else "it holds none"
        raise CheckpointError(f"{path} must hold the tensors of STA for an encoder {width} wide, and {found}.")
