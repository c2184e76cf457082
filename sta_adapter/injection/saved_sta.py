"""STA in a folder and in a model: what was saved, whether it is what the model has, and its values brought in."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sta_adapter.adapter.format import (
    CONFIG,
    WEIGHTS,
    Description,
    compare_tensors,
    is_lora_alone,
    read_description,
    read_weights,
    require_description,
    require_lora,
    saved_config,
)
from sta_adapter.adapter.hub import download_options, resolve_adapter
from sta_adapter.adapter.lora_options import OURS
from sta_adapter.adapter.lora_weights import LORA_CONFIG, read_lora
from sta_adapter.attention.module import CHILD, TemporalAttention
from sta_adapter.compatibility.module_names import STA_TENSOR, canonical, name_in_state
from sta_adapter.errors import CheckpointError, STAError, STAWarning
from sta_adapter.injection.backbone import active_modules
from sta_adapter.injection.contents import plain_state
from sta_adapter.injection.handle import STAHandle
from sta_adapter.injection.hooks import Hook, find_injections
from sta_adapter.injection.registry import all_backbones
from sta_adapter.injection.target import widen


def describe(folder: Path) -> tuple[Description, Path, Callable[[], dict[str, Tensor]]]:
    """STA's description in a folder, and what holds and reads its tensors: an adapter's files, or those that PEFT itself saved."""
    if is_lora_alone(folder):
        lora = read_lora(folder)
        if lora.sta is not None or lora.holds_sta:
            return require_description(lora.sta or {}, folder / LORA_CONFIG), lora.path, lora.read_sta
    description = read_description(folder)
    require_lora(folder, description)
    return description, folder / WEIGHTS, lambda: read_weights(folder, description)


def folder_with_sta(name: str | os.PathLike[str], options: Mapping[str, Any]) -> Path | None:
    """Where an adapter of ours lies; None for any other, and where it isn't available, of which PEFT says why."""
    try:
        folder = downloaded(name, options)
    except (STAError, OSError, ValueError, TypeError):
        return None
    return folder if has_sta(folder) else None


def downloaded(name: str | os.PathLike[str], options: Mapping[str, Any]) -> Path:
    """The folder of an adapter that PEFT was asked to load; errors as `resolve_adapter`."""
    revision = None if os.path.isdir(name) else options.get("revision")  # PEFT takes one for a folder too
    return resolve_adapter(name, revision, subfolder=options.get("subfolder"), **download_options(options))


def has_sta(folder: Path) -> bool:
    """Whether STA belongs to what lies in a folder: beside LoRA's files, or within, as PEFT itself saves it."""
    try:
        return (folder / CONFIG).is_file() or OURS in json.loads((folder / LORA_CONFIG).read_bytes())
    except (OSError, ValueError, TypeError):
        return False


def require_same_sta(folder: Path, handle: STAHandle) -> None:
    """Refuse to have PEFT load an adapter, of which it takes what fits, into a model with STA of another kind.

    Where its LoRA weights come without STA's, as `sta-adapter export` writes them, it must be the model's.
    """
    description, file, read = describe(folder)
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


@torch.no_grad()
def fill(handle: STAHandle, state: Mapping[str, Tensor], is_trainable: bool) -> None:
    """Give STA's tensors their values; where LoRA is on STA itself, it alone goes on training."""
    for index, module in handle.blocks.items():
        if is_trainable:
            widen(module.parameters())
        own = plain_state(module)
        for name, tensor in own.items():
            tensor.copy_(state[f"blocks.{index}.{name}"])
        if len(own) == len(module.state_dict()):
            module.requires_grad_(is_trainable)


@torch.no_grad()
def fill_copies(model: nn.Module, name: str, state: Mapping[str, Tensor]) -> None:
    """Give STA's tensors in PEFT's copies for one adapter their values."""
    encoder, injection = find_injections(active_modules(model))[0]
    for index, block in enumerate(encoder.get_submodule(injection.spec.blocks).children()):
        copies = getattr(getattr(block, CHILD, None), "modules_to_save", {})
        if name in copies:
            for key, tensor in plain_state(copies[name]).items():
                tensor.copy_(state[f"blocks.{index}.{key}"])


@torch.no_grad()
def silence_originals(modules: Mapping[int, TemporalAttention], handle: STAHandle) -> None:
    """Where PEFT has STA as a copy, the module in the copy's place under `disable_adapter()` adds nothing, as before the training."""
    for index, module in modules.items():
        if handle.blocks[index] is not module:
            for parameter in module.to_out.parameters():
                parameter.zero_()


