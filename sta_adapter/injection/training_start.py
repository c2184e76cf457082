"""What there is to say when a training begins: that STA takes no part in it, and what of it an adapter can't hold."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping

from torch import nn

from sta_adapter.adapter.base_marks import KEEP_IT, BaseMarks, is_as_marked, require_frozen_base, require_same_base
from sta_adapter.adapter.lora_weights import checked_lora, lora_state, require_whole_lora
from sta_adapter.compatibility.seams import hook_table
from sta_adapter.errors import CheckpointError, ConfigError
from sta_adapter.injection.backbone import Backbone
from sta_adapter.injection.target import lost_steps, sta_modules, sta_trains


def remarks_at_start(
    encoder: nn.Module, spec: Backbone, model: nn.Module, base: BaseMarks, fresh: Mapping[int, BaseMarks]
) -> Iterator[str]:
    """The texts of warnings; mostly none.

    Args:
        encoder: with STA.
        spec: its backbone.
        model: that STA went into, as it is now.
        base: marks of that model when STA went in.
        fresh: by block, marks of STA's output layer where it went in as fresh STA.
    """
    modules = sta_modules(encoder, spec)
    is_fresh = all(is_as_marked(module.to_out, fresh.get(index, {})) for index, module in modules.items())
    trains = sta_trains(encoder, spec)
    if is_fresh and not trains and any(parameter.requires_grad for parameter in model.parameters()):
        yield (
            "STA is in the model as inject_sta made it, and no parameter of it requires a gradient, so it would not be trained while other "
            'weights are. Build LoRA from handle.lora_config(), or name "sta" in its modules_to_save; without LoRA call '
            "handle.freeze_base() after all else that freezes."
        )
    if trains and (reason := lost_steps(modules.values())):
        yield reason
    try:
        require_whole_lora(model)
        has_lora = checked_lora(model) is not None
        if has_lora and any(hook_table(module, "_state_dict_pre_hooks") for module in model.modules()):
            return  # PEFT would ask them for their state, for which FSDP2 shards the weights of the forward at work
        with warnings.catch_warnings():  # of adapters that are not at work, which saving tells
            warnings.simplefilter("ignore")
            lora = lora_state(model) if has_lora else None
        saved = () if lora is None else lora[1]
        require_frozen_base(model, base, saved)
        require_same_base(model, base, saved)
    except CheckpointError as error:
        yield f"handle.save_pretrained can't save what is trained here: {error}"
    except ConfigError as error:  # the base trains as well
        yield f"handle.save_pretrained can't save what is trained here: {error} {KEEP_IT}"
