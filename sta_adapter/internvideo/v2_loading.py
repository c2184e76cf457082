"""InternVideo2-Chat from its published files, or from a folder that `save_pretrained` wrote."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import GenerationConfig, PretrainedConfig

from sta_adapter.errors import ConfigError
from sta_adapter.internvideo.files import TOKENIZER_FILES, WEIGHT_FILES, fetch_folder
from sta_adapter.internvideo.v2_config import MODEL_TYPE, read_config
from sta_adapter.internvideo.v2_model import InternVideo2Chat
from sta_adapter.internvideo.v2_weights import model_weights
from sta_adapter.internvideo.weights import dtype_of_weights, fill, iterate_weights, weight_files

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

    from sta_adapter.internvideo.chat_processor import ChatProcessor

__all__ = ["empty_model", "load_model", "load_processor"]

DTYPE = "dtype" if hasattr(PretrainedConfig(), "dtype") else "torch_dtype"  # what transformers calls it
OTHER_FILES = ("*/config.json", "bert/*", "bert-base-uncased/*")
"""A language model's configuration and the Q-Former's tokenizer, where a folder has them."""


def load_model(
    name: str | os.PathLike[str],
    config: Mapping[str, object],
    *,
    revision: str | None = None,
    dtype: torch.dtype | str = "auto",
    device: str = "cpu",
    quantization_config: BitsAndBytesConfig | None = None,
) -> nn.Module:
    """See `sta_adapter.internvideo.Builder`."""
    folder = fetch_folder(name, revision, (*WEIGHT_FILES, *TOKENIZER_FILES, *OTHER_FILES))
    if quantization_config is not None:
        if config.get("model_type") != MODEL_TYPE:
            raise ConfigError(
                f"the weights of {os.fspath(name)!r} have their published names, and can't be quantized while they are "
                "converted. Save the model once (load_model(...).save_pretrained(FOLDER), and the processor likewise), and load "
                "FOLDER."
            )
        options: dict[str, Any] = {DTYPE: dtype, "quantization_config": quantization_config, "device_map": {"": device}}
        quantized: InternVideo2Chat = InternVideo2Chat.from_pretrained(folder, **options)
        quantized.config._name_or_path = os.fspath(name)
        return quantized

    made = read_config(config, folder)
    with _Unallocated():
        model = InternVideo2Chat(made)
    weights = model_weights(iterate_weights(weight_files(folder)), made.lora_scale)
    fill(model, weights, source=folder, dtype=dtype_of_weights(dtype, config), device=device)
    made.lora_scale = None  # it is merged now
    made._name_or_path = os.fspath(name)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    found: nn.Module = model
    return found.to(device).eval()


def load_processor(
    name: str | os.PathLike[str], config: Mapping[str, object], revision: str | None = None
) -> ChatProcessor:
    """See `sta_adapter.internvideo.Builder`."""
    from sta_adapter.internvideo.v2_processor import InternVideo2ChatProcessor

    folder = fetch_folder(name, revision, (*TOKENIZER_FILES, *OTHER_FILES))
    return InternVideo2ChatProcessor.of_folder(folder, read_config(config, folder), str(name))


def empty_model(config: Mapping[str, object], folder: Path | None = None) -> nn.Module:
    """See `sta_adapter.internvideo.Builder`."""
    return InternVideo2Chat(read_config(config, folder))


class _Unallocated(TorchFunctionMode):
    """Weights that are made without a value are on the meta device; what is computed, as rotary frequencies, is real."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Collection[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        """See torch."""
        return func(*args, **{**(kwargs or {}), **({"device": "meta"} if func is torch.empty else {})})
