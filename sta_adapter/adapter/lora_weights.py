"""LoRA weights beside an adapter, in PEFT's own format and under its own names.

This is the one door through which LoRA weights come in.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from sta_adapter._lazy import importing
from sta_adapter.adapter.lora_keys import PREFIX, LoraFile
from sta_adapter.adapter.lora_options import OURS, LoraOptions, checked_options
from sta_adapter.adapter.lora_peft import (
    adapter_tensors,
    embeddings,
    patterns_at_work,
    peft_config,
    require_findable,
    trained_biases,
)
from sta_adapter.adapter.safe_read import compare_shapes, read_header, read_json, read_tensors
from sta_adapter.attention.module import TemporalAttention
from sta_adapter.compatibility.seams import peft_parts
from sta_adapter.distributed import FLATTENS, execution_device, full_tensor, is_fsdp1
from sta_adapter.errors import CheckpointError

if TYPE_CHECKING:
    from peft import PeftConfig

LoraState = tuple[dict[str, object], dict[str, Tensor]]

LORA_CONFIG = "adapter_config.json"
LORA_WEIGHTS = "adapter_model.safetensors"
# an entry that PEFT doesn't know, so that it warns where it loads LoRA alone
STA_BESIDE = "sta_config.json beside this file"
BASE_VALUES = "_sta_adapter_base_values"  # of a PeftModel: the tensors of the base that its file replaced, with their values before
WRAPPED = (".modules_to_save.", ".original_module.")  # with bias="all" PEFT gives what lies in its wrappers twice


def lora_files(model: nn.Module, lora: LoraState | None) -> dict[str, bytes]:
    """Contents of LoRA's configuration and weights, by file name; nothing when the model has no LoRA.

    Sharded weights are gathered: then all processes must call this. Raises what `weights_file` raises.
    """
    if lora is None:
        return {}
    config, state = lora
    tensors = {key: full_tensor(value).detach().to("cpu").contiguous() for key, value in state.items()}
    fields = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    if any(isinstance(module, TemporalAttention) for module in model.modules()):
        fields[OURS] = STA_BESIDE
    text = json.dumps({**fields, "inference_mode": True}, indent=2, default=str)
    return {LORA_WEIGHTS: weights_file(tensors, "LoRA"), LORA_CONFIG: (text + "\n").encode()}


def weights_file(tensors: dict[str, Tensor], of: str, metadata: Mapping[str, str] | None = None) -> bytes:
    """Contents of a safetensors file of tensors on the CPU, `of` STA or LoRA; a CheckpointError where one is not finite."""
    from safetensors.torch import save

    broken = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise CheckpointError(f"{len(broken)} {of} tensors hold NaN or infinity, the first is {broken[0]}; not saved.")
    return save(tensors, {"format": "pt", **(metadata or {})})


def lora_state(model: nn.Module) -> LoraState | None:
    """LoRA's settings and its tensors under PEFT's names, as they are in the model; None when it has no LoRA.

    Raises:
        CheckpointError: what PEFT has added is not LoRA with options that can be loaded again.
    """
    found = checked_lora(model)
    if found is None:
        return None
    if any(map(is_fsdp1, model.modules())):
        raise CheckpointError(
            f"LoRA can't be saved with an adapter here: {FLATTENS} In a loop of one's own: fully_shard."
        )
    from peft import PeftModel

    name, fields, options = found
    configs: Mapping[str, object] = getattr(model, "peft_config", {})
    if others := sorted(set(configs) - {name}):
        warnings.warn(
            f"of {len(configs)} PEFT adapters in this model {name!r} is saved, which is at work; not saved: {', '.join(others)}.",
            stacklevel=3,
        )
    fields |= {
        "modules_to_save": _saved_whole(model, options) or None,
        **patterns_at_work(model, name, LoraOptions(options)),
    }
    kept = model.state_dict(keep_vars=True)  # the parameters themselves, which know how they are sharded
    state = {**embeddings(model, kept, name), **adapter_tensors(kept, name)}
    state |= trained_biases(kept, options.get("bias", "none"))
    start = "" if isinstance(model, PeftModel) else PREFIX
    return fields, {start + key: value for key, value in state.items() if not any(part in key for part in WRAPPED)}


def require_whole_lora(model: nn.Module) -> None:
    """Refuse LoRA that was put on a part of a model by itself, of which `lora_state` knows nothing, or around other LoRA."""
    whole = getattr(model, "peft_config", None)
    for name, module in model.named_modules():
        own = vars(module).get("peft_config", whole)
        if isinstance(own, Mapping) and own is not whole:
            part = name.removesuffix(".base_model")
            raise CheckpointError(
                f"LoRA was put on {part} by itself, and an adapter holds that of the whole model alone, so that it would be lost. Put it on the whole "
                "model (get_peft_model(handle.model, handle.lora_config(target_modules=...)), with a pattern for the names of that part's layers). To "
                "save STA without it, pass base_changed=True, and save LoRA by PEFT's own save_pretrained."
            )
    if whole is None:
        return
    from peft import PeftModel

    if sum(isinstance(module, PeftModel) for module in model.modules()) > 1:
        raise CheckpointError(
            "get_peft_model was called on a model that has LoRA already, and its weights could not be loaded again. Add a "
            "second adapter by model.add_adapter(name, config), or take the first one out before (unload, or merge_and_unload)."
        )


def _saved_whole(model: nn.Module, options: Mapping[str, object]) -> list[str]:
    """LoRA's `modules_to_save`, but for names of which PEFT found nothing, such as STA that went in later."""
    wrapped = [name for name, module in model.named_modules() if isinstance(module, peft_parts()[1])]
    names = LoraOptions(options).get("modules_to_save", list[str]())
    return [name for name in names if any(map(LoraOptions({"modules_to_save": [name]}).is_saved, wrapped))]


