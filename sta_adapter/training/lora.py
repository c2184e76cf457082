"""Stage two's LoRA: which layers get it, and which parameters it adds.

Public: `lora_config`, `recipe_config`, `lora_parameters`, `STALoraConfig`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from sta_adapter.adapter.lora_options import ALL_LINEAR, OURS, LoraOptions, checked_options
from sta_adapter.attention.module import TemporalAttention
from sta_adapter.errors import ConfigError
from sta_adapter.injection.backbone import Backbone, LoRARecipe, locate
from sta_adapter.injection.handle import STAHandle
from sta_adapter.injection.hooks import CHILD
from sta_adapter.training.config import DEFAULTS, TrainingConfig


def lora_config(model: nn.Module, handle: STAHandle | None, config: TrainingConfig) -> LoraConfig:
    """LoRA as the settings say: with STA trained beside it, or, without a handle, the baseline."""
    target = locate(model, None if handle is None else handle._injection.spec)
    recipe = require_recipe(target.backbone)
    targets = list(recipe.target_modules)
    patterns: dict[str, dict[str, int]] = {
        "rank_pattern": dict.fromkeys(recipe.rank_pattern, config.lora_qkv_rank),
        "alpha_pattern": dict.fromkeys(recipe.alpha_pattern, config.lora_qkv_alpha),
    }
    if config.lora_targets == "language":
        patterns = {"rank_pattern": {}, "alpha_pattern": {}}
        encoder = {id(module) for module in target.encoder.modules()}
        targets = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and id(module) not in encoder and _ends(name, recipe.target_modules)
        ]
    fields: dict[str, Any] = {
        "target_modules": targets,
        "r": config.lora_rank,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        **patterns,
    }
    return LoraConfig(bias="none", **fields) if handle is None else handle.lora_config(**fields)


def require_same_lora(model: Any, config: TrainingConfig) -> None:
    """Refuse settings of LoRA that a model which brings its own leaves without effect.

    Args:
        model: a PeftModel.
        config: the settings, of which those count that are not the defaults.

    Raises:
        ConfigError: one is another than that of the model's LoRA.
    """
    found = model.peft_config[model.active_adapter]
    has = {"lora_rank": found.r, "lora_alpha": found.lora_alpha, "lora_dropout": found.lora_dropout}
    for name in ("lora_rank", "lora_alpha", "lora_dropout", "lora_qkv_rank", "lora_qkv_alpha", "lora_targets"):
        asked = getattr(config, name)
        if asked != DEFAULTS[name] and has.get(name) != asked:
            raise ConfigError(
                f"{name} is {asked!r}, but the model has LoRA already ({has.get(name, 'set up when it was made')}), where it "
                "has no effect; leave it out, or start without that adapter."
            )


def require_recipe(backbone: Backbone) -> LoRARecipe:
    """The backbone's recipe.

    Raises:
        ConfigError: it has none.
    """
    if backbone.lora is None:
        raise ConfigError(f"backbone {backbone.name!r} has no LoRA recipe; train stage 1, or add the recipe to it.")
    return backbone.lora


class STALoraConfig(LoraConfig):
    """A `peft.LoraConfig` that knows the STA beside it, so that a folder which PEFT itself saves can be loaded as what it is."""

    sta: Mapping[str, Any] | None = None  # contents of `sta_config.json`

    def to_dict(self) -> dict[str, Any]:
        """As PEFT has it, with the description of STA."""
        return {**super().to_dict(), **({OURS: dict(self.sta)} if self.sta else {})}


def recipe_config(handle: STAHandle, overrides: Mapping[str, Any]) -> LoraConfig:
    """See `STAHandle.lora_config`."""
    from sta_adapter.injection.load import describe_adapter

    recipe = handle._injection.spec.lora
    if recipe is None and "target_modules" not in overrides:
        raise ConfigError(f"backbone {handle.backbone!r} has no LoRA recipe; pass target_modules=[...].")
    fields: dict[str, Any] = {}
    if recipe is not None:
        fields = {"target_modules": list(recipe.target_modules), "r": recipe.r, "lora_alpha": recipe.lora_alpha}
        if "r" not in overrides and "target_modules" not in overrides:
            fields |= {"rank_pattern": dict(recipe.rank_pattern), "alpha_pattern": dict(recipe.alpha_pattern)}
    fields |= {"bias": "none", **overrides}
    known = inspect.signature(LoraConfig).parameters
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise ConfigError(f"LoraConfig has no field {', '.join(unknown)}; known: {', '.join(known)}.")
    if fields.get("target_parameters"):
        raise ConfigError(
            "LoRA's settings sets target_parameters, which PEFT sets by itself where a model has experts."
        )
    options = checked_options({"peft_type": "LORA", **fields}, "LoRA's settings", ConfigError)
    fields["modules_to_save"] = sorted({CHILD, *(fields.get("modules_to_save") or ())})
    if isinstance(fields["target_modules"], str):
        if fields["target_modules"].lower() == ALL_LINEAR:
            fields["target_modules"] = _linear_layers(handle.model)
        elif "exclude_modules" in known:
            fields.setdefault("exclude_modules", rf".*\.{CHILD}(\..*)?")
    _require_linear(handle.model, LoraOptions({**options, **fields}))
    config = STALoraConfig(**fields)
    config.sta = describe_adapter(handle)
    return config


def _require_linear(model: nn.Module, options: LoraOptions) -> None:
    targets = {name: module for name, module in model.named_modules() if options.targets(name)}
    other = next((name for name, module in targets.items() if not isinstance(module, nn.Linear)), None)
    if other is not None:
        kind = type(targets[other]).__name__
        raise ConfigError(f"LoRA's settings: target_modules names {other!r}, a {kind}; expected linear layers.")
    if not targets:
        raise ConfigError("LoRA's settings: target_modules names no module of this model.")


def _linear_layers(model: nn.Module) -> list[str]:
    """Names of the model's linear layers but the output layer, as PEFT's "all-linear" has it, and but STA's own."""
    output_layer: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = output_layer()
    skipped = {
        id(part) for module in model.modules() if isinstance(module, TemporalAttention) for part in module.modules()
    }
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and id(module) not in skipped
    ]


def lora_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """What LoRA has added to a model."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name in module.adapter_layer_names:
                yield from getattr(module, name).parameters()


def _ends(name: str, suffixes: Sequence[str]) -> bool:
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in suffixes)
