"""LoRA weights beside an adapter, in PEFT's own format and under its own names; see `checkpoint`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from sta_adapter.errors import CheckpointError, MissingExtraError
from sta_adapter.sharding import whole

LORA_CONFIG = "adapter_config.json"
LORA_WEIGHTS = "adapter_model.safetensors"


def lora_files(model: nn.Module) -> dict[str, bytes]:
    """Contents of LoRA's configuration and weights, by file name; nothing when the model has no LoRA.

    Sharded weights are gathered: then all processes must call this.

    Args:
        model: a PeftModel, or the model inside of one.
    """
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, Mapping) or not configs:
        return {}
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import save

    name = model.active_adapter if isinstance(model, PeftModel) else next(iter(configs))
    kept = model.state_dict(keep_vars=True)  # the parameters themselves, which know how they are sharded
    state = get_peft_model_state_dict(model, kept, adapter_name=name)
    if not isinstance(model, PeftModel):
        state = {f"base_model.model.{key}": value for key, value in state.items()}
    tensors = {key: whole(value).detach().to("cpu").contiguous() for key, value in state.items()}
    fields = {k: sorted(v) if isinstance(v, set) else v for k, v in configs[name].to_dict().items()}
    text = json.dumps({**fields, "inference_mode": True}, indent=2, default=str)
    return {LORA_WEIGHTS: save(tensors, {"format": "pt"}), LORA_CONFIG: (text + "\n").encode()}


def load_lora(model: nn.Module, folder: Path, is_trainable: bool) -> nn.Module:
    """A PeftModel around `model` with the folder's LoRA weights.

    Raises:
        MissingExtraError: peft is not installed.
        CheckpointError: the files are missing, damaged or for another model; the model is as before.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise MissingExtraError(
            f"{folder} holds LoRA weights; they need peft: pip install 'sta-adapter[train]'"
        ) from error
    if not (folder / LORA_WEIGHTS).exists():
        raise CheckpointError(f"{folder} holds {LORA_CONFIG} but no {LORA_WEIGHTS}; pickled weights are never read.")
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        return PeftModel.from_pretrained(model, str(folder), is_trainable=is_trainable)
    except Exception as error:
        _unwrap(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained[name])
        raise CheckpointError(f"peft can't load the LoRA weights in {folder}: {error}") from error


def _unwrap(model: nn.Module) -> None:
    """Put the original modules back in the place of what PEFT has wrapped around them."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BaseTunerLayer):
                parent.add_module(name, child.get_base_layer())
            elif isinstance(child, ModulesToSaveWrapper):
                parent.add_module(name, child.original_module)
    vars(model).pop("peft_config", None)
