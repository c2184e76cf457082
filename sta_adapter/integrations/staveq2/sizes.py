"""How large an encoder and STA's branch are, from a checkpoint's configuration and the shapes of its weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from sta_adapter._validate import shown
from sta_adapter.adapter.lora_options import MAX_LAYER
from sta_adapter.errors import CheckpointError
from sta_adapter.injection.backbone import Backbone
from sta_adapter.integrations.staveq2.published import Source

HEADS, WIDTH, DEPTH = ("num_heads", "num_attention_heads"), ("embed_dim", "hidden_size"), ("depth", "num_hidden_layers")
SIZE = re.compile(r"layers|depth|heads|experts|blocks")


def encoder_facts(checkpoint: Source, spec: Backbone, state: Mapping[str, Tensor], heads: int | None) -> dict[str, int]:
    """`width`, `depth` and `heads` of the encoder, from the configuration, compared with the weights."""
    require_sizes(checkpoint.config, checkpoint.folder)
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
    require_sizes({"depth": depth, "heads": heads}, checkpoint.folder)
    outside = sorted({i for i in layers_of(state) if i >= depth})
    if outside:
        raise CheckpointError(f"there are STA weights for the blocks {outside}, but the encoder has {depth} blocks.")
    return {"width": width or declared or 0, "depth": depth, "heads": heads}


def branch_facts(state: Mapping[str, Tensor], facts: Mapping[str, int]) -> dict[str, int]:
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


def layers_of(state: Mapping[str, Tensor]) -> list[int]:
    """The blocks that the weights of an adapter are for."""
    return sorted({int(key.split(".")[1]) for key in state})


def require_sizes(values: object, where: Path, name: str = "") -> None:
    """Refuse numbers of layers, heads and the like, anywhere in a configuration, that no model has and lists would be made of."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            require_sizes(value, where, str(key))
    elif isinstance(values, int) and SIZE.search(name) and not 0 <= values <= MAX_LAYER:
        raise CheckpointError(f"{where}: {name} is {shown(values)}, expected at most {MAX_LAYER}.")


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


def _first(section: Mapping[str, object], names: tuple[str, ...]) -> int | None:
    return next((found for n in names if isinstance(found := section.get(n), int)), None)
