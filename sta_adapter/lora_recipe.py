"""Stage two's LoRA: which layers get it, and which parameters it adds.

Public: `lora_config`, `lora_parameters`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from sta_adapter.backbone import locate
from sta_adapter.errors import ConfigError
from sta_adapter.handle import STAHandle
from sta_adapter.training_config import TrainingConfig


def lora_config(model: nn.Module, handle: STAHandle | None, config: TrainingConfig) -> LoraConfig:
    """LoRA as the settings say: with STA trained beside it, or, without a handle, the baseline."""
    site = locate(model, None if handle is None else handle.backbone)
    recipe = site.backbone.lora
    if recipe is None:
        raise ConfigError(
            f"backbone {site.backbone.name!r} has no LoRA recipe; train stage 1, or add the recipe to it."
        )
    targets = list(recipe.target_modules)
    patterns: dict[str, dict[str, int]] = {
        "rank_pattern": dict.fromkeys(recipe.rank_pattern, config.lora_qkv_rank),
        "alpha_pattern": dict.fromkeys(recipe.alpha_pattern, config.lora_qkv_alpha),
    }
    if config.lora_targets == "language":
        patterns = {"rank_pattern": {}, "alpha_pattern": {}}
        encoder = {id(module) for module in site.encoder.modules()}
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


def lora_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """What LoRA has added to a model."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name in module.adapter_layer_names:
                yield from getattr(module, name).parameters()


def _ends(name: str, suffixes: Sequence[str]) -> bool:
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in suffixes)
