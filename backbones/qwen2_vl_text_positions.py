"""Which rule a Qwen2-VL or Qwen2.5-VL numbers its text by, found by asking it, and switching between the rules."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sta_adapter.backbones.qwen2_vl_early_positions import fill_early, fills_early
from sta_adapter.backbones.qwen2_vl_position_hooks import forgets_padding
from sta_adapter.backbones.qwen2_vl_position_rules import RULES, OriginalPositions, Sequential
from sta_adapter.backbones.qwen2_vl_positions import FAMILIES, find_owner, install, installed_rule, uninstall
from sta_adapter.compatibility.calls import parameter_names
from sta_adapter.compatibility.position_seams import ROPE_INDEX
from sta_adapter.compatibility.releases import transformers_release
from sta_adapter.errors import ConfigError
from sta_adapter.injection.backbone import TextPositions, number_of

HEADS = ("Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration")  # they count before 4.52
FRAMES, SECONDS = 4, 1.75  # of the clip that a model is asked about, by which the rules differ
UNKNOWN = "unknown"


def rule_in_use(model: nn.Module) -> str | None:
    """The rule by which a model computes positions now: one of `RULES`, "videorope" or "unknown".

    None where it can't be asked: a tower alone, another family, or the authors' file of VideoRoPE.
    """
    owner = _computing(model)
    if owner is None:
        return None
    if _asks_for_none(owner):
        return (OriginalPositions if fills_early(owner) else Sequential).name
    installed = installed_rule(owner)
    return _native_rule(owner) if installed is None else installed.name


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
    if owner is None or (rule_in_use(model) == name and not forgets_padding(owner)):
        return
    if name is not None and name not in RULES:
        raise ConfigError(f"no rule for text positions {name!r}; expected one of {', '.join(RULES)}.")
    if _asks_for_none(owner) and name in (None, Sequential.name, OriginalPositions.name):
        fill_early(owner, name == OriginalPositions.name)
        return
    if isinstance(installed_rule(owner), OriginalPositions):
        uninstall(model)
    if installed_rule(owner) is None and (name is None or (_native_rule(owner) == name and not forgets_padding(owner))):
        return
    install(model, RULES[name or Sequential.name].of(find_owner(model)))  # refuses VideoRoPE, for all of them


def _computing(model: nn.Module) -> nn.Module | None:
    """The module whose `get_rope_index` counts, or None."""
    for kinds in (FAMILIES, HEADS):
        for module in model.modules():
            known = any(cls.__name__ in kinds for cls in type(module).__mro__) and hasattr(module, ROPE_INDEX)
            if known and hasattr(module.config, "video_token_id"):
                return None if hasattr(module, "get_t_scale_rope_index") else module
    return None


def _asks_for_none(owner: nn.Module) -> bool:
    """Whether this is a Qwen2-VL whose forward doesn't ask `get_rope_index`, so that tokens are numbered one after another."""
    return any(cls.__name__ == HEADS[0] for cls in type(owner).__mro__) and transformers_release() < (4, 49)


def _native_rule(owner: nn.Module) -> str:
    """Which rule the installed transformers has, by what it answers for one clip."""
    with torch.device("cpu"):
        try:
            found = _ask(owner)
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
            return UNKNOWN  # of which inject_sta and load_sta warn, as of every rule that isn't the training's
        text = torch.arange(2).expand(3, -1)
        for name, rule in RULES.items():
            clip, after = rule.of(owner).clip(2, FRAMES, 1, 1, SECONDS)
            if torch.equal(found, torch.cat([text, clip, text + int(after)], dim=1)):
                return name
    return UNKNOWN


def _ask(owner: nn.Module) -> Tensor:
    """The positions (3, tokens) that transformers' own method gives to a clip between two tokens of text each."""
    merge = number_of(getattr(owner.config, "vision_config", None), "spatial_merge_size")
    start, video, end = (number_of(owner.config, f"{x}_token_id") for x in ("vision_start", "video", "vision_end"))
    ids = torch.tensor([[0, start, *[video] * FRAMES, end, 0]])
    known: dict[str, Tensor] = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "video_grid_thw": torch.tensor([[FRAMES, merge, merge]]),
        "second_per_grid_ts": torch.tensor([SECONDS]),
        "mm_token_type_ids": 2 * (ids == video).int(),
    }
    method = getattr(type(owner), ROPE_INDEX)
    names = parameter_names(method, f"{type(owner).__name__}.{ROPE_INDEX}")
    return method(owner, **{name: value for name, value in known.items() if name in names})[0][:, 0]


TEXT_POSITIONS = TextPositions(rule_in_use, rule_of_training, use_rule, lambda m: forgets_padding(_computing(m)))
