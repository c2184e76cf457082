"""How models checkpoint their activations: the methods of transformers, what their modules say, and whether one does just now."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import nn
from torch.autograd.graph import disable_saved_tensors_hooks

from sta_adapter.compatibility.calls import parameter_names
from sta_adapter.compatibility.releases import incompatible

# of transformers; of code that models bring along; of timm
FLAGS = ("gradient_checkpointing", "with_cp", "use_checkpoint", "grad_checkpointing")
FUNCTION = "_gradient_checkpointing_func"
# of those that take hold of what autograd saves, in few steps; torch 2.4 has no such function
TOP_HOOKS: Callable[[bool], object] | None = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
PROPERTIES = ("is_activation_checkpointing", "is_gradient_checkpointing")  # since transformers 5.24, and before


class Checkpointing(NamedTuple):
    """How a model of transformers is told to checkpoint: `enable(**{keywords: {"use_reentrant": ...}})`."""

    enable: Callable[..., None]
    keywords: str
    disable: Callable[[], None]


def checkpointing_methods(model: object) -> Checkpointing:
    """The model's methods, under the name that its release has for them ("activation" since transformers 5.24)."""
    for name in ("activation", "gradient"):
        enable = getattr(model, f"{name}_checkpointing_enable", None)
        disable = getattr(model, f"{name}_checkpointing_disable", None)
        if enable is not None and disable is not None:
            keywords = f"{name}_checkpointing_kwargs"
            if keywords not in parameter_names(enable, f"{name}_checkpointing_enable"):
                raise incompatible("transformers", f"{name}_checkpointing_enable has no parameter {keywords}")
            return Checkpointing(enable, keywords, disable)
    raise incompatible(
        "transformers",
        f"{type(model).__name__} has neither activation_checkpointing_enable nor gradient_checkpointing_enable",
    )


def checkpoints_reentrantly(encoder: nn.Module) -> bool:
    """Whether the encoder's blocks may be run under re-entrant checkpointing, which needs an input with a gradient."""
    for module in _modules_that_checkpoint(encoder):
        function = getattr(module, FUNCTION, None)
        keywords = function.keywords if isinstance(function, functools.partial) else {}
        return keywords.get("use_reentrant") is not False
    return False


def require_known_flags(encoder: nn.Module) -> None:
    """To be called of an encoder some of whose blocks were seen `inside_checkpoint`.

    Raises:
        CompatibilityError: it is a model of transformers that checkpoints, and no module of it has a flag that we know. STA
            would get no gradient under re-entrant checkpointing.
    """
    if not hasattr(type(encoder), "from_pretrained"):
        return
    name = next((name for name in PROPERTIES if hasattr(type(encoder), name)), None)
    if name is None:
        raise incompatible("transformers", f"{type(encoder).__name__} has neither {' nor '.join(PROPERTIES)}")
    if getattr(encoder, name) and next(_modules_that_checkpoint(encoder), None) is None:
        raise incompatible(
            "transformers",
            f"{type(encoder).__name__} checkpoints, and none of its modules has one of the flags {', '.join(FLAGS)}",
        )


def _modules_that_checkpoint(encoder: nn.Module) -> Iterator[nn.Module]:
    """Modules whose own or whose class's flag is set, in the order of `modules()`; asked at every forward, and so in few steps."""
    set_by_class: dict[type, set[str]] = {}
    waiting = [encoder]
    while waiting:
        module = waiting.pop()
        own, kind = vars(module), type(module)
        if kind not in set_by_class:
            set_by_class[kind] = {flag for flag in FLAGS if getattr(kind, flag, None) is True}
        flags = set_by_class[kind]
        said = flags or not own.keys().isdisjoint(FLAGS)
        if said and any(own.get(flag, flag in flags) is True for flag in FLAGS):
            yield module
        if children := own["_modules"]:
            waiting.extend([child for child in reversed(children.values()) if child is not None])


def inside_checkpoint() -> bool:
    """Whether what runs now, in a forward that began with gradients, will be run again in the backward, whatever tool does it.

    Checkpoints take hold of what autograd saves, or, re-entrant ones, run without gradients. Other holders of saved tensors
    (`save_on_cpu`) count as well: a hook too many changes nothing.
    """
    if not torch.is_grad_enabled():
        return True
    if TOP_HOOKS is not None:
        return TOP_HOOKS(True) is not None
    try:
        with disable_saved_tensors_hooks("looked for"):  # refused while there are any
            return False
    except RuntimeError:
        return True
