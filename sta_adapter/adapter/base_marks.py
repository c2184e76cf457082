"""Whether a base model is as it was when STA went in, told by a few numbers of each tensor, of which training and merging leave none as they are."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor, nn

from sta_adapter.attention.module import CHILD
from sta_adapter.distributed import is_fsdp1, is_sharded
from sta_adapter.errors import CheckpointError, ConfigError

SAMPLED = 16  # numbers of each tensor
AROUND = re.compile(
    r"^(?:(?:base_model\.model|module|_orig_mod)\.)+|(?:base_layer|original_module|_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\."
)
KEEP_IT = "To save it for the changed model, which you keep yourself (model.save_pretrained), pass base_changed=True."
ROUNDED = (torch.bfloat16, torch.float16)

BaseMarks = dict[str, tuple[tuple[int, ...], Tensor]]


def mark_base(model: nn.Module) -> BaseMarks:
    """Shape and some numbers of each of the model's tensors, by its name in the bare model."""
    return {name: (tuple(tensor.shape), _sample(tensor)) for name, tensor in _tensors(model)}


def require_same_base(model: nn.Module, marks: BaseMarks, saved: Collection[str] = ()) -> None:
    """Refuse a model of which other tensors were trained than an adapter holds, or that LoRA was merged into; arguments as `changes`."""
    gone, changed = changes(model, marks, saved)
    if gone:
        raise CheckpointError(
            f"{len(gone)} of the base model's tensors are gone or have another shape since STA was injected, the first is {gone[0]}: "
            f"parts were replaced, pruned or left out, and an adapter is for the base as it was. {KEEP_IT}"
        )
    if changed:
        raise CheckpointError(
            f"{len(changed)} of the base model's tensors have changed since STA was injected, the first is {changed[0]}: they were "
            "trained, or LoRA was merged into them, and an adapter stores neither, so it would give other outputs on the base model. "
            f"Freeze the base (handle.freeze_base(), or LoRA with handle.lora_config(modules_to_save=[...])) and save before merging. {KEEP_IT}"
        )


def changes(model: nn.Module, marks: BaseMarks, saved: Collection[str] = ()) -> tuple[list[str], list[str]]:
    """The base's tensors that are gone or have another shape, and those that have other numbers.

    Args:
        model: with STA, and with LoRA or without.
        marks: what `mark_base` gave before.
        saved: names of the base's tensors that are saved with LoRA; these may be others.
    """
    merged = {name: m.merged for name, m in model.named_modules() if isinstance(getattr(m, "merged", None), bool)}
    parts = {f"{name}.base_layer.{part}": at_work for name, at_work in merged.items() for part in ("weight", "bias")}
    unmergeable = [name for name, at_work in parts.items() if at_work]
    unmerged = {AROUND.sub("", name) for name, at_work in parts.items() if not at_work}
    names = {AROUND.sub("", name) for name, _ in model.named_parameters(remove_duplicate=False)}
    flattened = any(map(is_fsdp1, model.modules()))  # under other names, in other shapes
    start = _start(marks, names)
    marks = {start + mark: value for mark, value in marks.items()}
    gone = [] if flattened or names.isdisjoint(marks) else [name for name in marks if name not in names]
    changed = []
    for name, found in _unsaved(model, marks, [*saved, *unmergeable]):
        shape, before = marks[name]
        if found.shape[1:] != shape[1:] or found.dim() != len(shape):
            gone += [] if flattened else [name]
        elif not _same(before, now := _sample(found, shape)) and not (
            name in unmerged and not found.requires_grad and _same_but_for_rounding(before, now)
        ):
            changed.append(name)
    return gone, changed


def trained_since(model: nn.Module, marks: BaseMarks) -> list[str]:
    """Tensors that train, and have come into the model beside STA and LoRA since it was marked."""
    trained = [name for name, tensor in _tensors(model) if tensor.requires_grad and CHILD not in name.split(".")]
    start = _start(marks, {name for name, _ in _tensors(model)})
    known = {start + mark for mark in marks}
    return [name for name in trained if name not in known and name.startswith(start)] if marks else []


def _start(marks: BaseMarks, names: Collection[str]) -> str:
    """How the names of marked tensors begin in a model of which a part was marked."""
    if any(mark in names for mark in marks):
        return ""
    return next((name.removesuffix(mark) for mark in marks for name in names if name.endswith(f".{mark}")), "")


def is_as_marked(module: nn.Module, marks: BaseMarks) -> bool:
    """Whether a module has the numbers of its marks; False where its tensors can't be compared."""
    found = [_same(marks[name][1], _sample(tensor)) for name, tensor in _tensors(module) if name in marks]
    return bool(found) and all(found)


def require_frozen_base(model: nn.Module, marks: BaseMarks, saved: Collection[str] = ()) -> None:
    """Refuse a model that is about to train tensors which no adapter will hold; arguments as `require_same_base`."""
    trained = [name for name, tensor in _unsaved(model, marks, saved) if tensor.requires_grad]
    if trained:
        raise ConfigError(
            f"{len(trained)} of the base model's tensors would be trained, the first is {trained[0]}, and an adapter stores none of "
            "them, so it could not be saved. Freeze the base (handle.freeze_base(), or LoRA with "
            "handle.lora_config(modules_to_save=[...]))."
        )


def _unsaved(model: nn.Module, marks: BaseMarks, saved: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """The base's tensors that an adapter doesn't hold."""
    held = {AROUND.sub("", name) for name in saved}
    return ((name, tensor) for name, tensor in _tensors(model) if name in marks and name not in held)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The base's floating-point tensors that are here, whole and not quantised, with their names in the bare model."""
    for name, parameter in model.named_parameters():
        if ".lora_" in name or ".modules_to_save." in name:
            continue
        if (
            type(parameter) is nn.Parameter
            and parameter.is_floating_point()
            and parameter.device.type != "meta"
            and parameter.numel()
            and not is_sharded([parameter])
        ):
            yield AROUND.sub("", name), parameter


def _sample(tensor: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """Some numbers; of a tensor that had another `shape`, more or fewer rows, those of the same places in it."""
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, math.prod(shape or tensor.shape) // SAMPLED)][:SAMPLED].to("cpu", copy=True)


def _same(before: Tensor, now: Tensor) -> bool:
    """Whether it has the same numbers, or those that another dtype leaves of them; of fewer rows, in the places that both have."""
    before, now = before[: len(now)], now[: len(before)]
    if before.dtype != now.dtype and torch.equal(now.to(before.dtype), before):
        return True
    return any(torch.equal(before.to(dtype).to(now.dtype), now) for dtype in (before.dtype, *ROUNDED))


def _same_but_for_rounding(before: Tensor, now: Tensor) -> bool:
    """Whether it has the numbers that are left of the same ones when LoRA was merged into them and taken out again."""
    before, now = before[: len(now)], now[: len(before)]
    difference = (now.double() - before.double()).abs().max()
    return bool(difference <= 8 * torch.finfo(now.dtype).eps * before.double().abs().max())
