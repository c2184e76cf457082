"""Weights of the published STAVEQ2 code as an adapter of ours, and back, bit for bit."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from torch import Tensor

from sta_adapter.adapter.atomic_write import atomic_folder_write
from sta_adapter.adapter.base_model import BaseModel, language_sizes, saved_base
from sta_adapter.adapter.format import (
    CONFIG,
    Description,
    compare_tensors,
    read_description,
    read_weights,
    require_description,
    saved_config,
)
from sta_adapter.adapter.hub import ADAPTER_FILES
from sta_adapter.adapter.safe_read import parse_json
from sta_adapter.adapter.save import make_description, write_adapter
from sta_adapter.attention.module import TemporalAttention
from sta_adapter.config import STAConfig
from sta_adapter.errors import CheckpointError
from sta_adapter.injection.backbone import Backbone
from sta_adapter.injection.registry import all_backbones, get_backbone
from sta_adapter.integrations.staveq2.published import (
    Source,
    match_keys,
    open_source,
    published_keys,
    warn_of_other_settings,
)
from sta_adapter.integrations.staveq2.sizes import branch_facts, encoder_facts, layers_of, require_sizes
from sta_adapter.requirements import require_free

ADAPTER = (*ADAPTER_FILES, "adapter_model.bin", "run.json", "stage1", "stage2")
HEADER = "sta_config"  # our description, in the header of published files that we write
PUBLISHED = "staveq2.safetensors"
Order = Literal["after_spatial", "before_spatial"]


def convert_published(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    order: Order | None = None,
    backbone: str | None = None,
    config: str | os.PathLike[str] | None = None,
    heads: int | None = None,
    overwrite: bool = False,
) -> Description:
    """Turn a checkpoint of the published STAVEQ2 code into an adapter folder.

    Only STA's tensors are read, never the base model's or LoRA's. The weights tell the branch's heads and the layers;
    the encoder's heads come from the configuration. The adapter is marked `token_order="published"` where that code
    adds the branch in another order than the paper (Qwen2-VL), so that it computes what the weights were trained for.

    Args:
        source: a folder with safetensors files (sharded or not, or as PEFT saves them), or one such file.
        out: the adapter's folder.
        order: where the branch stands, which weights don't tell. None: what the file says if `convert_to_published`
            wrote it, else "after_spatial", the paper's choice.
        backbone: its name; None tells it from the tensors' names and the configuration.
        config: the model's `config.json`, when it does not lie beside the weights.
        heads: attention heads of the encoder, when no configuration tells them.
        overwrite: throw away an adapter that is in `out`, with its LoRA and the records of its training.

    Returns:
        The contents of the adapter's `sta_config.json`.

    Raises:
        CheckpointError: files are missing, damaged or pickles, hold no STA, or do not fit the configuration.
        UnknownBackboneError, ConfigError: for a wrong `backbone` or `order`, or `out` holds an adapter.
    """
    require_free(Path(out), ADAPTER, overwrite)
    checkpoint = open_source(os.fspath(source), None if config is None else os.fspath(config))
    known, sizes = _described(checkpoint)
    spec = _backbone(checkpoint, backbone or known.get("backbone"))
    found, unknown = match_keys(spec, checkpoint.files)
    if unknown:
        raise CheckpointError(
            f"{os.fspath(source)} holds tensors below STA's modules that an adapter has no place for: "
            f"{', '.join(unknown[:5])}{' ...' if len(unknown) > 5 else ''}. Merge LoRA weights on STA's layers first."
        )
    read = checkpoint.read(list(found.values()))
    state = {ours: read[key] for ours, key in found.items()}
    facts = sizes or encoder_facts(checkpoint, spec, state, heads)
    settings = _settings(spec, state, facts, known, order)
    encoder = {"width": facts["width"], "depth": facts["depth"], **branch_facts(state, facts)}
    compare_tensors(Path(os.fspath(source)), state, _expected(spec, encoder, settings, state))
    name, positions = checkpoint.config.get("_name_or_path"), known.get("positions")
    named: BaseModel = {
        "id": name if isinstance(name, str) else None,
        "language_model": language_sizes(checkpoint.config),
    }
    base = saved_base(known) if known else named
    made = make_description(spec.name, encoder, settings, base, positions if isinstance(positions, str) else None)
    description: Description = {**made, "converted": True}
    write_adapter(out, state, description)
    for name in ADAPTER[2:]:  # of the adapter before
        left = Path(out) / name
        shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
    return description


def convert_to_published(
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    prefix: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write an adapter's STA weights under the names of the published STAVEQ2 code.

    Args:
        adapter: its folder.
        out: a `.safetensors` file, or a folder, in which the file is called `staveq2.safetensors`.
        prefix: what stands in front of `blocks.0...`; None takes the published one, `visual.` for Qwen2-VL.

        overwrite: replace the file.

    Returns:
        The file. Its header keeps the adapter's settings, so that `convert_published` needs nothing else.

    Raises:
        CheckpointError: the adapter is damaged, its backbone is not in the published code, or `out` can't be written.

    Warns:
        STAWarning: the published code would compute otherwise with these weights.
    """
    from safetensors.torch import save

    folder = Path(adapter)
    description = read_description(folder)
    spec = get_backbone(description["backbone"])
    if not spec.published_names:
        raise CheckpointError(
            f"the published code has no {spec.name!r}; it has {', '.join(s.name for s in _published_backbones()) or 'no backbone'}."
        )
    names = published_keys(spec)
    start = spec.published_prefix if prefix is None else prefix
    tensors = {}
    for key, tensor in read_weights(folder, description).items():
        match = re.fullmatch(r"blocks\.(\d+)\.(.+)", key)
        if match is None or match[2] not in names:
            raise CheckpointError(f"{folder} holds {key!r}, for which the published code has no name.")
        tensors[f"{start}{spec.blocks}.{match[1]}.{names[match[2]]}"] = tensor
    path = Path(out)
    path = path if path.suffix == ".safetensors" else path / PUBLISHED
    require_free(path.parent, [path.name], overwrite)
    warn_of_other_settings(spec, saved_config(description, folder / CONFIG))
    try:
        content = save(tensors, {"format": "pt", HEADER: json.dumps(description)})
        atomic_folder_write(path.parent, {path.name: content})
    except OSError as error:
        raise CheckpointError(f"can't write {path}: {error}") from error
    return path


