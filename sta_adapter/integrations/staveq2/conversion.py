"""Weights of the published STAVEQ2 code as an adapter of ours, and back, bit for bit."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypedDict

from torch import Tensor

from sta_adapter.adapter.atomic_write import atomic_folder_write
from sta_adapter.adapter.base_model import BaseModel, language_sizes, saved_base
from sta_adapter.adapter.format import (
    CONFIG,
    WEIGHTS,
    Description,
    compare_tensors,
    read_description,
    read_weights,
    require_description,
    saved_config,
)
from sta_adapter.adapter.lora_options import MAX_LAYER
from sta_adapter.adapter.lora_weights import LORA_CONFIG, LORA_WEIGHTS
from sta_adapter.adapter.safe_read import parse_json, shown
from sta_adapter.adapter.save import make_description, write_adapter
from sta_adapter.attention.module import TemporalAttention
from sta_adapter.config import STAConfig
from sta_adapter.errors import CheckpointError
from sta_adapter.injection.backbone import Backbone
from sta_adapter.injection.registry import get_backbone, list_backbones
from sta_adapter.integrations.staveq2.published import (
    Source,
    match_keys,
    open_source,
    published_keys,
    warn_of_other_settings,
)
from sta_adapter.requirements import require_free

ADAPTER = (WEIGHTS, CONFIG, LORA_CONFIG, LORA_WEIGHTS, "adapter_model.bin", "run.json", "stage1", "stage2")
HEADER = "sta_config"  # our description, in the header of published files that we write
PUBLISHED = "staveq2.safetensors"
HEADS, WIDTH, DEPTH = ("num_heads", "num_attention_heads"), ("embed_dim", "hidden_size"), ("depth", "num_hidden_layers")
SIZE = re.compile(r"layers|depth|heads|experts|blocks")
Order = Literal["after_spatial", "before_spatial"]


class Described(TypedDict):
    """What a file says that `convert_to_published` wrote."""

    backbone: str
    encoder: dict[str, int]
    config: Mapping[str, object]
    base: BaseModel
    positions: str | None


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
    known = _described(checkpoint)
    spec = _backbone(checkpoint, backbone or (known["backbone"] if known else None))
    found, unknown = match_keys(spec, checkpoint.files)
    if unknown:
        raise CheckpointError(
            f"{os.fspath(source)} holds tensors below STA's modules that an adapter has no place for: "
            f"{', '.join(unknown[:5])}{' ...' if len(unknown) > 5 else ''}. Merge LoRA weights on STA's layers first."
        )
    read = checkpoint.read(list(found.values()))
    state = {ours: read[key] for ours, key in found.items()}
    facts = known["encoder"] if known else _encoder_facts(checkpoint, spec, state, heads)
    settings = _settings(spec, state, facts, known, order)
    encoder = {"width": facts["width"], "depth": facts["depth"], **_branch_facts(state, facts)}
    compare_tensors(Path(os.fspath(source)), state, _expected(spec, encoder, settings, state))
    name, positions = checkpoint.config.get("_name_or_path"), known["positions"] if known else None
    base: BaseModel = {
        "id": name if isinstance(name, str) else None,
        "language_model": language_sizes(checkpoint.config),
    }
    made = make_description(spec.name, encoder, settings, known["base"] if known else base, positions)
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
            f"the published code has no {spec.name!r}; it has {', '.join(_published_backbones()) or 'no backbone'}."
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


def _published_backbones() -> list[str]:
    return [name for name in list_backbones() if get_backbone(name).published_names]


def _described(checkpoint: Source) -> Described | None:
    """Our own description in the header of a file that `convert_to_published` wrote."""
    if HEADER not in checkpoint.metadata:
        return None
    try:
        found = require_description(
            parse_json(checkpoint.metadata[HEADER].encode(), checkpoint.folder), checkpoint.folder
        )
        encoder = {k: int(str(found["encoder"][k])) for k in ("width", "depth", "num_heads", "head_dim")}
        _require_sizes(encoder, checkpoint.folder)
        positions = found.get("positions")
        return {
            "backbone": found["backbone"],
            "encoder": encoder,
            "config": found["config"],
            "base": saved_base(found),
            "positions": positions if isinstance(positions, str) else None,
        }
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"the header field {HEADER!r} in {checkpoint.folder} is damaged: {error}") from error


def _backbone(checkpoint: Source, name: str | None) -> Backbone:
    """The backbone whose published names are in the checkpoint."""
    candidates = [get_backbone(n) for n in ([name] if name else _published_backbones())]
    fitting = [spec for spec in candidates if _has_branch(spec, checkpoint)]
    if not fitting:
        shown = ", ".join(
            f"{s.blocks}.0.{list(s.published_names.values())[1]}" for s in candidates if s.published_names
        )
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


def _encoder_facts(
    checkpoint: Source, spec: Backbone, state: Mapping[str, Tensor], heads: int | None
) -> dict[str, int]:
    """`width`, `depth` and `heads` of the encoder, from the configuration, compared with the weights."""
    _require_sizes(checkpoint.config, checkpoint.folder)
    section = _vision_section(checkpoint.config)
    width = next((len(t) for key, t in state.items() if key.endswith("to_out.weight")), 0)
    declared = _first(section, WIDTH)
    if width and declared is not None and declared != width:
        raise CheckpointError(f"STA's weights are {width} wide, but the configuration's encoder is {declared} wide.")
    heads = heads or _first(section, HEADS)
    if heads is None:
        where = "has no vision_config with num_heads" if checkpoint.config else "is missing"
        raise CheckpointError(
            f"the heads of the encoder can't be known: {checkpoint.folder / 'config.json'} {where}. Pass the base model's "
            "config.json with config=... (--config), or heads=... (--heads)."
        )
    layers = [int(m[1]) for key in checkpoint.files if (m := re.search(rf"(?:^|\.){spec.blocks}\.(\d{{1,6}})\.", key))]
    depth = _first(section, DEPTH) or max(layers) + 1
    _require_sizes({"depth": depth, "heads": heads}, checkpoint.folder)
    outside = sorted({i for i in _layers(state) if i >= depth})
    if outside:
        raise CheckpointError(f"there are STA weights for the blocks {outside}, but the encoder has {depth} blocks.")
    return {"width": width or declared or 0, "depth": depth, "heads": heads}


def _vision_section(config: Mapping[str, object]) -> Mapping[str, object]:
    """The part of a model's configuration that describes the encoder, with the defaults that files leave out."""
    kind = config.get("model_type")
    if isinstance(kind, str) and isinstance(config.get("vision_config"), Mapping):
        from transformers import CONFIG_MAPPING

        if kind in CONFIG_MAPPING:
            try:
                return CONFIG_MAPPING[kind].from_dict(dict(config)).vision_config.to_dict()
            except Exception as error:  # of kinds that are transformers' and the Hub's own
                raise CheckpointError(f"the configuration is none of a {kind}: {error}") from error
    inner = config.get("model_config")
    places = [config.get("vision_config"), config.get("vision_encoder")]
    places += [inner.get("vision_encoder")] if isinstance(inner, Mapping) else []
    return next((p for p in (*places, config) if isinstance(p, Mapping) and _first(p, HEADS)), {})


