"""load_sta: put a saved adapter into a model, STA and the LoRA weights beside it; also when PEFT's own loader is asked."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sta_adapter.adapter.atomic_write import SAVED
from sta_adapter.adapter.base_model import check_base
from sta_adapter.adapter.format import (
    CONFIG,
    WEIGHTS,
    Description,
    compare_tensors,
    read_description,
    read_weights,
    require_description,
    saved_config,
)
from sta_adapter.adapter.hub import download_options, resolve_adapter
from sta_adapter.adapter.lora_options import OURS
from sta_adapter.adapter.lora_weights import LORA_CONFIG, load_lora, read_lora
from sta_adapter.attention.module import CHILD, TemporalAttention
from sta_adapter.compatibility.module_names import STA_TENSOR
from sta_adapter.compatibility.releases import version
from sta_adapter.errors import CheckpointError, ConfigError, STAError, STAWarning
from sta_adapter.injection.backbone import active_modules
from sta_adapter.injection.contents import plain_state
from sta_adapter.injection.handle import STAHandle, get_sta
from sta_adapter.injection.hooks import find_injections
from sta_adapter.injection.plan import plan_injection
from sta_adapter.injection.registry import get_backbone, list_backbones
from sta_adapter.injection.text_positions import warn_of_other_rule

__all__ = ["load_sta", "warn_of_sta", "watch_peft"]

PASSED_ON = {"is_trainable", "revision", "subfolder"}  # arguments of PEFT's loader
WITHOUT_EFFECT = {"low_cpu_mem_usage", "autocast_adapter_dtype"}  # how PEFT makes LoRA, before it has its weights


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
        is_trainable: whether to go on training; otherwise nothing of the adapter requires a gradient.
        base_model: "any" takes every model whose vision encoder fits, such as a renamed or fine-tuned copy; by default
            another language model, or another Hub id, is refused (see `sta_adapter.adapter.base_model`).
        attention: the kernel to compute with here (`STAConfig.attention`), in place of the one that the adapter names.
        hub_options: further arguments of `huggingface_hub.snapshot_download`, such as `token` or `cache_dir`.

    Returns:
        The handle of the model.

    Raises:
        CheckpointError: files can't be had, are missing or damaged, or the adapter is for another base model; both are
            named, every difference is listed. The model is as before.
        ConfigError: an argument is none of these.
        UnknownBackboneError, ConfigError, InjectionError: as `inject_sta`.

    Warns:
        STAWarning: the model numbers text by another rule than the one that the adapter was trained with.
    """
    if hub_options:
        _require_known(hub_options)
    folder = resolve_adapter(folder_or_repo_id, revision, subfolder=subfolder, **hub_options)
    description, file, read = _describe(folder)
    config = saved_config(description, folder / CONFIG)
    config = config if attention is None else dataclasses.replace(config, attention=attention)
    watch_peft()
    plan = plan_injection(model, config, preferred=description["backbone"])
    check_base(folder, description, model, plan.encoder, base_model)
    modules = plan.build("meta")  # nothing is initialised that the file replaces
    expected = {f"blocks.{i}.{k}": v for i, module in modules.items() for k, v in module.state_dict().items()}
    state = read()
    compare_tensors(file, state, expected)
    plan.allocate(modules)
    if any(parameter.is_meta for module in modules.values() for parameter in module.parameters()):
        raise CheckpointError("the encoder's weights are on the meta device: load them first, then the adapter.")
    warn_of_other_rule(model, description.get("positions"))
    handle = plan.attach(modules)
    _fill(handle, state, is_trainable)
    if (folder / LORA_CONFIG).exists():
        handle = _add_lora(handle, folder, description, is_trainable)
        _fill(handle, state, is_trainable)  # the STA file is the one truth, also for PEFT's copies
        _silence_originals(modules, handle)
    return handle


def _require_known(hub_options: Mapping[str, object]) -> None:
    """Refuse arguments that `load_sta` has not, also where nothing is downloaded: a misspelt one would have no effect."""
    from huggingface_hub import snapshot_download

    known = ["subfolder", "is_trainable", "base_model", "attention", *inspect.signature(snapshot_download).parameters]
    for name in hub_options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ConfigError(f"load_sta has no argument {name!r}{hint}; known: {', '.join(known)}.")