def _published_backbones() -> list[Backbone]:
    return [spec for spec in all_backbones() if spec.published_names]


def _described(checkpoint: Source) -> tuple[Description, dict[str, int]]:
    """Our own description in the header of a file that `convert_to_published` wrote, and the sizes in it; of other files nothing."""
    if HEADER not in checkpoint.metadata:
        return {}, {}
    try:
        found = require_description(
            parse_json(checkpoint.metadata[HEADER].encode(), checkpoint.folder), checkpoint.folder
        )
        encoder = {k: int(str(found["encoder"][k])) for k in ("width", "depth", "num_heads", "head_dim")}
        require_sizes(encoder, checkpoint.folder)
        return found, encoder
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"the header field {HEADER!r} in {checkpoint.folder} is damaged: {error}") from error


def _backbone(checkpoint: Source, name: str | None) -> Backbone:
    """The backbone whose published names are in the checkpoint."""
    candidates = [get_backbone(name)] if name else _published_backbones()
    fitting = [spec for spec in candidates if _has_branch(spec, checkpoint)]
    if not fitting:
        names = (f"{s.blocks}.0.{list(s.published_names.values())[1]}" for s in candidates if s.published_names)
        shown = ", ".join(dict.fromkeys(names))
        raise CheckpointError(
            f"{checkpoint.folder} holds no tensor of STA under a published name (such as {shown or 'none: ' + str(name)}); "
            f"it has {len(checkpoint.files)} tensors, the first are {', '.join(sorted(checkpoint.files)[:3]) or 'none'}."
        )
    kind = checkpoint.config.get("model_type")
    fitting = [spec for spec in fitting if spec.accepts is None] or fitting  # weights show no further condition
    named = [spec for spec in fitting if spec.name == kind]
    if len(fitting) > 1 and not named:
        raise CheckpointError(
            f"the tensors fit the backbones {', '.join(s.name for s in fitting)}, and the configuration's model_type "
            f"{kind!r} is none of them. Pass backbone=... (--backbone)."
        )
    return (named or fitting)[0]


def _has_branch(spec: Backbone, checkpoint: Source) -> bool:
    return bool(spec.published_names) and any(
        k.endswith("to_qkv.weight") for k in match_keys(spec, checkpoint.files)[0]
    )


def _settings(
    spec: Backbone,
    state: Mapping[str, Tensor],
    facts: Mapping[str, int],
    known: Description,
    order: Order | None,
) -> STAConfig:
    """The configuration that these weights were trained with, as far as it can be known."""
    if known:
        settings = STAConfig.from_dict(known["config"])
        return settings if order is None else dataclasses.replace(settings, order=order)
    layers = layers_of(state)
    branch = branch_facts(state, facts)
    gamma = any(key.endswith(".gamma") for key in state)
    given = STAConfig(
        head_scale=branch["num_heads"] / facts["heads"],
        order="after_spatial" if order is None else order,
        layers="all" if layers == list(range(facts["depth"])) else tuple(layers),
        gamma_init=STAConfig().with_defaults(spec.defaults).gamma_init or 1e-5 if gamma else None,
        token_order="published" if spec.published_token_order else "clip",
    )
    return given.with_defaults(spec.defaults)


def _expected(
    spec: Backbone, encoder: Mapping[str, int], settings: STAConfig, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Keys and shapes, on the meta device, of the modules that these weights must fit."""
    norm = "layernorm" if any(key.endswith("norm.bias") for key in state) else "rmsnorm"
    heads, size = encoder["num_heads"], encoder["head_dim"]
    module = TemporalAttention(
        encoder["width"], heads, size, settings, norm=norm, qkv_bias=spec.qkv_bias, device="meta"
    )
    layers = range(encoder["depth"]) if settings.layers == "all" else settings.layers
    return {f"blocks.{index}.{name}": t for index in layers for name, t in module.state_dict().items()}
