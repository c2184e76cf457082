"""Whether LoRA and STA in a folder were saved together: what PEFT itself saves may lie beside our files of an earlier training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from sta_adapter.adapter.lora_options import OURS
from sta_adapter.adapter.lora_weights import LORA_CONFIG, LORA_WEIGHTS, STA_BESIDE, read_lora
from sta_adapter.adapter.safe_read import read_json
from sta_adapter.errors import CheckpointError


def require_one_save(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Refuse a folder in which PEFT itself saved over an adapter: LoRA and STA are of another training than our files.

    `state` has the tensors of our file, under its names.
    """
    if all((folder / name).exists() for name in (LORA_CONFIG, LORA_WEIGHTS)) and (lora := read_lora(folder)).holds_sta:
        require_same_sta(folder, read_json(folder / LORA_CONFIG), lora.read_sta, state)


def require_same_sta(
    folder: Path, fields: Mapping[str, object], read: Callable[[], Mapping[str, Tensor]], state: Mapping[str, Tensor]
) -> None:
    """`require_one_save`, of LoRA's settings and of the STA beside LoRA, which is read only where PEFT itself saved it."""
    if fields.get(OURS) == STA_BESIDE:
        return
    theirs = read()
    if theirs.keys() != state.keys() or any(not torch.equal(t.to(state[k].dtype), state[k]) for k, t in theirs.items()):
        raise CheckpointError(
            f"{folder} holds two adapters: PEFT saved LoRA and STA into {LORA_WEIGHTS}, and sta_adapter.safetensors, which "
            "handle.save_pretrained wrote, holds another STA. Delete sta_adapter.safetensors and sta_config.json to load what PEFT saved, or "
            "save again by handle.save_pretrained."
        )
