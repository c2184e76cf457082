"""STA in ms-swift: `swift sft --external_plugins "$(sta-adapter path ms-swift)" --tuner_type sta ...`.

Settings come from STA_SETTINGS, or from ms-swift's own `--model_kwargs '{"sta_settings": {...}}'`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from peft import get_peft_model
from swift.callbacks import callbacks_map
from swift.tuner_plugin import Tuner, tuners_map
from swift.tuners import Swift
from torch import nn

from sta_adapter.adapter.lora_weights import LORA_CONFIG
from sta_adapter.distributed import is_sharded
from sta_adapter.errors import ConfigError
from sta_adapter.injection.handle import get_sta
from sta_adapter.injection.load import load_sta, watch_peft
from sta_adapter.integrations.callbacks import RequireGradient, SaveAdapter
from sta_adapter.integrations.settings import Settings, merging_loses_sta, prepare_model

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["STATuner", "register"]

logger = logging.getLogger(__name__)

NAME = "sta"
DEFAULTS = {"lora_rank": 8, "lora_alpha": 32.0, "lora_dropout": 0.05, "target_modules": ["all-linear"]}
FIELDS = {
    "lora_rank": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "target_modules": "target_modules",
}


class STATuner(Tuner):
    """STA, with LoRA beside it in stage 2; LoRA is the published recipe's unless ms-swift's options say otherwise."""

    @staticmethod
    def prepare_model(args: object, model: nn.Module) -> nn.Module:
        """Put STA in, and LoRA, and have the run watched and saved.

        Raises:
            ConfigError: answers to learn from would come from vLLM, whose copy of the model has no STA.
        """
        if getattr(args, "use_vllm", False):
            raise ConfigError(
                "use_vllm is true, and vLLM's copy of the model has no STA that trains: set --use_vllm false."
            )
        settings = Settings.from_environment()
        own = {FIELDS[name]: getattr(args, name) for name, value in DEFAULTS.items() if _given(args, name, value)}
        handle, lora = prepare_model(model, settings, **({} if settings.stage == 1 else own))
        _watch(args)
        return handle.model if lora is None else get_peft_model(handle.model, lora)

    @staticmethod
    def save_pretrained(model: nn.Module, save_directory: str, *args: object, **kwargs: object) -> None:
        """Write the adapter; sharded weights are left to the callback, which all processes call."""
        handle = get_sta(model)
        if handle is not None and not is_sharded(handle.model.parameters()):
            handle.save_pretrained(save_directory)

    @staticmethod
    def from_pretrained(
        model: nn.Module, model_id: str, adapter_name: str = "default", is_trainable: bool = False, **kwargs: object
    ) -> nn.Module:
        """An adapter of this tuner in the model: to go on training, to answer, or beside the first as DPO's reference."""
        if get_sta(model) is not None:
            cast("PeftModel", model).load_adapter(model_id, adapter_name, is_trainable=is_trainable)
            return model
        if is_trainable and not (Path(model_id) / LORA_CONFIG).exists() and Settings.from_environment().stage == 2:
            raise ConfigError(
                f"the adapter in {model_id} is of stage 1, without LoRA. To go on with that stage set STA_SETTINGS='{{stage: 1}}'; "
                f"to start stage 2 from it leave --adapters out and set STA_SETTINGS='{{adapter: {model_id}}}'."
            )
        return load_sta(model, model_id, is_trainable=is_trainable).model


def _merging(own: Callable[..., object]) -> Callable[..., object]:
    """ms-swift's function that merges LoRA into the model to be exported, which a model with STA can't be."""

    @functools.wraps(own)
    def merge_and_unload(model: nn.Module, **kwargs: object) -> object:
        if get_sta(model) is not None:
            raise merging_loses_sta("ms-swift's --merge_lora true")
        return own(model, **kwargs)

    return merge_and_unload


def _given(args: object, name: str, default: object) -> bool:
    """Whether an option differs from ms-swift's default, whose LoRA is not the recipe's."""
    return getattr(args, name, default) not in (default, None)


def _watch(args: object) -> None:
    """Add our callbacks to the run's."""
    run: Any = getattr(args, "training_args", args)
    run.callbacks = [
        *(run.callbacks or []),
        *(name for name in ("sta_save", "sta_gradient") if name not in (run.callbacks or [])),
    ]
    if not getattr(args, "strict", True):
        logger.warning(
            "ms-swift trains another sample in the place of one whose clip can't be read; --strict true makes it an error."
        )


def register() -> None:
    """Make the tuner and the callbacks known to ms-swift, and STA to its loading and merging of LoRA."""
    watch_peft()  # also an adapter that is loaded without --tuner_type sta brings its STA
    tuners_map[NAME] = STATuner
    Swift.merge_and_unload = staticmethod(_merging(Swift.merge_and_unload))
    callbacks_map["sta_save"] = lambda args, trainer: SaveAdapter()
    callbacks_map["sta_gradient"] = lambda args, trainer: RequireGradient(Settings.from_environment().patience)


register()
