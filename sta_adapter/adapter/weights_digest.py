"""A fingerprint of an adapter's weights, by which results of an evaluation tell which adapter they are of."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from sta_adapter.adapter.format import WEIGHTS, description_digest, is_lora_alone, read_description
from sta_adapter.adapter.lora_weights import LORA_WEIGHTS
from sta_adapter.adapter.safe_read import parse_tensors, read_bytes
from sta_adapter.errors import CheckpointError


def weights_digest(folder: Path) -> str:
    """SHA-256, in hexadecimal, of an adapter's tensors, LoRA's as well, and of the settings that STA's depend on.

    The same adapter saved or published again has the same: the files' metadata, the base's name and frames are no part. Of
    LoRA without our files (a baseline, what PEFT itself saves) it is that of LoRA's tensors.
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