class LoadStatePreHook(Hook):
    """Hook of `load_state_dict` of the model that STA went into: tensors are found under the names of any release.

    transformers saves a model under the names of an older release, and its trainer loads them with `strict=False`: STA, and what
    of the base was trained along, would stay as it is.
    """

    def __call__(
        self, model: nn.Module, state: dict[str, object], prefix: str, metadata: object, strict: bool, *names: list[str]
    ) -> None:
        """Rename tensors in `state`; those of STA that have no place in the model are an error (the last of `names`).

        Warns:
            STAWarning: tensors of the base have no place and others that train get no value, or STA does not, as the model is a part
                of one whose state has none of its names.
        """
        tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
        own = {prefix + name_in_state(name): tensor.requires_grad for name, tensor in tensors}
        is_plain = all(STA_TENSOR.search(f".{name}") for name in own if f".{CHILD}." in f".{name}")
        if prefix and not state and any(trains for name, trains in own.items() if STA_TENSOR.search(f".{name}")):
            warnings.warn(
                f"nothing of the state that is loaded is of {prefix[:-1]}, in which STA trains, and STA stays as it is. If it lies there under the "
                "names of another release, inject_sta into the full model, whose state is looked through for them.",
                STAWarning,
                stacklevel=5,
            )
            return
        strangers = [key for key in state if key not in own]
        places = {canonical(name.removeprefix(prefix)): name for name in own if strangers and name not in state}
        start = _start_of_part(
            [key.removeprefix(prefix) for key in strangers if STA_TENSOR.search(key)], list(places.values())
        )
        unplaced = []
        for key in strangers:
            short = canonical(key.removeprefix(prefix))
            if short not in places:
                short = canonical((start + key.removeprefix(prefix)).removeprefix(prefix))
            if (place := places.pop(short, None)) is not None:
                state[place] = state.pop(key)
            else:
                unplaced.append(key)
        of_sta = [key for key in unplaced if STA_TENSOR.search(key)]
        if of_sta and is_plain:  # where PEFT has put layers around them, it knows their names
            names[-1].append(f"{len(of_sta)} tensors of STA have no place in the model, the first is {of_sta[0]}")
        left = [name for name, trains in own.items() if trains and name not in state and not STA_TENSOR.search(name)]
        if unplaced and not of_sta and left:
            warnings.warn(
                f"{len(unplaced)} tensors that are loaded have no place in the model, the first is {unplaced[0]}, and {len(left)} of the base that "
                f"train stay as they are, the first is {left[0]}: a run that goes on from here has lost their training.",
                STAWarning,
                stacklevel=5,
            )


def _start_of_part(keys: Sequence[str], places: Sequence[str]) -> str:
    """How the names of a model's part begin, of which a state is that has these tensors of STA; empty where that can't be known.

    Such a model may be saved as the part that it was in an older release.
    """
    starts = {place.removesuffix(key) for key in keys for place in places if place.endswith(f".{key}")}
    return starts.pop() if len(starts) == 1 else ""


def require_weights(name: str | os.PathLike[str], missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Refuse a model that was saved with LoRA in it, and say where it lacks weights: transformers makes those up.

    Args:
        name: of the model.
        missing: names of weights that it has and that were not there.
        unexpected: names of those that had no place in it.
    """
    first = min(missing, default=None)
    if first is None:
        return
    if any(".base_layer." in key for key in unexpected):
        raise CheckpointError(
            f"the weights in {os.fspath(name)} were saved with PEFT's LoRA in the model, under names that no model has ({first} would be random, for "
            "one). Load them by load_state_dict into a base with the same STA and LoRA, and save that by get_sta(model).save_pretrained, or after "
            "peft_model.merge_and_unload()."
        )
    warnings.warn(
        f"not all of the model's weights are in {os.fspath(name)}: {first}, for one, has random values. It is damaged, or was saved by a model of "
        "another class.",
        STAWarning,
        stacklevel=5,
    )


def warn_of_sta(name: str | os.PathLike[str], unexpected: Iterable[str]) -> None:
    """Say that a model was loaded without the STA among its weights: a trainer saved it whole, or it is of the published code.

    Args:
        name: of the model.
        unexpected: names of weights that had no place in it.
    """
    published = {spec.published_names.get("to_qkv") for spec in all_backbones()} - {None}
    for key in sorted(unexpected):
        ours = STA_TENSOR.search(key)
        if not ours and not any(f".{part}." in key for part in published):
            continue
        lies = "it lies beside them" if ours and (Path(name) / CONFIG).is_file() else "handle.save_pretrained wrote it"
        how = f"{lies} (load_sta, --adapter)" if ours else "`sta-adapter convert` makes it"
        warnings.warn(
            f"the weights in {os.fspath(name)} hold STA ({key}, for one), and the model is loaded without it: give its adapter as {how}.",
            STAWarning,
            stacklevel=4,
        )
        return
