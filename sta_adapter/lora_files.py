"""LoRA weights beside an adapter, in PEFT's own format and under its own names; see `checkpoint`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from sta_adapter.errors import CheckpointError, MissingExtraError
from sta_adapter.reading import compare_shapes, read_json, read_tensors, require_plain_pattern
from sta_adapter.sharding import whole

LORA_CONFIG = "adapter_config.json"
LORA_WEIGHTS = "adapter_model.safetensors"
REFUSED = ("megatron_config", "layer_replication")  # imports by name; a change of the depth of the model
EMBEDDINGS = ("embed_tokens.weight", "lm_head.weight", "base_layer.weight")  # saved by PEFT when they were resized
PATTERNS = ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern")


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
        CheckpointError: the files are missing, damaged, ask for more than LoRA, or are for another model; the model is
            as before.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise MissingExtraError(
            f"{folder} holds LoRA weights; they need peft: pip install 'sta-adapter[train]'"
        ) from error
    check_lora_config(folder / LORA_CONFIG)
    shapes = _checked_weights(folder / LORA_WEIGHTS)
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        loaded = PeftModel.from_pretrained(model, str(folder), is_trainable=is_trainable)
        _compare(folder / LORA_WEIGHTS, shapes, loaded)
    except Exception as error:
        _unwrap(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained[name])
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"peft can't load the LoRA weights in {folder}: {error}") from error
    return loaded


def _checked_weights(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes in a file of LoRA weights, of which each tensor is a finite floating-point one."""
    if not path.exists():
        raise CheckpointError(f"{path.parent} holds {LORA_CONFIG} but no {path.name}; pickled weights are never read.")
    state = read_tensors(path)[0]
    return {key: tuple(value.shape) for key, value in state.items()}


def _compare(path: Path, found: Mapping[str, tuple[int, ...]], model: nn.Module) -> None:
    """PEFT only warns of weights that are missing from the file or not in the model."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, save_embedding_layers=False)  # "auto" would ask the Hub
    expected = {key: tuple(value.shape) for key, value in state.items()}
    lora = {key: shape for key, shape in found.items() if key in expected or not key.endswith(EMBEDDINGS)}
    compare_shapes(path, lora, expected)


def check_lora_config(path: Path) -> None:
    """Refuse what PEFT would do beyond LoRA: other methods, imports by name, patterns that never end.

    Raises:
        CheckpointError: as said, or the file is missing or damaged.
    """
    try:
        fields = read_json(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} holds no {path.name}.") from error
    if fields.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type is {str(fields.get('peft_type'))[:80]!r}, expected 'LORA'.")
    asked = [name for name in REFUSED if fields.get(name)]
    if asked:
        raise CheckpointError(
            f"{path} sets {', '.join(asked)}, which load_sta does not load from a file; with an adapter that you trust, "
            "load the LoRA weights with peft yourself."
        )
    for name in PATTERNS:
        value = fields.get(name)
        patterns = [value] if isinstance(value, str) else [] if value is None else value
        if not isinstance(patterns, list | dict) or not all(isinstance(pattern, str) for pattern in patterns):
            raise CheckpointError(f"{path}: {name} is {str(value)[:80]!r}, expected names of modules.")
        for pattern in patterns:
            require_plain_pattern(path, pattern)


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
