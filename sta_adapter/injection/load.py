"""load_sta: put a saved adapter into a model, STA and the LoRA weights beside it; also when PEFT's own loader is asked."""

from __future__ import annotations

import contextvars
import dataclasses
import functools
import importlib
import inspect
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import nn

from sta_adapter._validate import unknown_names
from sta_adapter.adapter.base_model import check_base
from sta_adapter.adapter.format import CONFIG, Description, saved_config
from sta_adapter.adapter.hub import download_options, resolve_adapter
from sta_adapter.adapter.lora_weights import LORA_CONFIG, load_lora
from sta_adapter.attention.module import TemporalAttention
from sta_adapter.compatibility.module_names import STA_TENSOR
from sta_adapter.compatibility.releases import version
from sta_adapter.compatibility.seams import after_import, peft_parts
from sta_adapter.errors import CheckpointError, ConfigError, STAWarning
from sta_adapter.injection.handle import STAHandle, get_sta
from sta_adapter.injection.plan import plan_injection
from sta_adapter.injection.run_states import watch_runs
from sta_adapter.injection.saved_sta import (
    describe,
    fill,
    fill_copies,
    folder_with_sta,
    require_same_sta,
    silence_originals,
)
from sta_adapter.injection.text_positions import warn_of_other_rule

PASSED_ON = {"is_trainable", "revision", "subfolder"}  # arguments of PEFT's loader
# whether PEFT's from_pretrained is at work, which calls its load_adapter when all has been looked at
_CHECKED = contextvars.ContextVar("checked", default=False)
# how PEFT makes LoRA before it has its weights, and where it puts a model that accelerate has spread out already
WITHOUT_EFFECT = {"low_cpu_mem_usage", "autocast_adapter_dtype", "torch_device", "device_map", "max_memory"} | {
    f"offload_{name}" for name in ("folder", "dir", "index")
}


def load_sta(
    model: nn.Module,
    folder_or_repo_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    is_trainable: bool = False,
    base_model: str | None = None,
    attention: Literal["auto", "xformers", "sdpa", "eager"] | None = None,
    **hub_options: object,
) -> STAHandle:
    """Put a saved adapter into a model; LoRA weights in the same folder come back too.

    Args:
        model: the base model that the adapter was trained on, without STA; with LoRA in the adapter it must not be a
            PeftModel yet. `handle.model` is the model to go on with.
        folder_or_repo_id: a folder, or the id of a repository on the Hub.
        revision: branch, tag or commit on the Hub.
        subfolder: of the folder or the repository, in which the adapter lies.
        is_trainable: whether to go on training, in float32 on a base in 16 bits; otherwise nothing of the adapter
            requires a gradient.
        base_model: "any" takes every model whose vision encoder fits, such as a renamed or fine-tuned copy; by default
            another language model, or another Hub id, is refused (see `sta_adapter.adapter.base_model`).
        attention: the kernel to compute with here (`STAConfig.attention`), in place of the one that the adapter names.
        hub_options: further arguments of `huggingface_hub.snapshot_download`, such as `token` or `cache_dir`.

    Returns:
        The handle of the model.

    Raises:
        CheckpointError: files isn't available, are missing or damaged, or the adapter is for another base model; both are
            named, every difference is listed. The model is as before.
        ConfigError: an argument is none of these.
        UnknownBackboneError, ConfigError, InjectionError: as `inject_sta`.

    Warns:
        STAWarning: the model numbers text by another rule than the one that the adapter was trained with.
    """
    if hub_options:
        _require_known(hub_options)
    folder = resolve_adapter(folder_or_repo_id, revision, subfolder=subfolder, **hub_options)
    description, file, read = describe(folder)
    config = saved_config(description, folder / CONFIG)
    config = config if attention is None else dataclasses.replace(config, attention=attention)
    watch_peft()
    plan = plan_injection(model, config, preferred=description["backbone"])
    check_base(folder, description, model, plan.encoder, base_model)
    state = read()
    modules = plan.allocate(file, state)
    if any(parameter.is_meta for module in modules.values() for parameter in module.parameters()):
        raise CheckpointError("the encoder's weights are on the meta device: load them first, then the adapter.")
    warn_of_other_rule(model, description.get("positions"))
    with torch.inference_mode(False):
        handle = plan.attach(modules, has_values=False)
        fill(handle, state, is_trainable)
        if (folder / LORA_CONFIG).exists():
            handle = _add_lora(handle, folder, description, is_trainable)
            fill(handle, state, is_trainable)  # the STA file is the one truth, also for PEFT's copies
            silence_originals(modules, handle)
    return handle