def watch_peft() -> None:
    """See to it that `PeftModel.from_pretrained` loads a folder with STA by `load_sta`, if PEFT is imported; again and again is fine.

    `load_adapter`, for a second one, says what it can't. PEFT alone would load its LoRA without the STA. Where this package
    isn't imported, the entry "sta_adapter" in adapter_config.json makes PEFT warn of it, or refuse it (before 0.14).
    """
    peft = sys.modules.get("peft")
    wrapped = getattr(getattr(peft, "PeftModel", None), "__dict__", {}).get("from_pretrained")
    load = getattr(wrapped, "__func__", None)
    _watch_transformers()
    if peft is None or load is None or getattr(load, "brings_sta", False):
        return

    @functools.wraps(load)
    def from_pretrained(cls: Any, model: nn.Module, model_id: str, *args: Any, **kwargs: Any) -> Any:
        folder, handle = _folder_with_sta(model_id, kwargs), get_sta(model)
        if folder is not None and handle is not None:
            _require_same_sta(folder, handle)
        if folder is None or handle is not None:
            return load(cls, model, model_id, *args, **kwargs)
        first = kwargs.get("adapter_name") in (None, "default")
        known = PASSED_ON | WITHOUT_EFFECT | download_options(kwargs).keys() | ({"adapter_name"} if first else set())
        if not args and set(kwargs) <= known and not hasattr(model, "peft_config"):
            return load_sta(model, folder, is_trainable=kwargs.get("is_trainable", False)).model
        _warn_of_lora_alone(model_id)
        return load(cls, model, model_id, *args, **kwargs)

    from_pretrained.brings_sta = True  # type: ignore[attr-defined]
    peft.PeftModel.from_pretrained = classmethod(from_pretrained)
    if getattr(load_more := peft.PeftModel.load_adapter, "looks_for_sta", False):
        return

    @functools.wraps(load_more)
    def load_adapter(self: Any, model_id: str, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        if adapter_name not in self.peft_config and (folder := _folder_with_sta(model_id, kwargs)) is not None:
            handle = get_sta(self)
            if handle is None:
                _warn_of_lora_alone(model_id)
            else:
                _require_same_sta(folder, handle)
        return load_more(self, model_id, adapter_name, *args, **kwargs)

    load_adapter.looks_for_sta = True  # type: ignore[attr-defined]
    peft.PeftModel.load_adapter = load_adapter


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
        folder = None if peft_model_id is None else _folder_with_sta(peft_model_id, options)
        handle = None if folder is None else get_sta(self)
        if handle is not None and folder is not None:
            _require_same_sta(folder, handle)
        elif folder is not None:
            _warn_of_lora_alone(peft_model_id)
        found = load(self, peft_model_id, *args, **kwargs)
        if handle is not None and folder is not None:
            name = args[0] if args else kwargs.get("adapter_name")
            _fill_copies(self, name or "default", _describe(folder)[2]())
        return found

    load_adapter.looks_for_sta = True  # type: ignore[attr-defined]
    mixin.load_adapter = load_adapter


@torch.no_grad()
def _fill_copies(model: nn.Module, name: str, state: Mapping[str, Tensor]) -> None:
    """Give STA's tensors in PEFT's copies for one adapter their values."""
    encoder, injection = find_injections(active_modules(model))[0]
    for index, block in enumerate(encoder.get_submodule(injection.spec.blocks).children()):
        copies = getattr(getattr(block, CHILD, None), "modules_to_save", {})
        if name in copies:
            for key, tensor in plain_state(copies[name]).items():
                tensor.copy_(state[f"blocks.{index}.{key}"])


def _warn_of_lora_alone(name: str | os.PathLike[str]) -> None:
    warnings.warn(
        f"{os.fspath(name)} holds STA, which PEFT does not load: this is its LoRA alone. Use sta_adapter.load_sta(model, ...).",
        STAWarning,
        stacklevel=3,
    )


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


def _describe(folder: Path) -> tuple[Description, Path, Callable[[], dict[str, Tensor]]]:
    """STA's description in a folder, and what holds and reads its tensors: an adapter's files, or those that PEFT itself saved."""
    if (folder / LORA_CONFIG).exists() and not (folder / CONFIG).exists() and not (folder / SAVED).exists():
        lora = read_lora(folder)
        if lora.sta is not None or lora.holds_sta:
            return require_description(lora.sta or {}, folder / LORA_CONFIG), lora.path, lora.read_sta
    description = read_description(folder)
    if description.get("lora") is True and not (folder / LORA_CONFIG).exists():
        # without this, a copy that misses a file would load, and compute something else
        raise CheckpointError(
            f"the adapter in {folder} was saved with LoRA weights, but {LORA_CONFIG} is missing. Copy or download it "
            f'again; to use STA without its LoRA, write "lora": false into {CONFIG}.'
        )
    return description, folder / WEIGHTS, lambda: read_weights(folder, description)


@torch.no_grad()
def _fill(handle: STAHandle, state: Mapping[str, Tensor], is_trainable: bool) -> None:
    """Give STA's tensors their values; where LoRA is on STA itself, it alone goes on training."""
    for index, module in handle.blocks.items():
        own = plain_state(module)
        for name, tensor in own.items():
            tensor.copy_(state[f"blocks.{index}.{name}"])
        if len(own) == len(module.state_dict()):
            module.requires_grad_(is_trainable)


@torch.no_grad()
def _silence_originals(modules: Mapping[int, TemporalAttention], handle: STAHandle) -> None:
    """Where PEFT has STA as a copy, the module in the copy's place under `disable_adapter()` adds nothing, as before the training."""
    for index, module in modules.items():
        if handle.blocks[index] is not module:
            for parameter in module.to_out.parameters():
                parameter.zero_()


def _require_same_sta(folder: Path, handle: STAHandle) -> None:
    """Refuse to have PEFT load an adapter, of which it takes what fits, into a model with STA of another kind.

    Where its LoRA weights come without STA's, as `sta-adapter export` writes them, it must be the model's.
    """
    description, file, read = _describe(folder)
    saved, here = saved_config(description, folder / CONFIG), handle.config
    differ = [
        f"{name} {getattr(saved, name)!r}, in the model {getattr(here, name)!r}"
        for name in ("head_scale", "order", "rope_theta", "single_frames", "causal", "window", "token_order")
        if getattr(saved, name) != getattr(here, name)
    ]
    if differ:
        raise CheckpointError(
            f"STA of {folder} was trained with other settings than the model's: {'; '.join(differ)}. Take the model's out "
            "(get_sta(model).remove()) and load the folder by sta_adapter.load_sta."
        )
    state = read()
    own = {f"blocks.{i}.{name}": t.detach() for i, m in handle.blocks.items() for name, t in plain_state(m).items()}
    compare_tensors(file, state, own)
    if read_lora(folder).holds_sta or all(torch.equal(own[k].cpu(), t.to(own[k].dtype)) for k, t in state.items()):
        return
    raise CheckpointError(
        f"the LoRA weights in {folder} were trained beside another STA than the model's, and PEFT loads them alone. Take the model's out "
        "(get_sta(model).remove()) and load the folder by sta_adapter.load_sta."
    )


def _folder_with_sta(name: str | os.PathLike[str], options: Mapping[str, Any]) -> Path | None:
    """Where an adapter of ours lies; None for any other, and where it can't be had, of which PEFT says why."""
    revision = None if os.path.isdir(name) else options.get("revision")  # PEFT takes one for a folder too
    try:
        folder = resolve_adapter(name, revision, subfolder=options.get("subfolder"), **download_options(options))
        known = (folder / CONFIG).is_file() or OURS in json.loads((folder / LORA_CONFIG).read_bytes())
    except (STAError, OSError, ValueError, TypeError):
        return None
    return folder if known else None


def warn_of_sta(name: str | os.PathLike[str], unexpected: Iterable[str]) -> None:
    """Say that a model was loaded without the STA among its weights: a trainer saved it whole, or it is of the published code.

    Args:
        name: of the model.
        unexpected: names of weights that had no place in it.
    """
    published = {spec.published_names.get("to_qkv") for spec in map(get_backbone, list_backbones())} - {None}
    for key in sorted(unexpected):
        ours = STA_TENSOR.search(key)
        if not ours and not any(f".{part}." in key for part in published):
            continue
        how = "handle.save_pretrained wrote it (load_sta, --adapter)" if ours else "`sta-adapter convert` makes it"
        warnings.warn(
            f"the weights in {os.fspath(name)} hold STA ({key}, for one), and the model is loaded without it: give its adapter as {how}.",
            STAWarning,
            stacklevel=4,
        )
        return
