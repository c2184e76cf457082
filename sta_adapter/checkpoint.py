"""Adapters on disk: `sta_adapter.safetensors`, `sta_config.json`, and LoRA weights under PEFT's own names beside them.

Public: `save_adapter`, `load_sta`, `adapter_contents`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from sta_adapter.adapter_format import (
    CONFIG,
    WEIGHTS,
    compare_tensors,
    make_description,
    read_description,
    read_weights,
    write_adapter,
)
from sta_adapter.base_model import check_base, describe_base
from sta_adapter.config import STAConfig
from sta_adapter.errors import CheckpointError, ConfigError
from sta_adapter.inject import get_sta, plan_injection
from sta_adapter.lora_files import LORA_CONFIG, load_lora, lora_files
from sta_adapter.sharding import is_sharded, whole, write_once
from sta_adapter.text_positions import rule_in_use, warn_of_other_rule

if TYPE_CHECKING:
    from sta_adapter.handle import STAHandle


def save_adapter(handle: STAHandle, folder: str | os.PathLike[str]) -> None:
    """Write an adapter: every file in full beside its final place, then all are renamed.

    Sharded weights (FSDP2, ZeRO-3) are gathered: then all processes must call this, and process 0 writes.

    Args:
        handle: the injected model's handle.
        folder: made when it does not exist; an adapter in it is replaced.

    Raises:
        CheckpointError: weights are not finite, or the folder can't be written; what was there stays.
    """
    contents = adapter_contents(handle)
    if is_sharded(handle.model.parameters()):
        write_once(lambda: write_adapter(folder, *contents))
    else:
        write_adapter(folder, *contents)


def adapter_contents(handle: STAHandle) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, bytes]]:
    """What `write_adapter` and `adapter_files` take; sharded weights are gathered, which all processes must join."""
    return adapter_state(handle), describe_adapter(handle), lora_files(handle.model)


def adapter_state(handle: STAHandle) -> dict[str, Tensor]:
    """STA's tensors on the CPU under the file's keys, `blocks.{i}.norm.weight` and so on."""
    return {
        f"blocks.{index}.{name}": whole(tensor).detach().to("cpu").contiguous()
        for index, module in handle.blocks.items()
        for name, tensor in module.state_dict(keep_vars=True).items()
    }


def describe_adapter(handle: STAHandle) -> dict[str, Any]:
    """The contents of `sta_config.json`."""
    block = next(iter(handle.blocks.values()))
    encoder = {
        "width": block.to_out.out_features,
        "depth": len(list(handle.encoder.get_submodule(handle._injection.spec.blocks).children())),
        "num_heads": block.num_heads,
        "head_dim": block.head_dim,
    }
    base, positions = describe_base(handle.model), rule_in_use(handle.model)
    return make_description(handle.backbone, encoder, handle.config, base, positions)


def load_sta(
    model: nn.Module,
    folder_or_repo_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    is_trainable: bool = False,
    base_model: str | None = None,
    **hub_options: Any,
) -> STAHandle:
    """Put a saved adapter into a model; LoRA weights in the same folder come back too.

    Args:
        model: the base model that the adapter was trained on, without STA; with LoRA in the adapter it must not be a
            PeftModel yet. `handle.model` is the model to go on with.
        folder_or_repo_id: a folder, or the id of a repository on the Hub.
        revision: branch, tag or commit on the Hub.
        is_trainable: whether to go on training; otherwise nothing of the adapter requires a gradient.
        base_model: "any" takes every model whose vision encoder fits, such as a renamed or fine-tuned copy; by default
            another language model, or another Hub id, is refused (see `sta_adapter.base_model`).
        hub_options: further arguments of `huggingface_hub.snapshot_download`, such as `token` or `cache_dir`.

    Returns:
        The handle of the model.

    Raises:
        CheckpointError: files can't be had, are missing or damaged, or the adapter is for another base model; both are
            named, every difference is listed. The model is as before.
        UnknownBackboneError, ConfigError, InjectionError: as `inject_sta`.

    Warns:
        STAWarning: the model numbers text by another rule than the one that the adapter was trained with.
    """
    from sta_adapter.hub import resolve_adapter

    folder = resolve_adapter(folder_or_repo_id, revision, **hub_options)
    description = read_description(folder)
    _require_lora(folder, description)
    config = _saved_config(folder, description)
    plan = plan_injection(model, config)
    check_base(folder, description, plan, base_model)
    modules = plan.build("meta")  # nothing is initialised that the file replaces
    state = read_weights(folder, description)
    expected = {f"blocks.{i}.{k}": v for i, module in modules.items() for k, v in module.state_dict().items()}
    compare_tensors(folder / WEIGHTS, state, expected)
    plan.allocate(modules)
    for index, module in modules.items():
        module.load_state_dict({k: state[f"blocks.{index}.{k}"] for k in module.state_dict()})
        module.requires_grad_(is_trainable)
    warn_of_other_rule(model, description.get("positions"))
    handle = plan.attach(modules)
    if not (folder / LORA_CONFIG).exists():
        return handle
    try:
        loaded = get_sta(load_lora(model, folder, is_trainable))
    except BaseException:
        handle.remove()
        raise
    if loaded is None:
        raise CheckpointError(f"peft replaced the encoder with a copy while loading {folder}, which is not supported.")
    for index, module in loaded.blocks.items():  # the STA file is the one truth, also for PEFT's copies
        module.load_state_dict({k: state[f"blocks.{index}.{k}"] for k in module.state_dict()})
        module.requires_grad_(is_trainable)
    return loaded


def _require_lora(folder: Path, description: Mapping[str, Any]) -> None:
    """Without this, a copy that misses a file would load, and compute something else."""
    if description.get("lora") is True and not (folder / LORA_CONFIG).exists():
        raise CheckpointError(
            f"the adapter in {folder} was saved with LoRA weights, but {LORA_CONFIG} is missing. Copy or download it "
            f'again; to use STA without its LoRA, write "lora": false into {CONFIG}.'
        )


def _saved_config(folder: Path, description: Mapping[str, Any]) -> STAConfig:
    try:
        return STAConfig.from_dict(description["config"])
    except ConfigError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from error