def _require_known(hub_options: Mapping[str, object]) -> None:
    """Refuse arguments that `load_sta` has not, also where nothing is downloaded: a misspelt one would have no effect."""
    from huggingface_hub import snapshot_download

    known = ["subfolder", "is_trainable", "base_model", "attention", *inspect.signature(snapshot_download).parameters]
    if unknown := [name for name in hub_options if name not in known]:
        raise ConfigError(f"load_sta has no argument {unknown_names(unknown, known)}; known: {', '.join(known)}.")


def watch_peft() -> None:
    """See to it that `PeftModel.from_pretrained` loads a folder with STA by `load_sta`, once PEFT is imported; again and again is fine.

    `load_adapter`, for a second one or in the place of the first, and `hotswap_adapter` say what they can't. PEFT alone would load its LoRA
    without the STA. Where this package isn't imported, the entry "sta_adapter" in adapter_config.json makes PEFT warn of it, or refuse it
    (before 0.14).
    """
    peft = sys.modules.get("peft")
    wrapped = getattr(getattr(peft, "PeftModel", None), "__dict__", {}).get("from_pretrained")
    load = getattr(wrapped, "__func__", None)
    _watch_transformers()
    watch_runs()
    if peft is None:
        after_import("peft", watch_peft)
    if peft is None or load is None or getattr(load, "brings_sta", False):
        return

    @functools.wraps(load)
    def from_pretrained(cls: Any, model: nn.Module, model_id: str, *args: Any, **kwargs: Any) -> Any:
        folder = folder_with_sta(model_id, kwargs)
        if folder is not None and get_sta(model) is None and not hasattr(model, "peft_config"):
            first = kwargs.get("adapter_name") in (None, "default")
            known = (
                PASSED_ON | WITHOUT_EFFECT | download_options(kwargs).keys() | ({"adapter_name"} if first else set())
            )
            if not args and set(kwargs) <= known:
                return load_sta(model, folder, is_trainable=kwargs.get("is_trainable", False)).model
        _is_beside_its_sta(model, folder, model_id)
        token = _CHECKED.set(True)
        try:
            return load(cls, model, model_id, *args, **kwargs)
        finally:
            _CHECKED.reset(token)

    from_pretrained.brings_sta = True  # type: ignore[attr-defined]
    peft.PeftModel.from_pretrained = classmethod(from_pretrained)
    _watch_hotswap()
    _watch_mixing(peft)
    if getattr(load_more := peft.PeftModel.load_adapter, "looks_for_sta", False):
        return

    @functools.wraps(load_more)
    def load_adapter(self: Any, model_id: str, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        if not _CHECKED.get():
            _is_beside_its_sta(self, folder_with_sta(model_id, kwargs), model_id)
        return load_more(self, model_id, adapter_name, *args, **kwargs)

    load_adapter.looks_for_sta = True  # type: ignore[attr-defined]
    peft.PeftModel.load_adapter = load_adapter


def _is_beside_its_sta(model: nn.Module, folder: Path | None, name: str | os.PathLike[str]) -> bool:
    """Whether the LoRA of an adapter of ours, if `folder` is one, comes to the STA that it goes with.

    To another one it is refused, and where a model has none that is told; `name` is what the caller has asked for.
    """
    if folder is None:
        return False
    if (handle := get_sta(model)) is not None:
        require_same_sta(folder, handle)
        return True
    warnings.warn(
        f"{os.fspath(name)} holds STA, which PEFT does not load: this is its LoRA alone. Use sta_adapter.load_sta(model, ...).",
        STAWarning,
        stacklevel=3,
    )
    return False


def _watch_hotswap() -> None:
    """The same for PEFT's `hotswap_adapter`, which knows of LoRA's weights alone and ends in a `KeyError` at STA's."""
    try:
        hotswap = importlib.import_module("peft.utils.hotswap")
    except ImportError:  # before PEFT 0.14
        return
    swap, swap_state = hotswap.hotswap_adapter, hotswap.hotswap_adapter_from_state_dict

    @functools.wraps(swap)
    def hotswap_adapter(model: nn.Module, model_name_or_path: str, *args: object, **kwargs: object) -> object:
        _is_beside_its_sta(model, folder_with_sta(model_name_or_path, kwargs), model_name_or_path)
        return swap(model, model_name_or_path, *args, **kwargs)

    @functools.wraps(swap_state)
    def hotswap_state(model: nn.Module, state_dict: Mapping[str, object], *args: object, **kwargs: object) -> object:
        if any(map(STA_TENSOR.search, state_dict)):
            raise CheckpointError(
                "PEFT's hotswap changes LoRA's weights alone, and STA's are among these. Load the folder in the place of the adapter that is "
                "there: model.load_adapter(folder, adapter_name), which changes both."
            )
        return swap_state(model, state_dict, *args, **kwargs)

    vars(hotswap).update(hotswap_adapter=hotswap_adapter, hotswap_adapter_from_state_dict=hotswap_state)


def _watch_mixing(peft: ModuleType) -> None:
    """Refuse PEFT's `add_weighted_adapter` of an adapter with STA: LoRA alone is mixed, and what is trained whole left out."""
    mix, (_, wrapper) = peft.LoraModel.add_weighted_adapter, peft_parts()

    @functools.wraps(mix)
    def add_weighted_adapter(self: nn.Module, adapters: Sequence[str], *args: object, **kwargs: object) -> object:
        copies = [module.modules_to_save for module in self.modules() if isinstance(module, wrapper)]
        for name in adapters:
            parts = (part for of in copies if name in of for part in of[name].modules())
            if any(isinstance(part, TemporalAttention) for part in parts):
                raise ConfigError(
                    f"the adapter {name!r} has STA of its own, and a mix by PEFT's add_weighted_adapter would have none, as it mixes LoRA alone: "
                    "take one of the adapters, or mix LoRA that was trained without STA."
                )
        return mix(self, adapters, *args, **kwargs)

    peft.LoraModel.add_weighted_adapter = add_weighted_adapter


def _watch_transformers() -> None:
    """The same for the `load_adapter` of transformers' models, which some releases (5.0, for one) load the copies of STA without, silently.

    It can put no STA into a model: of a folder with STA it gives LoRA alone, and says so.
    """
    mixin = getattr(sys.modules.get("transformers.integrations.peft"), "PeftAdapterMixin", None)
    load = getattr(mixin, "load_adapter", None)
    if mixin is None or load is None or getattr(load, "looks_for_sta", False):
        return

    @functools.wraps(load)
    def load_adapter(self: Any, peft_model_id: Any = None, *args: Any, **kwargs: Any) -> Any:
        options = {**kwargs, **(kwargs.get("adapter_kwargs") or {})}
        folder = None if peft_model_id is None else folder_with_sta(peft_model_id, options)
        fits = _is_beside_its_sta(self, folder, peft_model_id)
        found = load(self, peft_model_id, *args, **kwargs)
        if fits and folder is not None:
            name = args[0] if args else kwargs.get("adapter_name")
            fill_copies(self, name or "default", describe(folder)[2]())
        return found

    load_adapter.looks_for_sta = True  # type: ignore[attr-defined]
    mixin.load_adapter = load_adapter


def _add_lora(handle: STAHandle, folder: Path, description: Description, is_trainable: bool) -> STAHandle:
    """The handle of the PeftModel around the handle's model; where there can be none, STA goes out again."""
    try:
        loaded = get_sta(load_lora(handle.model, folder, is_trainable))
    except BaseException as error:
        handle.remove()
        saved, here = description.get("transformers_version"), version("transformers")
        if isinstance(error, CheckpointError) and isinstance(saved, str) and saved != here:
            raise CheckpointError(
                f"{error} The adapter was saved on transformers {saved[:40]}; this is {here}."
            ) from error
        raise
    if loaded is None:
        raise CheckpointError(f"peft replaced the encoder with a copy while loading {folder}, which is not supported.")
    return loaded
