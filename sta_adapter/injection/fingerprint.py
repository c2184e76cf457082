"""Fingerprints of a model as it is in memory: base, STA, LoRA and positions."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from sta_adapter.adapter.lora_keys import PREFIX
from sta_adapter.attention.module import CHILD
from sta_adapter.compatibility.releases import transformers_release
from sta_adapter.data.fingerprint import fingerprint, without_names
from sta_adapter.distributed import full_tensor, is_sharded
from sta_adapter.errors import ConfigError
from sta_adapter.injection.handle import get_sta
from sta_adapter.injection.text_positions import rule_in_use

THREADS = 8


def fingerprint_model(model: nn.Module) -> dict[str, str]:
    """Of a model as it would compute now, in parts: `base`, `sta`, `lora` ("off" where there is none at work), `positions`.

    The base's is the same with and without an adapter on it. Sharded weights are gathered one by one: then all
    processes must call this.

    Raises:
        ConfigError: weights are not in memory, so that they can't be known.
    """
    base, lora = _split(model)
    scales = _lora_at_work(model)
    return {
        "base": _base(model, base),
        "sta": _sta(model),
        "lora": fingerprint(_weights(lora), scales) if scales else "off",
        "positions": fingerprint(_positions(model)),
    }


def fingerprint_start(model: nn.Module) -> dict[str, str]:
    """Of what a training begins with: `base` and its positions, and `start`, which is "fresh" for STA and LoRA that add nothing yet.

    Raises:
        ConfigError: as `fingerprint_model`.
    """
    base, lora = _split(model)
    sta = {} if (handle := get_sta(model)) is None else {f"{i}": block.to_out for i, block in handle.blocks.items()}
    ends = [value for name, value in lora.items() if ".lora_B." in name or ".lora_embedding_B." in name]
    ends += [parameter for out in sta.values() for parameter in out.parameters()]
    fresh = not any(bool(full_tensor(value).any()) for value in ends)
    start = "fresh" if fresh else fingerprint(_sta(model), _weights(lora))
    return {"base": fingerprint(_base(model, base), _positions(model)), "start": start}


def _split(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of the base, by the names that they have in it, and those that PEFT has added."""
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    added = _added_by_peft(model)
    lora = {name: value for name, value in state.items() if name.startswith(added)} if added else {}
    base = {_base_name(name): value for name, value in state.items() if not _is_sta(name) and name not in lora}
    return base, {name: value for name, value in lora.items() if not _is_sta(name)}


def _base(model: nn.Module, base: Mapping[str, object]) -> str:
    about: list[object] = [getattr(model, name, None) for name in ("config", "generation_config")]
    return fingerprint([without_names(part.to_dict()) for part in about if hasattr(part, "to_dict")], _weights(base))


def _sta(model: nn.Module) -> str:
    """Of the STA at work in a model."""
    handle = get_sta(model)
    if handle is None or not handle._injection.is_enabled:
        return "off"
    blocks = {f"{i}.{name}": value for i, block in handle.blocks.items() for name, value in block.state_dict().items()}
    return fingerprint(handle.backbone, handle.config.to_dict(), _weights(blocks))


def _weights(state: Mapping[str, object]) -> list[tuple[str, str]]:
    """Name and contents of each tensor."""
    tensors = {name: value for name in sorted(state) if isinstance(value := state[name], Tensor)}
    absent = [name for name, value in tensors.items() if value.is_meta]
    if absent:
        raise ConfigError(
            f"{len(absent)} weights of the model are not in memory (the first is {absent[0]}), so it can't be known whether "
            "results that are kept in files are of this model. Load it without offloading to the disk, or keep none."
        )
    if is_sharded(tensors.values()):  # one at a time, as each is gathered whole
        return [(name, _tensor(full_tensor(value))) for name, value in tensors.items()]
    with ThreadPoolExecutor(THREADS) as pool:
        return list(zip(tensors, pool.map(_tensor, tensors.values()), strict=True))


def _tensor(value: Tensor) -> str:
    if hasattr(value, "__tensor_flatten__"):  # one of several tensors, as torchao quantises weights
        names, how = value.__tensor_flatten__()
        parts = [(name, _tensor(getattr(value, name))) for name in names]
        return fingerprint(type(value).__name__, repr(how), parts)
    content = value.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(f"{value.dtype} {tuple(value.shape)} ".encode() + content.tobytes()).hexdigest()


def _is_sta(name: str) -> bool:
    return CHILD in name.split(".")


def _base_name(name: str) -> str:
    """What a tensor of the base is called without PEFT."""
    for wrapped in (".base_layer.", ".original_module."):
        name = name.replace(wrapped, ".")
    return name.removeprefix(PREFIX)


def _added_by_peft(model: nn.Module) -> tuple[str, ...]:
    """How the names of PEFT's tensors begin."""
    found = []
    for name, module in model.named_modules():
        for child in (*getattr(module, "adapter_layer_names", ()), *getattr(module, "other_param_names", ())):
            found.append(f"{name}.{child}.".removeprefix("."))
        if hasattr(module, "original_module") and hasattr(module, "modules_to_save"):
            found.append(f"{name}.modules_to_save.")
    return tuple(found)


def _lora_at_work(model: nn.Module) -> list[object]:
    """Scales of the LoRA layers that are switched on."""
    return [
        (
            name,
            list(module.active_adapters),
            {key: module.scaling[key] for key in module.active_adapters if key in module.scaling},
        )
        for name, module in model.named_modules()
        if isinstance(getattr(module, "scaling", None), Mapping)
        and hasattr(module, "adapter_layer_names")
        and not module.disable_adapters
    ]


def _positions(model: nn.Module) -> list[object]:
    """What tells a language model's positions: its rule, those put into it, VideoRoPE's own setting, and transformers' generation."""
    rules: Iterable[object] = (
        (name, repr(method.rule))
        for name, module in model.named_modules()
        for method in vars(module).values()
        if hasattr(method, "rule") and not isinstance(method, type)
    )
    published = [str(module.which_rope) for module in model.modules() if hasattr(module, "which_rope")]
    return [transformers_release()[0], rule_in_use(model), *rules, *published]
