"""Chat models whose code lies on the Hub only, put together from transformers' parts and the published weights.

No code that comes with a checkpoint is run.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, cast

from torch import nn

if TYPE_CHECKING:
    from sta_adapter.internvideo.chat_processor import ChatProcessor

__all__ = ["builder_of"]

BUILDERS = {
    "modeling_internvl_chat_hico2": "sta_adapter.internvideo.v2_5_loading",
    "internvideo2_5_chat": "sta_adapter.internvideo.v2_5_loading",
    "modeling_videochat2": "sta_adapter.internvideo.v2_loading",
    "internvideo2_chat": "sta_adapter.internvideo.v2_loading",
}
"""By the module that a published `auto_map` names for the model, or by the `model_type` that we save."""


class Builder(Protocol):
    """What a module in `BUILDERS` has."""

    def load_model(self, name: str | os.PathLike[str], config: Mapping[str, object], **options: object) -> nn.Module:
        """The model with its weights, on a device.

        Args:
            name: Hub id or folder.
            config: contents of its `config.json`.
            options: `revision`, a branch, tag or commit on the Hub; `dtype` of the weights, "auto" for that of the
                configuration, bfloat16 where it names none; `device`; `quantization_config` for bitsandbytes, only for
                folders that `save_pretrained` wrote.

        Raises:
            CheckpointError: files are missing or damaged, or weights don't fit the configuration.
            ConfigError: published weights are to be quantized.
        """

    def load_processor(
        self, name: str | os.PathLike[str], config: Mapping[str, object], revision: str | None
    ) -> ChatProcessor:
        """The model's processor, from published files or a folder that `save_pretrained` wrote."""

    def empty_model(self, config: Mapping[str, object]) -> nn.Module:
        """The model without weights, made on the device of the context that it is called in."""


def builder_of(config: Mapping[str, object]) -> Builder | None:
    """What makes the model that a `config.json` describes; None where transformers does so itself."""
    remote = config.get("auto_map")
    named = [str(value).split("--")[-1].split(".")[0] for value in remote.values()] if isinstance(remote, dict) else []
    for name in (config.get("model_type"), *named):
        if isinstance(name, str) and name in BUILDERS:
            return cast(Builder, importlib.import_module(BUILDERS[name]))
    return None
