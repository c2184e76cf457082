"""A run's state that other packages save and load: STA's tensors also fit a model with other settings, and compute something else there."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from torch import nn

from sta_adapter.adapter.format import CONFIG, read_description, saved_config
from sta_adapter.adapter.safe_read import read_json
from sta_adapter.compatibility.releases import incompatible
from sta_adapter.compatibility.seams import after_import
from sta_adapter.config import STAConfig
from sta_adapter.errors import CheckpointError, ConfigError
from sta_adapter.injection.handle import STAHandle, get_sta

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import Trainer

SETTINGS, MODELS = "sta_settings.json", "models"  # the file beside accelerate's, and its list


class _Removable(Protocol):
    """A hook that was registered."""

    def remove(self) -> None:
        """Take it off."""


def watch_runs() -> None:
    """See to it that neither transformers' trainer nor accelerate goes on with other settings of STA; again and again is fine."""
    _watch_trainer()
    _watch_accelerate()


def _difference(handle: STAHandle, saved: STAConfig) -> str:
    """Settings of a run that let its tensors compute something else than in a model, as an error names them; empty where none do."""
    if differ := handle.config.told_apart(saved.to_dict()):
        return differ
    layers = range(handle._injection.depth or len(handle.blocks)) if saved.layers == "all" else saved.layers
    return "" if set(layers) == set(handle.blocks) else f"layers {saved.layers!r} (not {handle.config.layers!r})"


def _watch_trainer() -> None:
    trainer = getattr(sys.modules.get("transformers.trainer"), "Trainer", None)
    if trainer is None:
        after_import("transformers.trainer", _watch_trainer)
    load = getattr(trainer, "_load_from_checkpoint", None)
    if trainer is None or load is None or getattr(load, "looks_for_sta", False):
        return

    @functools.wraps(load)
    def load_from_checkpoint(self: Trainer, resume_from_checkpoint: str, model: nn.Module | None = None) -> object:
        folder, net = Path(resume_from_checkpoint), self.model if model is None else model
        handle = None if net is None else get_sta(net)
        if handle is not None and (folder / CONFIG).is_file():
            differ = _difference(handle, saved_config(read_description(folder), folder / CONFIG))
            if differ:
                raise ConfigError(
                    f"the checkpoint that the run goes on from (step {folder.name.rpartition('-')[2]}) has {differ}. Inject STA with the settings that "
                    f"it has, or begin anew from it: load_sta(model, {str(folder)!r}, is_trainable=True)."
                )
        return load(self, resume_from_checkpoint, model)

    load_from_checkpoint.looks_for_sta = True  # type: ignore[attr-defined]
    trainer._load_from_checkpoint = load_from_checkpoint


def _watch_accelerate() -> None:
    """Have `save_state` write the settings beside its tensors, and `load_state` compare them, within accelerate's own hooks."""
    accelerator = getattr(sys.modules.get("accelerate.accelerator"), "Accelerator", None)
    if accelerator is None:
        after_import("accelerate.accelerator", _watch_accelerate)
        return
    for method, register, hook in (
        ("save_state", "register_save_state_pre_hook", _write_settings),
        ("load_state", "register_load_state_pre_hook", _compare_settings),
    ):
        original = getattr(accelerator, method, None)
        if original is None or not hasattr(accelerator, register):
            raise incompatible("accelerate", f"Accelerator has no {method} or no {register}")
        if not getattr(original, "looks_for_sta", False):
            setattr(accelerator, method, _with_hook(original, register, hook))


def _with_hook(
    original: Callable[..., object], register: str, hook: Callable[[Accelerator, Path], None]
) -> Callable[..., object]:
    """A method of Accelerator with a hook on it while it runs, which is given the folder, the last of what hooks get."""

    @functools.wraps(original)
    def method(self: Accelerator, *args: object, **kwargs: object) -> object:
        registered: _Removable = getattr(self, register)(lambda *given: hook(self, Path(given[-1])))
        try:
            return original(self, *args, **kwargs)
        finally:
            registered.remove()

    method.looks_for_sta = True  # type: ignore[attr-defined]
    return method


def _write_settings(accelerator: Accelerator, folder: Path) -> None:
    each = accelerator.project_configuration.save_on_each_node
    settings = [None if handle is None else handle.config.to_dict() for handle in map(get_sta, _models(accelerator))]
    if any(settings) and (accelerator.is_local_main_process if each else accelerator.is_main_process):
        (folder / SETTINGS).write_text(json.dumps({MODELS: settings}, indent=2) + "\n")


def _compare_settings(accelerator: Accelerator, folder: Path) -> None:
    try:
        found = read_json(folder / SETTINGS).get(MODELS)
    except FileNotFoundError:  # no STA, or none that was told of
        return
    if not isinstance(found, list):
        raise CheckpointError(
            f"{folder / SETTINGS} has no list of {MODELS}, so the settings of its STA can't be known."
        )
    for model, settings in zip(_models(accelerator), found, strict=False):
        handle = None if settings is None else get_sta(model)
        if handle is None:
            continue
        if differ := _difference(handle, saved_config({"config": settings}, folder / SETTINGS)):
            raise ConfigError(f"the state in {folder} has STA with {differ}. Inject STA with the settings that it has.")


def _models(accelerator: Accelerator) -> Sequence[nn.Module]:
    """Those that were prepared, which a hook is given where accelerate itself saves and loads them, without DeepSpeed and FSDP."""
    found: Sequence[nn.Module] | None = getattr(accelerator, "_models", None)
    if found is None:
        raise incompatible("accelerate", "Accelerator has no list of models")
    return found