def _require_sizes(values: object, where: Path, name: str = "") -> None:
    """Refuse numbers of layers, heads and the like, anywhere in a configuration, that no model has and lists would be made of."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            _require_sizes(value, where, str(key))
    elif isinstance(values, int) and SIZE.search(name) and not 0 <= values <= MAX_LAYER:
        raise CheckpointError(f"{where}: {name} is {shown(values)}, expected at most {MAX_LAYER}.")


def _first(section: Mapping[str, object], names: tuple[str, ...]) -> int | None:
    return next((found for n in names if isinstance(found := section.get(n), int)), None)


def _layers(state: Mapping[str, Tensor]) -> list[int]:
    return sorted({int(key.split(".")[1]) for key in state})


def _branch_facts(state: Mapping[str, Tensor], facts: Mapping[str, int]) -> dict[str, int]:
    """`num_heads` and `head_dim` of the branch, from its projection: rows = 3 * num_heads * head_dim."""
    if "head_dim" in facts:
        return {"num_heads": facts["num_heads"], "head_dim": facts["head_dim"]}
    width, heads = facts["width"], facts["heads"]
    rows = next((len(t) for key, t in state.items() if key.endswith("to_qkv.weight")), 0)
    if heads < 1 or width % heads or not rows or rows % (3 * (width // heads)):
        raise CheckpointError(
            f"STA's projection has {rows} rows; expected 3 * heads * head size, where the encoder's {heads} heads on a "
            f"width of {width} give a head size of {width / max(heads, 1):g}. Is it the configuration of this model?"
        )
    return {"num_heads": rows // 3 // (width // heads), "head_dim": width // heads}


def _settings(
    spec: Backbone,
    state: Mapping[str, Tensor],
    facts: Mapping[str, int],
    known: Described | None,
    order: Order | None,
) -> STAConfig:
    """The configuration that these weights were trained with, as far as it can be known."""
    if known:
        settings = STAConfig.from_dict(known["config"])
        return settings if order is None else dataclasses.replace(settings, order=order)
    layers = _layers(state)
    branch = _branch_facts(state, facts)
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