def checked_lora(model: nn.Module) -> tuple[str, dict[str, object], dict[str, object]] | None:
    """The name of a model's LoRA, its settings, and of these the supported ones; None when it has no LoRA.

    What PEFT has added and can't be saved and loaded as LoRA is a CheckpointError.
    """
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, Mapping) or not configs:
        return None
    layers = [module for module in model.modules() if isinstance(module, peft_parts()[0])]
    if not layers:
        prompts = [config for config in configs.values() if getattr(config, "is_prompt_learning", False)]
        for config in prompts:  # which change no layer
            checked_options(config.to_dict(), "the LoRA of this model")
        return None  # merged or unloaded
    names: list[str] = sorted({name for layer in layers for name in layer.active_adapters})
    if len(names) != 1 or names[0] not in configs:
        raise CheckpointError(
            f"{len(names)} of PEFT's adapters are active in this model ({', '.join(names)}), and a file holds one: choose it with "
            "model.set_adapter(...)."
        )
    fields = configs[names[0]].to_dict()
    require_findable(model, layers, fields.get("bias"))
    return names[0], fields, checked_options(fields, "the LoRA of this model")


def read_lora(folder: Path) -> LoraFile:
    """What a folder's LoRA weights are, of which no tensor is read yet.

    Raises:
        CheckpointError: a file is missing or damaged, or asks for more than LoRA as we know it. Nothing but these two
            files is opened, and nothing is ever unpickled.
    """
    config, weights = folder / LORA_CONFIG, folder / LORA_WEIGHTS
    try:
        fields = read_json(config)
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} holds no {config.name}.") from error
    options = LoraOptions.read(fields, config)
    sta = fields.get(OURS)
    try:
        return LoraFile(weights, options, read_header(weights)[0], sta if isinstance(sta, dict) else None)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} holds {LORA_CONFIG} but no {weights.name}; pickled weights are never read."
        ) from error


