"""Fingerprints of what a result depends on: samples with the contents of their clips, a processor, a model as it is in memory."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sta_adapter.compatibility.processors import fingerprint_parts
from sta_adapter.distributed import full_tensor, is_sharded
from sta_adapter.errors import ConfigError
from sta_adapter.injection.hooks import CHILD
from sta_adapter.injection.inject import get_sta

__all__ = [
    "fingerprint",
    "fingerprint_file",
    "fingerprint_model",
    "fingerprint_processor",
    "fingerprint_samples",
    "fingerprint_start",
]

ENDS = 1 << 16  # bytes at the beginning and at the end of a clip's file that stand for it, with its size
THREADS = 8
NAMELESS = ("_name_or_path", "name_or_path", "_commit_hash", "transformers_version")  # don't change what comes out
PEFT_PREFIX = "base_model.model."


def fingerprint(*values: Any) -> str:
    """Of plain values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def fingerprint_samples(asked: Sequence[tuple[list[dict[str, Any]], Any]]) -> list[str]:
    """One for each sample, of its messages whole and of its clips' contents, wherever these lie.

    Args:
        asked: messages, and whatever else a sample's outcome depends on.
    """
    parts = [part for messages, _ in asked for message in messages for part in message["content"]]
    clips = {_place(part): part for part in parts if part["type"] != "text"}
    with ThreadPoolExecutor(THREADS) as pool:
        contents = dict(zip(clips, pool.map(_contents, clips.values()), strict=True))

    def plain(part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] == "text":
            return part
        settings = {key: value for key, value in part.items() if key != "packed"}
        return {**settings, part["type"]: contents[_place(part)]}

    return [
        fingerprint([{**m, "content": [plain(part) for part in m["content"]]} for m in messages], rest)
        for messages, rest in asked
    ]


def _place(part: Mapping[str, Any]) -> tuple[str, str]:
    packed = part.get("packed")
    return str(part[part["type"]]), "in memory" if isinstance(packed, bytes) else str(packed)


def _contents(part: Mapping[str, Any]) -> str:
    """Of a clip's file, of a folder's pictures, or of what lies in a shard."""
    packed = part.get("packed")
    if isinstance(packed, bytes):
        return hashlib.sha256(packed).hexdigest()
    if packed is not None:
        shard, start, size = (getattr(packed, name, None) for name in ("shard", "start", "size"))
        return "missing" if shard is None else fingerprint_file(shard, start or 0, size)
    path = Path(str(part[part["type"]]))
    if path.is_dir():
        return fingerprint([(file.name, fingerprint_file(file)) for file in sorted(path.iterdir()) if file.is_file()])
    return fingerprint_file(path)


def fingerprint_file(path: Path, start: int = 0, size: int | None = None) -> str:
    """Of a file's size, beginning and end, where a container keeps the sizes of all its frames; whole, if it is short."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size if size is None else size
            file.seek(start)
            found = hashlib.sha256(f"{size} ".encode() + file.read(min(size, ENDS)))
            if size > ENDS:
                file.seek(start + max(ENDS, size - ENDS))
                found.update(file.read(min(ENDS, size - ENDS)))
    except (OSError, ValueError):  # not there, or of a name that no file has
        return "missing"
    return found.hexdigest()


def fingerprint_processor(processor: Any) -> str:
    """Of what a processor makes of a conversation: its template, vocabulary and sizes."""
    tokenizer = getattr(processor, "tokenizer", None)
    template = getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items()) if tokenizer else None
    return fingerprint(template, words, [_nameless(part) for part in fingerprint_parts(processor)])


def fingerprint_model(model: nn.Module) -> dict[str, str]:
    """Of a model as it would compute now, in parts: `base`, `sta`, `lora` ("off" where there is none at work), `positions`.

    The base's is the same with and without an adapter on it. Sharded weights are gathered one by one: then all processes must
    call this.

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


def _split(model: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors of the base, by the names that they have in it, and those that PEFT has added."""
    state: dict[str, Any] = model.state_dict(keep_vars=True)
    added = _added_by_peft(model)
    lora = {name: value for name, value in state.items() if name.startswith(added)} if added else {}
    base = {_base_name(name): value for name, value in state.items() if not _is_sta(name) and name not in lora}
    return base, {name: value for name, value in lora.items() if not _is_sta(name)}


def _base(model: nn.Module, base: Mapping[str, Any]) -> str:
    about: list[Any] = [getattr(model, name, None) for name in ("config", "generation_config")]
    return fingerprint([_nameless(part.to_dict()) for part in about if hasattr(part, "to_dict")], _weights(base))


def _sta(model: nn.Module) -> str:
    """Of the STA at work in a model."""
    handle = get_sta(model)
    if handle is None or not handle._injection.is_enabled:
        return "off"
    blocks = {f"{i}.{name}": value for i, block in handle.blocks.items() for name, value in block.state_dict().items()}
    return fingerprint(handle.backbone, handle.config.to_dict(), _weights(blocks))


def _nameless(values: Any) -> Any:
    """A configuration without names of places and versions, at any depth."""
    if isinstance(values, Mapping):
        return {str(key): _nameless(value) for key, value in values.items() if key not in NAMELESS}
    return [_nameless(value) for value in values] if isinstance(values, (list, tuple)) else values


def _weights(state: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and contents of each tensor."""
    tensors = {name: state[name] for name in sorted(state) if isinstance(state[name], Tensor)}
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
    content = value.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(f"{value.dtype} {tuple(value.shape)} ".encode() + content.tobytes()).hexdigest()


def _is_sta(name: str) -> bool:
    return CHILD in name.split(".")


def _base_name(name: str) -> str:
    """What a tensor of the base is called without PEFT."""
    for wrapped in (".base_layer.", ".original_module."):
        name = name.replace(wrapped, ".")
    return name.removeprefix(PEFT_PREFIX)


def _added_by_peft(model: nn.Module) -> tuple[str, ...]:
    """How the names of PEFT's tensors begin."""
    found = []
    for name, module in model.named_modules():
        for child in (*getattr(module, "adapter_layer_names", ()), *getattr(module, "other_param_names", ())):
            found.append(f"{name}.{child}.".removeprefix("."))
        if hasattr(module, "original_module") and hasattr(module, "modules_to_save"):
            found.append(f"{name}.modules_to_save.")
    return tuple(found)


def _lora_at_work(model: nn.Module) -> list[Any]:
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


def _positions(model: nn.Module) -> list[Any]:
    """What tells a language model's positions: rules put into it, VideoRoPE's own setting, and transformers' generation."""
    import transformers

    rules: Iterable[Any] = (
        (name, repr(method.rule))
        for name, module in model.named_modules()
        for method in vars(module).values()
        if hasattr(method, "rule") and not isinstance(method, type)
    )
    published = [str(module.which_rope) for module in model.modules() if hasattr(module, "which_rope")]
    return [transformers.__version__.split(".")[0], *rules, *published]
