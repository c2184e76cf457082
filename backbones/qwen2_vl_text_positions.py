"""Which rule a Qwen2-VL or Qwen2.5-VL numbers its text by, and switching between the rules."""

from __future__ import annotations

from torch import nn

from sta_adapter.backbones.qwen2_vl_early_positions import asks_for_none, fill_early, fills_early
from sta_adapter.backbones.qwen2_vl_native_positions import RULES, native_rule
from sta_adapter.backbones.qwen2_vl_position_rules import OriginalPositions, Sequential, tokens_per_second
from sta_adapter.backbones.qwen2_vl_positions import FAMILIES, find_owner, install, installed_rule, uninstall
from sta_adapter.compatibility.position_seams import ROPE_INDEX
from sta_adapter.errors import ConfigError
from sta_adapter.injection.backbone import TextPositions

# before transformers 4.52, the head computes positions itself
HEADS = ("Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration")


def rule_in_use(model: nn.Module) -> str | None:
    """The rule by which a model computes positions now: one of `RULES`, "videorope" or "unknown".

    None where it can't be asked: a tower alone, another family, or the authors' file of VideoRoPE.
    """
    owner = _computing(model)
    if owner is None:
        return None
    if asks_for_none(owner):
        return (OriginalPositions if fills_early(owner) else Sequential).name
    installed = installed_rule(owner)
    return native_rule(owner) if installed is None else installed.name


def rule_of_training(model: nn.Module) -> str | None:
    """The rule that a base was trained by: what its configuration says under `text_positions`, else the family's own.

    Raises:
        ConfigError: the configuration names a rule that is not known.
    """
    owner = _computing(model)
    if owner is None:
        return None
    installed = installed_rule(owner)
    if installed is not None and installed.name not in RULES:
        return installed.name
    name = getattr(owner.config, "text_positions", None) or OriginalPositions.name
    if name not in RULES:
        raise ConfigError(f"the model's config.json says text_positions: {name!r}; expected one of {', '.join(RULES)}.")
    return name


def use_rule(model: nn.Module, name: str | None) -> None:
    """Let a model compute by one of `RULES`, None for the installed transformers'; raises as `use_positions` does."""
    owner = _computing(model)
    if owner is None or rule_in_use(model) == name:
        return
    if name is not None and name not in RULES:
        raise ConfigError(f"no rule for text positions {name!r}; expected one of {', '.join(RULES)}.")
    if asks_for_none(owner) and name in (None, Sequential.name, OriginalPositions.name):
        fill_early(owner, name == OriginalPositions.name)
        return
    if isinstance(installed_rule(owner), OriginalPositions):
        uninstall(model)
    if name is not None and (installed_rule(owner) is not None or native_rule(owner) != name):
        install(model, RULES[name](tokens_per_second(find_owner(model))))


def _computing(model: nn.Module) -> nn.Module | None:
    """The module whose `get_rope_index` counts, or None."""
    for kinds in (FAMILIES, HEADS):
        for module in model.modules():
            known = any(cls.__name__ in kinds for cls in type(module).__mro__) and hasattr(module, ROPE_INDEX)
            if known and hasattr(module.config, "video_token_id"):
                return None if hasattr(module, "get_t_scale_rope_index") else module
    return None


TEXT_POSITIONS = TextPositions(in_use=rule_in_use, of_training=rule_of_training, use=use_rule)
