"""What of an injected model is an adapter, and where it goes: into a folder, or to the Hub."""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from sta_adapter.adapter.base_marks import KEEP_IT, changes, require_frozen_base, require_same_base, trained_since
from sta_adapter.adapter.base_model import describe_base
from sta_adapter.adapter.format import Description
from sta_adapter.adapter.lora_peft import has_other_vocabulary
from sta_adapter.adapter.lora_weights import lora_files, lora_state, require_whole_lora
from sta_adapter.adapter.push import Publication, push_files
from sta_adapter.adapter.run_file import RUN_FILE
from sta_adapter.adapter.save import adapter_files, lora_of_others, make_description, write_adapter
from sta_adapter.attention.module import TemporalAttention
from sta_adapter.distributed import full_shape, full_tensor, is_sharded, on_rank_zero
from sta_adapter.errors import CheckpointError, InjectionError, STAWarning
from sta_adapter.injection.backbone import active_modules
from sta_adapter.injection.target import inner_model
from sta_adapter.injection.text_positions import rule_in_use

if TYPE_CHECKING:
    from sta_adapter.injection.handle import STAHandle


def save_adapter(handle: STAHandle, folder: str | os.PathLike[str], base_changed: bool = False) -> None:
    """Write an adapter: every file in full beside its final place, then all are renamed.

    Sharded weights (FSDP2, ZeRO-3) are gathered: then all processes must call this, and process 0 writes.

    Args:
        handle: the injected model's handle.
        folder: made when it does not exist; an adapter in it is replaced.
        base_changed: save it also where the base model is other than when STA went in.

    Raises:
        CheckpointError: weights are not finite, the base model was changed, LoRA can't be saved or is merged into STA,
            or the folder can't be written; what was there stays.
    """
    contents = adapter_contents(handle, base_changed)
    if os.path.isfile(run := Path(folder) / RUN_FILE):  # False for a path that can't be, which writing tells better
        warnings.warn(
            f"{run} tells how the adapter that lay here was trained, and stays; a model card made of this folder would say it of the "
            "one that is saved now. Save into another folder, or take that file away.",
            STAWarning,
            stacklevel=3,
        )
    if not contents[2] and (others := lora_of_others(Path(folder))):
        warnings.warn(
            f"{others} is of LoRA that this model doesn't have, and stays; load_sta would bring it along with the STA that is saved now. "
            "Save into another folder, or take LoRA's files away.",
            STAWarning,
            stacklevel=3,
        )
    if is_sharded(handle.model.parameters()):
        on_rank_zero(lambda: write_adapter(folder, *contents))
    else:
        write_adapter(folder, *contents)


def require_savable(handle: STAHandle) -> None:
    """Refuse, before a training, a model that could not be saved after it; with sharded weights all processes must call this.

    Raises:
        CheckpointError: as `save_adapter`.
        ConfigError: the base model would be trained as well.
    """
    adapter_contents(handle)
    model = inner_model(handle.model, handle.encoder)
    lora = lora_state(model)
    require_frozen_base(model, handle._injection.base_marks, () if lora is None else lora[1])


def adapter_contents(
    handle: STAHandle, base_changed: bool = False
) -> tuple[dict[str, Tensor], Description, dict[str, bytes]]:
    """What `write_adapter` and `adapter_files` take; sharded weights are gathered, which all processes must join."""
    if all(module is not handle.encoder for module in active_modules(handle.model)):
        raise InjectionError(
            "PEFT keeps this handle's vision encoder as it was, and trains a copy of it (modules_to_save): go on with get_sta(peft_model)."
        )
    model = inner_model(handle.model, handle.encoder)
    if not base_changed:
        require_whole_lora(model)
    lora = lora_state(model)
    saved = () if lora is None else lora[1]
    if not base_changed:
        require_all_blocks(handle)
        require_same_base(model, handle._injection.base_marks, saved)
        if more := trained_since(model, handle._injection.base_marks):
            warnings.warn(
                f"{len(more)} tensors that train came into the model after STA, the first is {more[0]}, and an adapter holds none of them. "
                "Keep them yourself.",
                STAWarning,
                stacklevel=4,
            )
    if lora is None and has_other_vocabulary(getattr(model, "config", None)):
        warnings.warn(
            "the model has embeddings of other tokens than its base, and an adapter without LoRA holds none. Keep them as well: save the model "
            "without STA (handle.remove(), model.save_pretrained) as the base to load the adapter into.",
            STAWarning,
            stacklevel=4,
        )
    return adapter_state(handle), describe_adapter(handle, saved), lora_files(model, lora)


