"""The rule that a model numbers text beside clips by: which it was trained with, which it computes, and switching.

Releases of transformers differ in it for Qwen2-VL and Qwen2.5-VL (docs/compatibility.md has the table), and an adapter
is right only under the rule that it was trained with. Backbones declare how (`Backbone.text_positions`).
"""

from __future__ import annotations

import sys
import warnings

from torch import nn

from sta_adapter.errors import ConfigError, InjectionError, STAWarning
from sta_adapter.injection.backbone import TextPositions
from sta_adapter.injection.registry import all_backbones

TRAINED, TRANSFORMERS = "trained", "transformers"
CHOICES = (TRAINED, TRANSFORMERS)


def rule_in_use(model: nn.Module) -> str | None:
    """The name of the rule that a model computes now; None where there is one rule only, or no language model."""
    found = _family(model)
    return None if found is None else found[1]


def use_positions(model: nn.Module, rule: str = TRAINED) -> nn.Module:
    """Let a model number its text by a rule; nothing happens to models that have one rule only.

    Args:
        model: a full model, with STA or without.
        rule: "trained" (what the base was trained with), "transformers" (what the installed release has), or a rule's
            name, as an adapter's `sta_config.json` says it under `positions`.

    Returns:
        The same model, changed.

    Raises:
        InjectionError: this release of transformers can't be given a rule, or the model is VideoRoPE.
        ConfigError: the rule is not known.
    """
    if not isinstance(rule, str):
        raise ConfigError(f"rule is {rule!r}; expected {' or '.join(map(repr, CHOICES))}, or a rule's name.")
    found = _family(model)
    if found is not None:
        rules, _ = found
        rules.use(model, {TRAINED: rules.of_training(model), TRANSFORMERS: None}.get(rule, rule))
    return model


def use_positions_of(model: nn.Module, choice: str | None, saved: object = None) -> nn.Module:
    """`use_positions` for a command: its choice, else the rule that its adapter was trained with, else the base's.

    Without a choice, a release that can't be given a rule is no error: `warn_of_other_rule` tells of it later.

    Raises:
        InjectionError, ConfigError: as `use_positions`.
    """
    if choice is not None:
        return use_positions(model, choice)
    try:
        return use_positions(model, saved if isinstance(saved, str) else TRAINED)
    except InjectionError:
        return model


def warn_of_other_rule(model: nn.Module, saved: object = None) -> None:
    """Warn where a model computes another rule than it was trained with, or its adapter has `saved`; or generates by another one."""
    family = _family(model)
    if family is None:
        return
    rules, computed = family
    expected = saved if isinstance(saved, str) else rules.of_training(model)
    import transformers

    release = f"transformers {transformers.__version__}"
    if computed != expected:
        what = "this adapter" if isinstance(saved, str) else f"the base of {type(model).__name__}"
        found = (
            f"this model numbers the text after a clip by the rule {computed!r} ({release}), and {what} was trained with "
            f"{expected!r}, so that its answers differ. To use that"
        )
    elif rules.forgets_padding(model):
        found = f"generate of {release} forgets the padding of a batch's shorter prompts, so that its answers to them differ. To mend that"
    else:
        return
    warnings.warn(
        f"text positions: {found}: from sta_adapter.text_positions import use_positions; use_positions(model, {expected!r})",
        STAWarning,
        stacklevel=_first_level_outside(),
    )


def _family(model: nn.Module) -> tuple[TextPositions, str] | None:
    """The rules of the family that a model belongs to, and the one that it computes now, for which it is asked."""
    for rules in dict.fromkeys(spec.text_positions for spec in all_backbones()):
        if rules is not None and (computed := rules.in_use(model)) is not None:
            return rules, computed
    return None


def _first_level_outside() -> int:
    """How many frames up the caller of this package stands, for `warnings.warn`."""
    level, frame = 1, sys._getframe(1)
    inside = __name__.partition(".")[0]
    while frame.f_back is not None and str(frame.f_globals.get("__name__", "")).partition(".")[0] == inside:
        level, frame = level + 1, frame.f_back
    return level
