"""The places in one model: those that a backbone names, compared with what it declares, and the language model behind them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from inspect import getattr_static
from typing import cast

import torch
from torch import Tensor, distributed, nn

from sta_adapter.attention.module import CHILD, TemporalAttention
from sta_adapter.compatibility.seams import active_ddp
from sta_adapter.distributed import execution_device, full_shape
from sta_adapter.errors import InjectionError
from sta_adapter.injection.backbone import Backbone

NARROW = (torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True)
class InjectionTarget:
    """A backbone's places in one model, checked: what injection works on."""

    backbone: Backbone
    encoder: nn.Module
    blocks: tuple[nn.Module, ...]
    norms: tuple[nn.Module, ...]
    width: int
    heads: int
    head_dim: int
    norm_kind: str
    norm_eps: float


def resolve_target(spec: Backbone, encoder: nn.Module) -> InjectionTarget:
    """The places in an encoder.

    Raises:
        InjectionError: naming every difference from what the backbone declares.
    """
    problems: list[str] = []
    blocks = _blocks(spec, encoder, problems)
    norms = _norms(spec, blocks, problems)
    facts = _norm_facts(norms[0]) if norms else None
    if norms and facts is None:
        problems.append(f"Backbone.norm={spec.norm!r} is a {type(norms[0]).__name__} without a weight vector, no norm")
    kind, eps, width = facts or ("", 0.0, 0)
    widths = sorted({found[2] for norm in norms if (found := _norm_facts(norm))})
    if len(widths) > 1:
        problems.append(f"the norms {spec.norm!r} have different widths, {widths}; STA needs blocks of one width")
    heads = _heads(spec, encoder, width, problems)
    require_fit(spec, encoder, problems)
    return InjectionTarget(spec, encoder, blocks, norms, width, heads, width // heads, kind, eps)


def require_fit(spec: Backbone, encoder: nn.Module, problems: Sequence[str]) -> None:
    """Raise an InjectionError of all in which an encoder is not as its backbone declares, if there is anything."""
    if problems:
        raise InjectionError(f"backbone {spec.name!r} does not fit {type(encoder).__name__}: {'; '.join(problems)}.")


def sta_modules(encoder: nn.Module, spec: Backbone) -> dict[int, TemporalAttention]:
    """The STA module at work in each block of an injected encoder, by the block's index."""
    children = map(_sta_of, encoder.get_submodule(spec.blocks).children())
    return {index: _active_module(child) for index, child in enumerate(children) if child is not None}


def _sta_of(block: nn.Module) -> nn.Module | None:
    """The block's child; asked of each block in each forward, and `getattr` takes a detour that only a wrapper needs (FSDP1)."""
    return block._modules[CHILD] if CHILD in block._modules else getattr(block, CHILD, None)


def sta_trains(encoder: nn.Module, spec: Backbone) -> bool:
    """Whether any of the STA at work requires a gradient."""
    return bool(_trained(encoder, spec))


def trained_alone(model: nn.Module | None, encoder: nn.Module, spec: Backbone) -> list[Tensor]:
    """STA's parameters that require a gradient; none where something outside of the encoder does so as well."""
    ours = {id(parameter) for parameter in encoder.parameters()}
    others = model is None or any(p.requires_grad and id(p) not in ours for p in model.parameters())
    return [] if others else _trained(encoder, spec)


def _trained(encoder: nn.Module, spec: Backbone) -> list[Tensor]:
    modules = sta_modules(encoder, spec).values()
    return [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]


def widen(parameters: Iterable[nn.Parameter]) -> None:
    """Put what will train in 16 bits into float32, as PEFT puts LoRA: most steps would be rounded away.

    ZeRO-3's parts stay, of which DeepSpeed trains copies in float32.
    """
    for parameter in parameters:
        if parameter.dtype in NARROW and not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.float()


def lost_steps(modules: Iterable[nn.Module]) -> str:
    """Why some steps of what trains here would be lost, and what to do; empty where none are."""
    modules = list(modules)
    trained = [p for module in modules for p in module.parameters() if p.requires_grad]
    if any(p.is_meta for p in trained) and any(execution_device(module) for module in modules):
        return (
            "STA's weights are offloaded by accelerate, which brings them for each forward and drops their gradients, so they would not be trained. "
            "Offload the base first (device_map), then inject."
        )
    # of what FSDP2 and DeepSpeed show in a forward they train wide copies
    alone = not (distributed.is_available() and distributed.is_initialized()) or active_ddp() is not None
    if alone and any(p.dtype in NARROW for p in trained):
        return (
            "STA trains in 16 bits, in which small steps are rounded away: at usual rates most of its q, k and v never moves. Before the "
            "optimizer is made: for p in handle.parameters(): p.data = p.data.float(), as PEFT does with LoRA."
        )
    return ""


def _active_module(module: nn.Module) -> TemporalAttention:
    """The STA module itself, or the copy that PEFT's `modules_to_save` has put in its place."""
    if isinstance(module, TemporalAttention):
        return module
    copies: nn.ModuleDict | dict[str, nn.Module] = getattr(module, "modules_to_save", {})
    name: object = getattr(module, "active_adapter", None)
    name = name[0] if isinstance(name, (list, tuple)) and name else name
    if isinstance(name, str) and name in copies:
        return cast("TemporalAttention", copies[name])
    inside: nn.Module = getattr(
        module, "original_module", module
    )  # of PEFT; or what is wrapped around STA alone (FSDP1, torch.compile)
    return next(inner for inner in inside.modules() if isinstance(inner, TemporalAttention))


def find_language_model(model: nn.Module, encoder: nn.Module) -> nn.Module | None:
    """The module that takes `inputs_embeds` once the encoder's output is among them; None for a bare encoder.

    It may hold the encoder as well, where it is the text model itself, with the embeddings of its tokens.
    """
    get_decoder: object = getattr(model, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else None
    for candidate in (decoder, getattr(model, "language_model", None), getattr(model, "lm", None)):
        if not isinstance(candidate, nn.Module) or candidate is model:
            continue
        if "embed_tokens" in candidate._modules or all(module is not encoder for module in candidate.modules()):
            return candidate
    return None


def inner_model(model: nn.Module, encoder: nn.Module) -> nn.Module:
    """The model inside of what is wrapped around it: DDP, an average of weights (EMA, SWA), torch.compile, a module of one's own.

    It is the outermost module around the encoder that is PEFT's or has a configuration; where there is none, `model`.
    """
    found = model
    while found is not encoder:  # wrappers may pass on attributes of what is in them, which don't count
        if getattr_static(found, "peft_config", None) is not None or hasattr(
            getattr_static(found, "config", None), "to_dict"
        ):
            return found
        found = next((child for child in found.children() if _holds(child, encoder)), encoder)
    return model


def innermost_around(model: nn.Module, encoder: nn.Module, language_model: nn.Module) -> nn.Module:
    """The innermost module that holds both, each as a part of it.

    It is called as a module; `model` itself may not be: PEFT before 0.21 runs its `forward` past all hooks (task_type "CAUSAL_LM").
    """
    while True:
        inner = [
            child
            for child in model.children()
            if child is not language_model and _holds(child, encoder, language_model)
        ]
        if not inner:
            return model
        model = inner[0]


def _holds(module: nn.Module, *parts: nn.Module) -> bool:
    found = {id(inner) for inner in module.modules()}
    return all(id(part) in found for part in parts)


def _blocks(spec: Backbone, encoder: nn.Module, problems: list[str]) -> tuple[nn.Module, ...]:
    try:
        blocks = tuple(encoder.get_submodule(spec.blocks).children())
    except AttributeError:
        problems.append(f"it has no Backbone.blocks={spec.blocks!r}; its children are {_children(encoder)}")
        return ()
    if not blocks:
        problems.append(f"Backbone.blocks={spec.blocks!r} holds no block")
    if any(isinstance(block, torch.jit.ScriptModule) for block in blocks):
        problems.append("its blocks are compiled by torch.jit. Inject into the original model, then script or trace it")
        return ()
    return blocks


def _norms(spec: Backbone, blocks: tuple[nn.Module, ...], problems: list[str]) -> tuple[nn.Module, ...]:
    norms, missing = [], []
    for index, block in enumerate(blocks):
        try:
            norms.append(block.get_submodule(spec.norm))
        except AttributeError:
            missing.append(index)
    if missing:
        which = f"block{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}"
        found = _children(blocks[missing[0]])
        problems.append(f"{which}: no norm {spec.norm!r} in front of the MLP; the children there are {found}")
    if len({id(norm) for norm in norms}) < len(norms):
        problems.append(f"blocks share one module as {spec.norm!r}; STA needs a norm of its own in each")
    return tuple(norms)


def _heads(spec: Backbone, encoder: nn.Module, width: int, problems: list[str]) -> int:
    try:
        heads = spec.heads(encoder)
    except Exception as error:
        problems.append(f"Backbone.heads fails: {type(error).__name__}: {error}")
        return 1
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1 or width % heads:
        of = f", which don't divide the width {width}" if width else ""
        problems.append(f"Backbone.heads gives {heads!r} heads{of}")
        return 1
    return heads


def _children(module: nn.Module) -> str:
    return ", ".join(name for name, _ in module.named_children()) or "none"


def _norm_facts(norm: nn.Module) -> tuple[str, float, int] | None:
    """(kind, eps, width) of the encoder's norm, also of one that PEFT has wrapped; None when it is no norm."""
    while isinstance(inner := getattr(norm, "base_layer", getattr(norm, "original_module", None)), nn.Module):
        norm = inner
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, torch.Tensor) or len(shape := full_shape(weight)) != 1:
        return None
    eps = next((getattr(norm, n) for n in ("eps", "variance_epsilon", "epsilon") if getattr(norm, n, None)), 1e-6)
    kind = "rmsnorm" if "rms" in type(norm).__name__.lower() else "layernorm"
    return kind, float(eps), shape[0]
