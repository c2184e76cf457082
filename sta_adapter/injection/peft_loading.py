"""`PeftModel.from_pretrained` on a folder with STA in it: PEFT alone would load its LoRA without STA.

From when this package has met PEFT in a process, such a folder is loaded by `load_sta`. Where it isn't
imported, the entry "sta_adapter" in adapter_config.json makes PEFT warn of it, or refuse it (before 0.14).
"""

from __future__ import annotations

import functools
import json
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from sta_adapter.adapter.format import CONFIG
from sta_adapter.adapter.hub import resolve_adapter
from sta_adapter.adapter.lora_options import OURS
from sta_adapter.adapter.lora_weights import LORA_CONFIG
from sta_adapter.errors import STAError, STAWarning
from sta_adapter.injection.handle import STAHandle, get_sta

__all__ = ["watch_peft"]

PASSED_ON = {"is_trainable", "revision", "subfolder"}
WITHOUT_EFFECT = {"low_cpu_mem_usage", "autocast_adapter_dtype"}  # how PEFT makes LoRA, before it has its weights


def watch_peft(load_sta: Callable[..., STAHandle]) -> None:
    """See to it that PEFT's own loader brings STA back by `load_sta`, if PEFT is imported; again and again is fine."""
    peft = sys.modules.get("peft")
    wrapped = getattr(getattr(peft, "PeftModel", None), "__dict__", {}).get("from_pretrained")
    load = getattr(wrapped, "__func__", None)
    if peft is None or load is None or getattr(load, "brings_sta", False):
        return

    @functools.wraps(load)
    def from_pretrained(cls: Any, model: nn.Module, model_id: str, *args: Any, **kwargs: Any) -> Any:
        folder = None if get_sta(model) is not None else _folder_with_sta(model_id, kwargs)
        if folder is None:
            return load(cls, model, model_id, *args, **kwargs)
        if not args and set(kwargs) <= PASSED_ON | WITHOUT_EFFECT and not hasattr(model, "peft_config"):
            return load_sta(model, folder, is_trainable=kwargs.get("is_trainable", False)).model
        warnings.warn(
            f"{model_id} holds STA, which PEFT does not load: this is its LoRA alone. Use sta_adapter.load_sta(model, ...).",
            STAWarning,
            stacklevel=2,
        )
        return load(cls, model, model_id, *args, **kwargs)

    from_pretrained.brings_sta = True  # type: ignore[attr-defined]
    peft.PeftModel.from_pretrained = classmethod(from_pretrained)


def _folder_with_sta(name: str | os.PathLike[str], options: Mapping[str, Any]) -> Path | None:
    """Where an adapter of ours lies; None for any other, and where it can't be had, of which PEFT says why."""
    revision = None if os.path.isdir(name) else options.get("revision")  # PEFT takes one for a folder too
    try:
        folder = resolve_adapter(name, revision, subfolder=options.get("subfolder"))
        known = (folder / CONFIG).is_file() or OURS in json.loads((folder / LORA_CONFIG).read_bytes())
    except (STAError, OSError, ValueError, TypeError):
        return None
    return folder if known else None
