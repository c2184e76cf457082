"""A hook where PEFT begins: `install()` once, and whatever adds LoRA to a video model in this process trains STA with it.

For tools that load the model and build LoRA by themselves. STA goes in just before LoRA, and is trained and saved whole
beside it; each folder that `PeftModel.save_pretrained` writes is an adapter that `load_sta` takes. Models without a
known vision encoder, and LoRA that is loaded from a folder without STA, stay as they are.
"""

from __future__ import annotations

import contextvars
import functools
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from sta_adapter._lazy import importing
from sta_adapter.adapter.format import CONFIG
from sta_adapter.compatibility.seams import peft_hook
from sta_adapter.config import STAConfig
from sta_adapter.distributed import is_sharded
from sta_adapter.errors import CheckpointError, ConfigError, UnknownBackboneError
from sta_adapter.injection.handle import get_sta
from sta_adapter.injection.load import watch_peft
from sta_adapter.injection.saved_sta import describe, downloaded, has_sta
from sta_adapter.injection.target import widen
from sta_adapter.integrations.settings import Settings, prepare_model

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = ["adapter_folder", "install", "uninstall"]

logger = logging.getLogger(__name__)
_undo: list[Callable[[], None]] = []
_loading = contextvars.ContextVar("whether LoRA comes from a folder", default=False)

T = TypeVar("T")
Model = TypeVar("Model", bound=nn.Module)


def install(settings: Settings | STAConfig | None = None) -> None:
    """Make PEFT put STA into every video model that gets LoRA in this process, until `uninstall()`.

    Args:
        settings: of STA; None takes those of the environment variable STA_SETTINGS, by default the backbone's.

    Raises:
        ConfigError: installed already with other settings, or a setting that LoRA alone can't have (stage 1).
        CompatibilityError: PEFT has no such hook, or another one than tested.
        MissingExtraError: peft is not installed.
    """
    if isinstance(settings, STAConfig):
        settings = Settings(config=settings)
    settings = Settings.from_environment() if settings is None else settings
    if settings.stage == 1:
        raise ConfigError(
            "stage 1 trains STA without LoRA, and this hook runs only where LoRA is added: train stage 1 by "
            "`sta-adapter train --stage 1`, and go on from its folder with adapter=FOLDER."
        )
    if _undo:
        raise ConfigError("sta_adapter.integrations.peft is installed already in this process; uninstall() it first.")
    with importing("this hook is in peft: pip install 'sta-adapter[train]'"):
        import peft
    watch_peft()
    load = vars(peft.PeftModel)["from_pretrained"].__func__
    _replace(peft.LoraModel, "_pre_injection_hook", _injecting(peft_hook(), settings))
    _replace(peft.PeftModel, "save_pretrained", _saving(peft.PeftModel.save_pretrained))
    _replace(peft.PeftModel, "from_pretrained", classmethod(_bringing_sta(load, settings)))


def _replace(owner: type, name: str, value: object) -> None:
    """Give a class an attribute, which `uninstall` takes back."""
    had, before = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, value)
    _undo.append(lambda: setattr(owner, name, before) if had else delattr(owner, name))


def _injecting(before: Callable[..., None], settings: Settings) -> Callable[..., None]:
    """PEFT's hook before LoRA, with STA in front of it."""

    @functools.wraps(before)
    def pre_injection_hook(self: object, model: nn.Module, config: LoraConfig, adapter_name: str) -> None:
        _inject(model, config, settings)
        before(self, model, config, adapter_name)

    return pre_injection_hook


def _saving(save: Callable[..., T]) -> Callable[..., T]:
    """`PeftModel.save_pretrained`, which then makes its folder an adapter of ours."""

    @functools.wraps(save)
    def save_pretrained(self: nn.Module, save_directory: str, *args: object, **kwargs: object) -> T:
        saved = save(self, save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            _save(self, Path(save_directory))
        return saved

    return save_pretrained


def _bringing_sta(load: Callable[..., Model], settings: Settings) -> Callable[..., Model]:
    """The function of `PeftModel.from_pretrained`, which brings a folder's STA itself, see `watch_peft`: here it is only looked at."""

    @functools.wraps(load)
    def from_pretrained(
        cls: type, model: nn.Module, model_id: str | os.PathLike[str], *args: object, **kwargs: object
    ) -> Model:
        folder = adapter_folder(model_id, kwargs)
        if folder is not None and kwargs.get("is_trainable"):
            settings.require_branch(describe(folder)[0]["config"], f"the adapter {str(folder)!r}")
        token = _loading.set(True)
        try:
            return load(cls, model, model_id, *args, **kwargs)
        finally:
            _loading.reset(token)

    return from_pretrained


def uninstall() -> None:
    """Make PEFT as it was; models that have STA keep it. Twice is fine."""
    while _undo:
        _undo.pop()()


def adapter_folder(name: str | os.PathLike[str], options: Mapping[str, Any]) -> Path | None:
    """Where the files of an adapter with STA lie; None if there are none, as beside LoRA alone."""
    try:
        folder = downloaded(name, options)
    except CheckpointError as error:
        logger.warning("whether STA belongs to the LoRA of %s can't be seen: %s", os.fspath(name), error)
        return None
    if has_sta(folder):
        return folder
    logger.warning("%s has no %s, so the model gets its LoRA without STA", os.fspath(name), CONFIG)
    return None


def _inject(model: nn.Module, config: LoraConfig, settings: Settings) -> None:
    """Fresh STA in front of LoRA that is new, and every STA trained with it."""
    from sta_adapter.injection.lora_recipe import saved_with_sta, targets_outside

    if get_sta(model) is None:
        if _loading.get():  # what is loaded has none
            return
        try:
            prepare_model(model, settings)
        except UnknownBackboneError:
            logger.info("no STA for %s: no backbone is known for it", type(model).__name__)
            return
    if (handle := get_sta(model)) is not None:
        config.modules_to_save = saved_with_sta(handle, model, config.modules_to_save)
        config.target_modules = targets_outside(model, config)
        if not config.inference_mode:
            widen(handle.parameters())


def _save(model: nn.Module, folder: Path) -> None:
    from sta_adapter.integrations.callbacks import SAVED

    handle = get_sta(model)
    if handle is None or handle in SAVED:
        return
    if is_sharded(handle.model.parameters()):
        raise CheckpointError(
            f"{folder} has PEFT's files alone: the weights lie in parts on several processes, of which one can't save the "
            "adapter. Add sta_adapter.integrations.callbacks.SaveAdapter() to the trainer's callbacks."
        )
    handle.save_pretrained(folder)
