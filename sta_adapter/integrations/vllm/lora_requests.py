"""LoRA weights that were trained beside an STA are served beside that one alone.

vLLM reads the LoRA that a request names from its folder, whatever the engine serves, and would answer with LoRA and
without its STA, or with another one.
"""

from __future__ import annotations

import functools
from pathlib import Path

from sta_adapter.adapter.format import CONFIG
from sta_adapter.adapter.lora_options import OURS
from sta_adapter.adapter.lora_weights import LORA_CONFIG
from sta_adapter.adapter.safe_read import read_json
from sta_adapter.compatibility.releases import incompatible
from sta_adapter.errors import CheckpointError
from sta_adapter.integrations.vllm.request import ADAPTER, adapter_digest
from sta_adapter.integrations.vllm.serving import SERVED

READ = "from_local_dir"


def check_lora_requests() -> None:
    """Have each folder of LoRA weights looked at before vLLM reads it; twice is fine."""
    helper = lora_reader()
    read = getattr(helper, READ).__func__
    if getattr(read, "asks_for_sta", False):
        return

    @functools.wraps(read)
    def from_local_dir(cls: type, /, lora_path: str, *args: object, **kwargs: object) -> object:
        check_lora(Path(lora_path))
        return read(cls, lora_path, *args, **kwargs)

    from_local_dir.asks_for_sta = True  # type: ignore[attr-defined]
    setattr(helper, READ, classmethod(from_local_dir))


def lora_reader() -> type:
    """VLLM's class that reads the settings of LoRA weights from their folder; a CompatibilityError where it is otherwise."""
    try:
        from vllm.lora.peft_helper import PEFTHelper
    except ImportError as error:
        raise incompatible("vllm", f"it has no reader of LoRA's settings ({error})") from error
    if not hasattr(getattr(PEFTHelper, READ, None), "__func__"):
        raise incompatible("vllm", f"PEFTHelper has no class method {READ}")
    return PEFTHelper


def check_lora(folder: Path) -> None:
    """Refuse LoRA weights whose STA no engine of this process serves."""
    served = set(SERVED.values())
    if (folder / CONFIG).is_file():
        fits = adapter_digest(folder) in served
    else:  # its STA is elsewhere, if it has any
        fits = bool(served) or not (folder / LORA_CONFIG).is_file() or OURS not in read_json(folder / LORA_CONFIG)
    if not fits:
        raise CheckpointError(
            f"the LoRA weights in {folder} were trained with STA, and this engine serves {'another one' if served else 'none'}: "
            f"start it with hf_overrides={{'{ADAPTER}': {str(folder)!r}}} (sta-adapter serve does), or merge them into a base of "
            "their own (sta-adapter export ADAPTER OUT --merge-lora BASE)."
        )
