"""A model with STA that is saved whole, by its own `save_pretrained`: the adapter is written beside its weights.

So do transformers' Trainer (`save_model`, its checkpoints) and `push_to_hub`. STA's tensors are among the model's weights
there, for a training to go on from, but not its settings, without which nothing can load them.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from typing import cast

from torch import Tensor, nn

from sta_adapter.adapter.lora_weights import checked_lora
from sta_adapter.adapter.save import write_adapter
from sta_adapter.compatibility.calls import bound_arguments
from sta_adapter.compatibility.module_names import STA_TENSOR
from sta_adapter.compatibility.seams import ADAPTER_FLAG
from sta_adapter.distributed import is_sharded
from sta_adapter.errors import CheckpointError, STAWarning
from sta_adapter.injection.contents import adapter_state, describe_adapter
from sta_adapter.injection.handle import STAHandle, get_sta
from sta_adapter.injection.methods import MethodInFront
from sta_adapter.injection.state import Injection

NAME = "save_pretrained"


class SavingMethod(MethodInFront):
    """`save_pretrained` of a model, or of a part of it, that has STA."""

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Run the method with the same arguments, then make its folder an adapter too.

        Raises:
            CheckpointError: the folder can't be written.

        Warns:
            STAWarning: the model's weights are saved, and the adapter can't be; or LoRA is among them, with which nothing loads them.
        """
        if kwargs.get("push_to_hub") and kwargs.get(
            "is_main_process", True
        ):  # which ends with what is in the folder by then
            return self._push(args, kwargs)
        given = bound_arguments(self.model, args, kwargs, self.name)
        folder, state = given.get("save_directory"), cast("Mapping[str, Tensor] | None", given.get("state_dict"))
        state = None if state is None else dict(state)  # transformers 4.47 takes out of the given one what is written
        found = self.method(*args, **kwargs)
        if isinstance(folder, (str, os.PathLike)) and os.path.isdir(folder) and given.get("is_main_process", True):
            self._write(folder, state)
        return found

    def _push(self, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        of_hub = (
            "repo_id",
            "commit_message",
            "private",
            "token",
            "create_pr",
            "revision",
            "commit_description",
            "tags",
        )
        self(*args, **{k: v for k, v in kwargs.items() if k == "token" or k not in ("push_to_hub", *of_hub)})
        folder = bound_arguments(self.model, args, kwargs, self.name)["save_directory"]
        options = {"repo_id": os.path.basename(os.path.normpath(cast("str", folder))), **kwargs}
        push = cast("Callable[..., object]", self.model.push_to_hub)
        return push(**{name: options[name] for name in of_hub if name in options})

    def _write(self, folder: str | os.PathLike[str], state: Mapping[str, Tensor] | None) -> None:
        handle = get_sta(self.model)
        if handle is None:
            return
        try:
            if checked_lora(self.model) is not None:
                if not getattr(self.model, ADAPTER_FLAG, False):  # else transformers has written PEFT's own files
                    self._warn_of_lora(folder)
                return
            tensors, description = _tensors(handle, state), describe_adapter(handle)
        except CheckpointError as error:
            warnings.warn(
                f"{os.fspath(folder)} has the model's weights, STA's among them, and no adapter, without which STA can't be loaded: {error}",
                STAWarning,
                stacklevel=3,
            )
            return
        write_adapter(folder, tensors, description)

    def _warn_of_lora(self, folder: str | os.PathLike[str]) -> None:
        warnings.warn(
            f"the model's weights in {os.fspath(folder)} were saved with LoRA in them, under names that only a model with the same LoRA takes "
            "(load_state_dict); from_pretrained would make weights up. Save the adapter by get_sta(model).save_pretrained in another folder, or "
            "call peft_model.merge_and_unload() before to have LoRA in the weights.",
            STAWarning,
            stacklevel=4,
        )


def attach_saving(model: nn.Module, encoder: nn.Module, injection: Injection) -> None:
    """Follow `save_pretrained` of the model and of each part of it around the encoder."""
    for module in model.modules():
        if hasattr(type(module), NAME) and any(inner is encoder for inner in module.modules()):
            module.__dict__[NAME] = SavingMethod(injection, module, NAME)


def _tensors(handle: STAHandle, state: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """STA's tensors under the file's keys: those among a state that is saved in the place of the model's, or the model's."""
    if state is None:
        if is_sharded(handle.parameters()):
            raise CheckpointError(
                "its weights lie in parts on several processes. Call handle.save_pretrained on all of them."
            )
        return adapter_state(handle)
    matches = {key: match for key in state if (match := STA_TENSOR.search(key))}
    found = {f"blocks.{match[1]}.{match[2]}": state[key].detach().cpu().contiguous() for key, match in matches.items()}
    missing = [f"blocks.{i}" for i in handle.blocks if not any(key.startswith(f"blocks.{i}.") for key in found)]
    if missing:
        raise CheckpointError(
            f"the state that was saved lacks STA of {', '.join(missing)}. Call handle.save_pretrained."
        )
    return found
