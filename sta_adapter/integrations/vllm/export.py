"""An adapter in the form that vLLM takes: STA beside LoRA weights of vLLM's form, or beside a base that has them in it."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from sta_adapter.adapter.base_model import MERGED_LORA
from sta_adapter.adapter.format import CONFIG, WEIGHTS, Description, read_description, read_weights, require_lora
from sta_adapter.adapter.hub import ADAPTER_FILES, resolve_adapter
from sta_adapter.adapter.lora_options import LoraOptions
from sta_adapter.adapter.lora_weights import LORA_CONFIG, LORA_WEIGHTS
from sta_adapter.adapter.safe_read import read_json, read_tensors
from sta_adapter.adapter.save import replace_files, write_adapter
from sta_adapter.attention.module import CHILD
from sta_adapter.compatibility.seams import peft_parts
from sta_adapter.errors import CheckpointError
from sta_adapter.injection.contents import adapter_state
from sta_adapter.requirements import require_free

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

BASE, STA = "base", "sta"


def export_adapter(
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    revision: str | None = None,
    overwrite: bool = False,
) -> bool:
    """Write an adapter as vLLM and transformers both take it; LoRA weights without the copies of STA that PEFT keeps.

    Args:
        adapter: its folder, or its id on the Hub.
        out: the folder to write.
        revision: branch, tag or commit of the adapter on the Hub.
        overwrite: replace an adapter that is in `out`.

    Returns:
        Whether there are LoRA weights, which vLLM must be told to serve.

    Raises:
        CheckpointError: no adapter, a damaged one, one with LoRA that vLLM has no place for, or `out` is its own folder.
        ConfigError: `out` holds an adapter.
    """
    from safetensors.torch import save

    folder = _source(adapter, revision, Path(out))
    require_free(Path(out), ADAPTER_FILES, overwrite)
    description = read_description(folder)
    read_weights(folder, description)
    require_lora(folder, description)
    told = {**read_json(folder / CONFIG), **_frames(folder)}
    files = {WEIGHTS: (folder / WEIGHTS).read_bytes(), CONFIG: (json.dumps(told, indent=2) + "\n").encode()}
    has_lora = (folder / LORA_CONFIG).exists()
    if has_lora:
        fields = read_json(folder / LORA_CONFIG)
        saved = LoraOptions.read(fields, folder / LORA_CONFIG).get("modules_to_save", list[str]())
        others = sorted(set(saved) - {CHILD})
        if others:
            raise CheckpointError(
                f"{folder / LORA_CONFIG} trains {', '.join(others)} whole, which vLLM takes from no LoRA: merge the weights "
                "into the base, with --merge-lora BASE."
            )
        tensors = read_tensors(folder / LORA_WEIGHTS)[0]
        if on_sta := [key for key in tensors if f".{CHILD}." in key and ".lora_" in key]:
            raise CheckpointError(
                f"{folder / LORA_WEIGHTS} has LoRA on STA's own layers ({on_sta[0]}, for one), for which vLLM has no place: merge "
                "the weights into the base and STA, with --merge-lora BASE."
            )
        kept = {key: value.contiguous() for key, value in tensors.items() if f".{CHILD}." not in key}
        files[LORA_WEIGHTS] = save(kept, {"format": "pt"})
        files[LORA_CONFIG] = (json.dumps({**fields, "modules_to_save": None}, indent=2) + "\n").encode()
    replace_files(out, files)
    return has_lora


def export_merged(
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    base: str,
    *,
    base_model: str | None = None,
    adapter_revision: str | None = None,
    overwrite: bool = False,
    **options: Any,
) -> None:
    """Write the base with the adapter's LoRA weights in it (`base`), and STA alone beside it (`sta`).

    Both carry the digest of the LoRA weights, without which neither is taken for the other's.

    Args:
        adapter: its folder, or its id on the Hub.
        out: the folder to write.
        base: the base's folder, or its id on the Hub.
        base_model: as for `load_sta`.
        adapter_revision: branch, tag or commit of the adapter on the Hub.
        overwrite: replace what is in these two folders.
        options: further arguments of `load_model`, such as the base's `revision`.

    Raises:
        CheckpointError: no adapter, one without LoRA weights or for another base, or it or the base lies where would be written.
        ConfigError: `out` holds one of the two folders.
    """
    from sta_adapter.injection.handle import get_sta
    from sta_adapter.injection.load import load_sta
    from sta_adapter.injection.text_positions import use_positions_of
    from sta_adapter.loading import load_model, load_processor

    out = Path(out)
    folder = _source(adapter, adapter_revision, out, out / STA)
    _require_other(base, out / BASE)
    require_free(out, (BASE, STA), overwrite)
    description = read_description(folder)
    if not (folder / LORA_CONFIG).exists():
        raise CheckpointError(f"{folder} holds no LoRA weights ({LORA_CONFIG}), so there is nothing to merge.")
    digest = lora_digest(folder)
    state = read_weights(folder, description)
    source = {key: options[key] for key in ("revision", "trust_remote_code") if key in options}
    processor = load_processor(base, **source)
    model = use_positions_of(load_model(base, **options), None, description.get("positions"))
    peft_model = cast("PeftModel", load_sta(model, folder, base_model=base_model).model)
    _untie(cast("PreTrainedModel", peft_model.get_base_model()))
    merged = peft_model.merge_and_unload()
    handle = get_sta(merged)
    if handle is not None:
        found = adapter_state(handle)  # other numbers where LoRA was on STA itself
        state |= {key: value for key, value in found.items() if not torch.equal(value, state[key].to(value.dtype))}
        handle.remove()
    setattr(merged.config, MERGED_LORA, digest)
    merged.save_pretrained(out / BASE)
    processor.save_pretrained(out / BASE)
    write_adapter(out / STA, state, {**description, **_frames(folder), MERGED_LORA: digest})


def _frames(folder: Path) -> Description:
    """How the adapter's run sampled its clips, which in the run's own folder a file of its own says."""
    from sta_adapter.loading import saved_frame_settings

    found = saved_frame_settings(folder)
    return {"frames": found} if found else {}


def lora_digest(folder: Path) -> str:
    """Of an adapter's LoRA weights and their settings."""
    return hashlib.sha256((folder / LORA_CONFIG).read_bytes() + (folder / LORA_WEIGHTS).read_bytes()).hexdigest()[:16]


def _source(adapter: str | os.PathLike[str], revision: str | None, *targets: Path) -> Path:
    folder = resolve_adapter(adapter, revision)
    for target in targets:
        _require_other(folder, target)
    return folder


def _require_other(source: str | os.PathLike[str], target: Path) -> None:
    """Refuse to write where what is read lies, whatever may be overwritten."""
    if Path(source).resolve() == target.resolve():
        raise CheckpointError(f"{os.fspath(target)!r} would be written, and is read as well; write to another folder.")


def _untie(model: PreTrainedModel) -> None:
    """Give the output layer weights of its own where it shares the embeddings', and PEFT changes one of the two."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if not any(isinstance(end, peft_parts()) for end in ends):
        return
    inner, outer = (getattr(e, "base_layer", getattr(e, "original_module", e)) for e in ends)
    if inner.weight is outer.weight:
        outer.weight = nn.Parameter(cast("torch.Tensor", outer.weight).detach().clone())
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
