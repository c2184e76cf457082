"""Whether the base model is as it was when STA went in: what else was trained, or merged into it, no adapter holds.

A few numbers of each tensor are kept, of which training and merging leave none as they are.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from sta_adapter.distributed import is_sharded
from sta_adapter.errors import CheckpointError, ConfigError

__all__ = ["BaseMarks", "mark_base", "require_frozen_base", "require_same_base"]

BaseMarks = dict[str, tuple[tuple[int, ...], Tensor]]
SAMPLED = 16  # numbers of each tensor
AROUND = re.compile(
    r"^(?:(?:base_model\.model|module|_orig_mod)\.)+|(?:base_layer|original_module|_fsdp_wrapped_module|_orig_mod)\."
)
ROUNDED = (torch.bfloat16, torch.float16)


def mark_base(model: nn.Module) -> BaseMarks:
    """Shape and some numbers of each of the model's tensors, by its name in the bare model."""
    return {name: (tuple(tensor.shape), _sample(tensor)) for name, tensor in _tensors(model)}


def require_same_base(model: nn.Module, marks: BaseMarks, saved: Collection[str] = ()) -> None:
    """Refuse a model of which other tensors were trained than an adapter holds, or that LoRA was merged into.

    Args:
        model: with STA, and with LoRA or without.
        marks: what `mark_base` gave before.
        saved: names of the base's tensors that are saved with LoRA; these may be others.

    Raises:
        CheckpointError: as said, with how many tensors and which.
    """
    merged = [name for name, module in model.named_modules() if getattr(module, "merged", False) is True]
    unmergeable = [f"{name}.base_layer.{part}" for name in merged for part in ("weight", "bias")]
    changed = [
        name
        for name, tensor in _unsaved(model, marks, [*saved, *unmergeable])
        if marks[name][0] == tuple(tensor.shape) and not _same(marks[name][1], tensor)
    ]
    if changed:
        raise CheckpointError(
            f"{len(changed)} of the base model's tensors are other than when STA went in, the first is {changed[0]}: they were "
            "trained, or LoRA was merged into them, and an adapter holds neither, so that on the base model it would compute something else. "
            "Freeze the base (handle.freeze_base(), or LoRA with handle.lora_config(modules_to_save=[...])) and save before merging. To "
            "save it for the changed model, which you keep yourself (model.save_pretrained), pass base_changed=True."
        )


def require_frozen_base(model: nn.Module, marks: BaseMarks, saved: Collection[str] = ()) -> None:
    """Refuse a model that is about to train tensors which no adapter will hold; arguments as `require_same_base`.

    Raises:
        ConfigError: as said, with how many tensors and which.
    """
    trained = [name for name, tensor in _unsaved(model, marks, saved) if tensor.requires_grad]
    if trained:
        raise ConfigError(
            f"{len(trained)} of the base model's tensors would be trained, the first is {trained[0]}, and an adapter holds none of "
            "them, so that it could not be saved. Freeze the base (handle.freeze_base(), or LoRA with "
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


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, len(flat) // SAMPLED)][:SAMPLED].to("cpu", copy=True)


def _same(before: Tensor, tensor: Tensor) -> bool:
    """Whether it has the same numbers, or those that another dtype leaves of them."""
    now = _sample(tensor)
    if before.dtype != now.dtype and torch.equal(now.to(before.dtype), before):
        return True
    return any(torch.equal(before.to(dtype).to(now.dtype), now) for dtype in (before.dtype, *ROUNDED))
