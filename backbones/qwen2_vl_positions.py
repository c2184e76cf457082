"""Positions in the language model of Qwen2-VL and Qwen2.5-VL: another rule in the place of the one that transformers has.

`restore_original_positions` brings back the rule that the model was trained with, where transformers 5 has another;
`sta_adapter.backbones.videorope` puts its own rule in by the same means. Everything put into a model is a plain object
that knows at most modules of that model, so that copied and unpickled models keep working.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from sta_adapter.backbones.qwen2_vl_position_hooks import FillPositions, GenerationPositions
from sta_adapter.backbones.qwen2_vl_position_rules import OriginalPositions, PositionRule
from sta_adapter.backbones.qwen2_vl_rope_index import RopeIndex
from sta_adapter.compatibility.position_seams import GENERATION_METHOD as PREPARE
from sta_adapter.compatibility.position_seams import ROPE_INDEX, has_generation_method, rope_index_parameters
from sta_adapter.compatibility.seams import drop_hooks
from sta_adapter.errors import InjectionError

FAMILIES = ("Qwen2VLModel", "Qwen2_5_VLModel")


def restore_original_positions(model: nn.Module) -> nn.Module:
    """Give Qwen2-VL or Qwen2.5-VL the text positions of its training back, also on transformers 5.

    There, text after a clip goes on from the larger of its rows and columns; the original counts the frames too, so
    that text never overlaps a clip. On transformers 4 this changes nothing for Qwen2-VL; Qwen2.5-VL gets the fractions of
    a second back that 4.57 drops.

    Returns:
        The same model, changed; `undo_original_positions` takes the change back.

    Raises:
        InjectionError: the model is neither of transformers 4.52 or newer, or has a position rule already.
        CompatibilityError: this transformers computes positions in a way that is not known.
    """
    install(model, OriginalPositions.of(find_owner(model)))
    return model


def undo_original_positions(model: nn.Module) -> nn.Module:
    """Take `restore_original_positions` back; nothing happens where it was not called.

    Raises:
        InjectionError: the model is neither of transformers 4.52 or newer.
    """
    owner = find_owner(model)
    if isinstance(installed_rule(owner), OriginalPositions):
        uninstall(model)
    return model


def install(model: nn.Module, rule: PositionRule) -> None:
    """Let the Qwen2-VL or Qwen2.5-VL in `model` compute its positions by `rule`; raises what `restore_original_positions` raises."""
    owner: Any = find_owner(model)
    if installed_rule(owner) is not None:
        raise InjectionError(
            f"this model's positions follow {installed_rule(owner)} already. Take that back first: remove_videorope(model) "
            "or undo_original_positions(model)."
        )
    heads = list(_generating(model, owner))
    owner.get_rope_index = RopeIndex(rule, owner.config, rope_index_parameters(owner))
    owner.register_forward_pre_hook(FillPositions(), with_kwargs=True)
    owner.rope_deltas = None
    for head in heads:
        setattr(head, PREPARE, GenerationPositions(head))


def uninstall(model: nn.Module) -> None:
    """Undo `install`."""
    owner: Any = find_owner(model)
    vars(owner).pop(ROPE_INDEX)
    drop_hooks(owner, lambda hook: isinstance(hook, FillPositions))
    owner.rope_deltas = None
    for head in _generating(model, owner):
        vars(head).pop(PREPARE, None)


def find_owner(model: nn.Module, kinds: tuple[str, ...] = FAMILIES) -> nn.Module:
    """The module that computes positions: the one around tower and language model.

    Raises:
        InjectionError: when there is none, or several.
    """
    named = [m for m in model.modules() if any(cls.__name__ in kinds for cls in type(m).__mro__)]
    found = [m for m in named if hasattr(m, "language_model") and hasattr(m, ROPE_INDEX)]
    if len(found) == 1:
        return found[0]
    if found:
        raise InjectionError(f"{type(model).__name__} holds {len(found)} Qwen2-VL models; pass one of them.")
    if named:
        import transformers

        raise InjectionError(
            f"Qwen2-VL of transformers {transformers.__version__} can't be given another position rule; 4.52 and "
            "newer ones can. For VideoRoPE on 4.45.2, use its authors' model file."
        )
    raise InjectionError(
        f"{type(model).__name__} is no Qwen2-VL and holds none; expected a {' or '.join(kinds)} in it."
    )


def installed_rule(owner: nn.Module) -> PositionRule | None:
    """The rule that `install` gave to this module, or None."""
    method = vars(owner).get(ROPE_INDEX)
    return method.rule if isinstance(method, RopeIndex) else None


def _generating(model: nn.Module, owner: nn.Module) -> Iterator[nn.Module]:
    """The modules that prepare positions for generation with this owner (transformers 5)."""
    for module in model.modules():
        if getattr(module, "model", None) is owner and has_generation_method(type(module)):
            yield module
