"""Stage two's LoRA as a run's settings have it, and what trains with it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

from peft import LoraConfig, PeftModel
from torch import nn

from sta_adapter.adapter.lora_options import named
from sta_adapter.adapter.lora_peft import trained_biases
from sta_adapter.errors import ConfigError
from sta_adapter.injection.backbone import Backbone
from sta_adapter.injection.handle import STAHandle
from sta_adapter.injection.lora_recipe import recipe_targets, require_recipe
from sta_adapter.injection.registry import locate
from sta_adapter.training.config import DEFAULTS, TrainingConfig


def lora_config(model: nn.Module, handle: STAHandle | None, config: TrainingConfig) -> LoraConfig:
    """LoRA as the settings say: with STA trained beside it, or, without a handle, the baseline."""
    target = locate(model, None if handle is None else handle._injection.spec)
    recipe = require_recipe(target.backbone)
    targets = recipe_targets(recipe, model)
    ranks = dict.fromkeys(recipe.rank_pattern, config.lora_qkv_rank)
    alphas = dict.fromkeys(recipe.alpha_pattern, config.lora_qkv_alpha)
    if config.lora_targets == "language":
        ranks, alphas = {}, {}
        encoder = {id(module) for module in target.encoder.modules()}
        targets = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and id(module) not in encoder and named(targets, name)
        ]
    make: Callable[..., LoraConfig] = partial(LoraConfig, bias="none") if handle is None else handle.lora_config
    return make(
        target_modules=targets,
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        rank_pattern=ranks,
        alpha_pattern=alphas,
    )


def require_effect(backbone: Backbone, config: TrainingConfig) -> None:
    """Refuse a backbone without a recipe, and ranks of `attn.qkv` where the backbone has none of its own."""
    recipe = require_recipe(backbone)
    for name, pattern in (("lora_qkv_rank", recipe.rank_pattern), ("lora_qkv_alpha", recipe.alpha_pattern)):
        if getattr(config, name) != DEFAULTS[name] and not pattern:
            raise ConfigError(
                f"{name} has no effect on backbone {backbone.name!r}, whose vision encoder has no layer with a rank of its "
                "own; leave it out, lora_rank is of all layers."
            )


def require_same_lora(model: PeftModel, config: TrainingConfig) -> None:
    """Refuse settings of LoRA that are other than those of a model which brings its own."""
    found = cast(LoraConfig, model.peft_config[model.active_adapter])
    has = {"lora_rank": found.r, "lora_alpha": found.lora_alpha, "lora_dropout": found.lora_dropout}
    for name in ("lora_rank", "lora_alpha", "lora_dropout", "lora_qkv_rank", "lora_qkv_alpha", "lora_targets"):
        asked = getattr(config, name)
        if asked != DEFAULTS[name] and has.get(name) != asked:
            raise ConfigError(
                f"{name} is {asked!r}, but the model has LoRA already ({has.get(name, 'set up when it was made')}), where it "
                "has no effect; leave it out, or start without that adapter."
            )


def mark_trained(model: PeftModel) -> None:
    """Let train what a model's LoRA says, and nothing else: its layers, modules that it trains whole, and biases of the base."""
    model.requires_grad_(False)
    model.set_adapter(model.active_adapter)
    bias = cast(LoraConfig, model.peft_config[model.active_adapter]).bias
    for name, parameter in trained_biases(dict(model.named_parameters()), bias).items():
        if ".original_module." not in name:
            parameter.requires_grad_(True)
