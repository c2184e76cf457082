"""STA in ms-swift: `swift sft --external_plugins "$(sta-adapter path ms-swift)" --tuner_type sta ...`.

Settings come from STA_SETTINGS, or from ms-swift's own `--model_kwargs '{"sta_settings": {...}}'`.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from peft import get_peft_model
from torch import nn

from sta_adapter.adapter.format import read_description
from sta_adapter.adapter.lora_weights import LORA_CONFIG
from sta_adapter.compatibility.releases import incompatible
from sta_adapter.distributed import is_sharded
from sta_adapter.errors import ConfigError
from sta_adapter.injection.handle import get_sta
from sta_adapter.injection.load import load_sta, watch_peft
from sta_adapter.injection.saved_sta import has_sta
from sta_adapter.integrations.callbacks import RequireGradient, SaveAdapter
from sta_adapter.integrations.settings import Settings, merging_loses_sta, prepare_model

try:
    from swift.callbacks import callbacks_map
    from swift.tuner_plugin import Tuner, tuners_map
    from swift.tuners import Swift
except ImportError as error:
    raise incompatible(
        "ms-swift", f"its tuners and callbacks, as they are since 4.0, can't be imported ({error})"
    ) from error

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["STATuner", "register"]

logger = logging.getLogger(__name__)

NAME = "sta"
ENGINES = ("sglang", "lmdeploy")  # to which ms-swift gives no adapter
EXPORTS = ("quant_method", "to_ollama", "to_hf", "to_mcore")  # that are made of the base's weights and LoRA's
# ms-swift's options of LoRA: their default there, which is not the recipe's, and what PEFT calls them; None where it has no such
OPTIONS: dict[str, tuple[object, str | None]] = {
    "lora_rank": (8, "r"),
    "lora_alpha": (32.0, "lora_alpha"),
    "lora_dropout": (0.05, "lora_dropout"),
    "target_modules": (["all-linear"], "target_modules"),
    "target_parameters": (None, "target_parameters"),
    "modules_to_save": ([], "modules_to_save"),
    "lora_bias": ("none", "bias"),
    "use_rslora": (False, "use_rslora"),
    "use_dora": (False, "use_dora"),
    "init_weights": (True, "init_lora_weights"),
    "freeze_llm": (False, None),
    "freeze_vit": (True, None),
    "freeze_aligner": (True, None),
    "lora_dtype": (None, None),
}


class STATuner(Tuner):
    """STA, with LoRA beside it in stage 2; LoRA is the published recipe's unless ms-swift's options say otherwise."""

    @staticmethod
    def prepare_model(args: object, model: nn.Module) -> nn.Module:
        """Put STA in, and LoRA, and have the run watched and saved.

        Raises:
            ConfigError: answers to learn from would come from vLLM, whose copy of the model has no STA; or an option would
                have no effect.
        """
        if getattr(args, "use_vllm", False):
            raise ConfigError(
                "use_vllm is true, and vLLM's copy of the model has no STA that trains: set --use_vllm false."
            )
        settings = Settings.from_environment()
        handle, lora = prepare_model(model, settings, **lora_options(args))
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
        if is_trainable:
            there = read_description(Path(model_id))["config"]
            Settings.from_environment().require_branch(there, f"the adapter {str(model_id)!r}")
        return load_sta(model, model_id, is_trainable=is_trainable).model


def _merging(own: Callable[..., object]) -> Callable[..., object]:
    """ms-swift's function that merges LoRA into the model to be exported, which a model with STA can't be."""

    @functools.wraps(own)
    def merge_and_unload(model: nn.Module, **kwargs: object) -> object:
        if get_sta(model) is not None:
            raise merging_loses_sta("ms-swift's --merge_lora true")
        return own(model, **kwargs)

    return merge_and_unload


def _looking(own: Callable[..., object]) -> Callable[..., object]:
    """A function of ms-swift that uses the adapters of its settings: its first parameter, or what that has as `args`."""

    @functools.wraps(own)
    def looked(first: object, *given: object, **named: object) -> object:
        refuse_without_sta(getattr(first, "args", first))
        return own(first, *given, **named)

    return looked


def refuse_without_sta(args: object) -> None:
    """Refuse what ms-swift writes, or answers with, of an adapter with STA without that STA."""
    folders = [*(getattr(args, "adapters", None) or ()), *(getattr(args, "adapter_mapping", None) or {}).values()]
    if not any(has_sta(Path(folder)) for folder in folders):
        return
    if (backend := getattr(args, "infer_backend", None)) in ENGINES:
        raise ConfigError(
            f"--infer_backend {backend} would answer without STA: take transformers, or serve by vLLM (sta-adapter serve ADAPTER)."
        )
    for name in () if backend else EXPORTS:
        if value := getattr(args, name, None):
            raise merging_loses_sta(f"ms-swift's --{name} {value}")


def _preparing(own: Callable[..., object]) -> Callable[..., object]:
    """ms-swift's function that makes a model ready to be trained, which does so without STA where another tuner is named."""

    @functools.wraps(own)
    def prepare_model(cls: object, args: object, model: nn.Module, **kwargs: object) -> object:
        if (tuner := getattr(args, "tuner_type", NAME)) != NAME:
            raise ConfigError(
                f"--external_plugins has STA's, and --tuner_type {tuner} would train without STA: set --tuner_type {NAME}, or leave the plug-in out."
            )
        return own(cls, args, model, **kwargs)

    return prepare_model


def lora_options(args: object) -> dict[str, object]:
    """Fields of `LoraConfig` that ms-swift's options ask for, where these differ from its defaults; what has no place is refused."""
    given = {name: getattr(args, name, default) for name, (default, _) in OPTIONS.items()}
    given = {name: value for name, value in given.items() if value not in (OPTIONS[name][0], None)}
    lists = [value for value in given.values() if isinstance(value, list)]
    if short := [name for names in lists for name in names if str(name).startswith("all-")]:
        raise ConfigError(
            f"{short[0]!r} is ms-swift's short form for several modules; beside STA name the modules themselves."
        )
    if idle := sorted(name for name in given if OPTIONS[name][1] is None):
        raise ConfigError(
            f"{', '.join(f'--{name} {given[name]}' for name in idle)}: which layers get LoRA beside STA is said by --target_modules or "
            "--target_regex alone, and LoRA is kept in float32; leave that out."
        )
    return {field: given[name] for name, (_, field) in OPTIONS.items() if name in given and field is not None}


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
    exports, infers = (sys.modules.get(f"swift.pipelines.{name}") for name in ("export.export", "infer.infer"))
    if exports is not None:
        exports.SwiftExport.run = _looking(exports.SwiftExport.run)
    if infers is not None:
        infers.SwiftInfer.get_infer_engine = staticmethod(_looking(infers.SwiftInfer.get_infer_engine))
    training = sys.modules.get("swift.pipelines.train.tuner")  # a command that trains imports it before its plug-ins
    if training is not None:
        training.TunerMixin.prepare_model = classmethod(_preparing(training.TunerMixin.prepare_model.__func__))
    callbacks_map["sta_save"] = lambda *_: SaveAdapter()  # (trainer) in ms-swift 4.0, and then (args, trainer)
    callbacks_map["sta_gradient"] = lambda *_: RequireGradient(Settings.from_environment().patience)


register()
