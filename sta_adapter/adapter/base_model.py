"""Which base model an adapter was trained on, and whether a model is that one.

What counts as the same model:

- the vision encoder must have the same backbone, width, depth and heads, or the weights do not fit;
- the language model must have the same sizes, where both sides know them: Qwen2-VL-2B and 7B share one vision encoder;
- two different Hub ids are two models. A folder or a model made without a name is taken as it is, since a folder may
  hold anything under any name; so is the name that stood in a converted checkpoint, which is unverified.

`base_model="any"` waives the second and third, for a renamed or fine-tuned copy. Whether the base is also as it was when
STA went in, `sta_adapter.adapter.base_marks` tells.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final, TypedDict

from torch import nn

from sta_adapter.adapter.format import Description
from sta_adapter.errors import CheckpointError, ConfigError

ANY = "any"
# digest of the LoRA weights in a base, in its configuration and in the STA beside it
MERGED_LORA: Final = "sta_merged_lora"
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads")
LANGUAGE_PARTS = ("text_config", "llm_config", "language_config")
VISION_MARKS = ("vision_config", "mm_vision_tower")  # a flat configuration with one of these is a language model's too
CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)[/\\]snapshots[/\\]([0-9a-f]{40})[/\\]?$")


class BaseModel(TypedDict, total=False):
    """What an adapter keeps about its base model; each may be None."""

    id: str | None
    revision: str | None
    language_model: Mapping[str, object] | None


def describe_base(model: nn.Module) -> BaseModel:
    """What an adapter keeps about its base model: `id`, `revision`, and the language model's sizes or None."""
    config = getattr(model, "config", None)
    name, revision = getattr(config, "_name_or_path", None) or None, getattr(config, "_commit_hash", None)
    name = None if name is None else os.fspath(name)
    cached = CACHED.search(name or "")
    if cached:
        name, revision = f"{cached[1]}/{cached[2]}", cached[3]
    elif is_hub_id(name) and os.path.isdir(str(name)):
        name = f"./{name}"  # a folder whose relative path looks like an id
    return {"id": name, "revision": revision, "language_model": language_sizes(config)}


def is_hub_id(name: str | None) -> bool:
    """Whether a name has the form of a Hub id, `user/name`, and not of a path."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name or "") is not None


def check_base(
    folder: Path, description: Description, model: nn.Module, encoder: Mapping[str, object], base_model: str | None
) -> None:
    """Refuse a model that is not the one the adapter was trained on; both are named.

    Args:
        folder: the adapter's.
        description: contents of its `sta_config.json`.
        model: the model at hand.
        encoder: of its vision encoder, `backbone`, `width`, `depth`, and the branch's `num_heads` and `head_dim`.
        base_model: None, or "any" to take every model whose encoder fits; another is a ConfigError.
    """
    if base_model not in (None, ANY):
        raise ConfigError(f"base_model is {base_model!r}, expected {ANY!r} to take any model that fits, or None.")
    saved = saved_base(description)
    here = describe_base(model)
    both = f"It was trained on {_named(saved['id'])}; the model is {_named(here['id'])}."
    differences = _different({**description["encoder"], "backbone": description["backbone"]}, encoder)
    if differences:
        raise CheckpointError(f"the adapter in {folder} is for another encoder: {differences}. {both}")
    if base_model == ANY:
        return
    _check_merged(folder, description, model)
    differences = _different(saved["language_model"] or {}, here["language_model"] or {}, both_known=True)
    override = f"pass base_model={ANY!r} (--any-base of train, evaluate, visualize, app, watch, serve and export)."
    if differences:
        raise CheckpointError(
            f"the adapter in {folder} is for another language model: {differences}. {both} If it fits anyway, {override}"
        )
    if here["id"] is not None and _lies_in(folder, here["id"]):  # it was saved beside this very model
        return
    if description.get("base_changed") is True and here["id"] is not None and saved["id"] == here["id"]:
        raise CheckpointError(
            f"the adapter in {folder} was saved of {_named(here['id'])} after that was changed in memory (trained, pruned, or LoRA merged into it), and "
            f"this is the base as it was. Load it into the changed model; if this is that, {override}"
        )
    ids = {name.lower() for name in (saved["id"], here["id"]) if name is not None and is_hub_id(name)}
    if len(ids) > 1 and description.get("converted") is not True:
        raise CheckpointError(
            f"the adapter in {folder} is for another base model. {both} If that is a copy or a close relative of it, {override}"
        )


def _lies_in(folder: Path, base: str) -> bool:
    """Whether an adapter lies in a base's own folder, or its repository on the Hub."""
    cached = CACHED.search(os.fspath(folder))
    if cached:
        return f"{cached[1]}/{cached[2]}".lower() == base.lower()
    return os.path.isdir(base) and os.path.samefile(base, folder)


def _check_merged(folder: Path, description: Description, model: nn.Module) -> None:
    """STA that was trained beside LoRA weights is right only with these, also when they are merged into the base."""
    wanted = description.get(MERGED_LORA)
    found = _get(getattr(model, "config", None), MERGED_LORA)
    if wanted and wanted != found:
        raise CheckpointError(
            f"the STA in {folder} was trained beside LoRA weights (digest {wanted}) that were merged into a base, and this "
            f"model has {f'those of digest {found}' if found else 'none'}. Use the base that `sta-adapter export` wrote with it."
        )
    if found and not wanted:
        raise CheckpointError(
            f"the model has LoRA weights of another adapter merged into it (digest {found}), and the one in {folder} was "
            "trained without. Use the original base."
        )


def saved_base(description: Description) -> BaseModel:
    """What an adapter says of its base; files from elsewhere may say less, or nonsense."""
    base = description.get("base_model")
    name, revision = (base.get("id"), base.get("revision")) if isinstance(base, Mapping) else (None, None)
    sizes = description.get("language_model")
    return {
        "id": name if isinstance(name, str) else None,
        "revision": revision if isinstance(revision, str) else None,
        "language_model": dict(sizes) if isinstance(sizes, Mapping) else None,
    }


def _different(saved: Mapping[str, object], here: Mapping[str, object], *, both_known: bool = False) -> str:
    return "; ".join(
        f"{name}: {saved.get(name)!r} in the adapter, {value!r} in the model"
        for name, value in here.items()
        if saved.get(name) != value and not (both_known and None in (value, saved.get(name)))
    )


def _named(name: str | None) -> str:
    return repr(name) if name else "a model without a name"


def language_sizes(config: object) -> dict[str, int | None] | None:
    """Sizes of the language model that a configuration describes; None where it describes none."""
    parts = [part for name in LANGUAGE_PARTS if (part := _get(config, name)) is not None]
    if not parts and any(_get(config, mark) is not None for mark in VISION_MARKS):
        parts = [config]
    found = {name: _get(parts[0], name) for name in SIZES} if parts else {}
    sizes = {name: size if isinstance(size, int) else None for name, size in found.items()}
    return sizes if any(sizes.values()) else None


def _get(config: object, name: str) -> object:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