def adapter_state(handle: STAHandle) -> dict[str, Tensor]:
    """STA's tensors on the CPU under the file's keys, `blocks.{i}.norm.weight` and so on."""
    merged = [
        index for index, module in handle.blocks.items() if any(getattr(m, "merged", False) for m in module.modules())
    ]
    if merged:
        raise CheckpointError(
            f"LoRA is merged into STA's own layers, in {len(merged)} blocks, and would be added twice on loading: unmerge it first "
            "(model.unmerge_adapter())."
        )
    return {
        f"blocks.{index}.{name}": full_tensor(tensor).detach().to("cpu").contiguous()
        for index, module in handle.blocks.items()
        for name, tensor in plain_state(module).items()
    }


def plain_state(module: TemporalAttention) -> dict[str, Tensor]:
    """What an STA module's layers compute with, by its own names.

    Also where PEFT has put LoRA around them, or `torch.nn.utils.parametrize` makes a weight of other tensors.

    Raises:
        CheckpointError: they are quantised, flattened, or made anew at each forward.
    """
    layers = {name: getattr(layer, "base_layer", layer) for name, layer in module.named_children()}
    found = {f"{name}.{key}": _weight(layer, key) for name, layer in layers.items() for key in ("weight", "bias")}
    return {name: value for name, value in {**found, "gamma": module.gamma}.items() if value is not None}


def _weight(layer: nn.Module, name: str) -> Tensor | None:
    value: object = getattr(layer, name, None)
    if value is None:
        return None
    lasts = name in layer._parameters or is_parametrized(layer, name)
    axes = 2 if isinstance(layer, nn.Linear) and name == "weight" else 1
    if (
        lasts
        and isinstance(value, Tensor)
        and (type(value) in (Tensor, nn.Parameter) or is_sharded([value]))
        and len(full_shape(value)) == axes
    ):
        return value
    raise CheckpointError(
        f"STA can't be saved: the {name} of one of its layers, a {type(layer).__name__}, is quantised, flattened, or made anew at each "
        "forward. Save it before it is quantised; with FSDP's first version within FullyShardedDataParallel.summon_full_params(model, writeback=False); "
        "torch.nn.utils.prune.remove and torch.nn.utils.remove_weight_norm give a weight back."
    )


def require_all_blocks(handle: STAHandle) -> None:
    """Refuse an encoder of which blocks were added, replaced or left out since STA went in, so that no other has STA in the same places."""
    injection, (depth, told) = handle._injection, _places(handle)
    before = injection.depth or depth
    lost = sorted(set(told) - set(handle.blocks))
    if lost or depth != before or len(handle.blocks) != len(told):
        which = (
            f"blocks {lost} have none, as they were replaced or wrapped"
            if lost
            else f"it had {before} when STA went in"
        )
        raise CheckpointError(
            f"STA is in {len(handle.blocks)} of the {depth} blocks that the vision encoder has now, and {which}; an adapter of it fits no base as it "
            f"was. {KEEP_IT}"
        )


def _places(handle: STAHandle) -> tuple[int, Sequence[int]]:
    """How many blocks the encoder has, and those in which STA belongs by its settings."""
    depth = len(list(handle.encoder.get_submodule(handle._injection.spec.blocks).children()))
    return depth, range(depth) if handle.config.layers == "all" else handle.config.layers


def describe_adapter(handle: STAHandle, saved: Collection[str] = ()) -> Description:
    """The contents of `sta_config.json`; `saved` are the names of the base's tensors that are saved with LoRA."""
    block = next(iter(handle.blocks.values()))
    depth, told = _places(handle)
    encoder = {
        "width": block.to_out.out_features,
        "depth": depth,
        "num_heads": block.num_heads,
        "head_dim": block.head_dim,
    }
    model, config = inner_model(handle.model, handle.encoder), handle.config
    if set(told) != set(handle.blocks):
        config = dataclasses.replace(config, layers=tuple(sorted(handle.blocks)))
    description = make_description(handle.backbone, encoder, config, describe_base(model), rule_in_use(model))
    if any(changes(model, handle._injection.base_marks, saved)):
        description["base_changed"] = True
    return description


def push_adapter(handle: STAHandle, repo_id: str, base_changed: bool = False, **options: object) -> Publication | None:
    """Publish a model's adapter as it is in memory; arguments and errors as `STAHandle.push_to_hub`."""
    files = adapter_files(*adapter_contents(handle, base_changed))
    count = sum(math.prod(full_shape(parameter)) for parameter in handle.parameters())
    if not is_sharded(handle.model.parameters()):
        return push_files(files, count, repo_id, **options)
    done: list[Publication] = []
    on_rank_zero(lambda: done.append(push_files(files, count, repo_id, **options)))
    return done[0] if done else None