def load_lora(model: nn.Module, folder: Path, is_trainable: bool) -> nn.Module:
    """A PeftModel around `model` with the folder's LoRA weights.

    Raises:
        MissingExtraError: peft is not installed.
        CheckpointError: the files are missing, damaged, ask for more than LoRA, or are for another model; the model is
            as before.
    """
    with importing(f"{folder} holds LoRA weights; they need peft: pip install 'sta-adapter[train]'"):
        import peft
    file = read_lora(folder)
    if file.holds_sta and not any(isinstance(module, TemporalAttention) for module in model.modules()):
        raise CheckpointError(
            f"{file.path} holds STA beside LoRA, but not STA's settings, as PEFT saved it: put STA with the settings of the training into the model "
            "(inject_sta(model, STAConfig(...))), load the folder with peft.PeftModel.from_pretrained, and save it by handle.save_pretrained. LoRA "
            "of handle.lora_config() keeps the settings."
        )
    if any(isinstance(module, peft_parts()) for module in model.modules()):
        raise CheckpointError(f"the model has LoRA already, so that of {folder} can't be loaded; pass the base model.")
    place = file.place(model)
    state, _ = read_tensors(file.path)
    names = [name for name, _ in model.named_modules()]
    config = peft_config(file.options, is_trainable, place.targets, names, place.renamed)
    with _undone_on_error(model, folder):
        loaded = peft.get_peft_model(model, config)
        _leave_meta(loaded)
        kept = loaded.state_dict(keep_vars=True)
        added = adapter_tensors(kept, "default")
        places = {**kept, **added}
        values = {ours: state[key] for key, ours in place.keys.items()}
        wanted = [key for key in added if ".lora_" in key] + [key for key in values if key in places]
        compare_shapes(
            file.path, {k: tuple(v.shape) for k, v in values.items()}, {k: tuple(places[k].shape) for k in wanted}
        )
        base = {key: (places[key], places[key].detach().clone()) for key in values if key in kept}
        vars(loaded)[BASE_VALUES] = base
        with torch.no_grad():
            for key, value in values.items():
                places[key].copy_(value)
    return cast("nn.Module", loaded if is_trainable else loaded.requires_grad_(False).eval())


@contextlib.contextmanager
def lora_disabled(model: nn.Module) -> Iterator[None]:
    """Within it a model computes what it did before LoRA came in, also where its own biases or embeddings were trained along.

    Raises:
        CheckpointError: LoRA was trained here with biases of the base, whose values before that are not known.
    """
    disable_adapter = getattr(model, "disable_adapter", None)
    if disable_adapter is None:
        yield
        return
    values = vars(model).get(BASE_VALUES)
    configs: Mapping[str, PeftConfig] = getattr(model, "peft_config", {})
    biased = [bias for config in configs.values() if (bias := getattr(config, "bias", "none")) != "none"]
    if biased and values is None:
        raise CheckpointError(
            f"the base isn't available from a model whose biases were trained (bias={biased[0]!r}); load the base anew."
        )
    trained = [(parameter, parameter.detach().clone(), value) for parameter, value in (values or {}).values()]
    with contextlib.ExitStack() as stack:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Careful, disabling adapter layers with bias")
            stack.enter_context(disable_adapter())
        for parameter, now, value in trained:
            stack.callback(parameter.data.copy_, now)
            parameter.data.copy_(value)
        yield


@contextlib.contextmanager
def _undone_on_error(model: nn.Module, folder: Path) -> Iterator[None]:
    """Whatever fails inside, the model is as before, to the bit: the adapter's own start changes nothing of the base."""
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    attributes = set(vars(model))
    try:
        yield
    except Exception as error:
        _unwrap(model)
        for name in set(vars(model)) - attributes:
            delattr(model, name)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained[name])
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"peft can't load the LoRA weights in {folder}: {error}") from error


def _leave_meta(model: nn.Module) -> None:
    """LoRA on a layer whose weights accelerate keeps elsewhere lies where the layer runs; PEFT puts it on the meta device.

    Raises:
        CheckpointError: nobody says where it runs, so that LoRA would have no values.
    """
    for layer in (module for module in model.modules() if isinstance(module, peft_parts()[0])):
        for part in (getattr(layer, name, None) for name in layer.adapter_layer_names):
            if isinstance(part, nn.Module) and any(p.device.type == "meta" for p in part.parameters()):
                device = execution_device(layer)
                if device is None:
                    raise CheckpointError(
                        "the model's weights are on the meta device: load them first, then the adapter."
                    )
                part.to_empty(device=device)


def _unwrap(model: nn.Module) -> None:
    """Put the original modules back in the place of what PEFT has wrapped around them."""
    layer, wrapper = peft_parts()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, layer):
                parent.add_module(name, child.get_base_layer())
            elif isinstance(child, wrapper):
                parent.add_module(name, child.original_module)
