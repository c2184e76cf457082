"""Every seam of `sta_adapter.compatibility` as it is on this machine."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

from torch import nn

from sta_adapter.attention import xformers_kernels
from sta_adapter.compatibility import checkpointing, processors
from sta_adapter.compatibility.calls import known_parameters
from sta_adapter.compatibility.position_seams import (
    ROPE_INDEX,
    cached_tokens,
    has_frequency_method,
    has_generation_method,
)
from sta_adapter.compatibility.releases import incompatible, version
from sta_adapter.compatibility.seams import (
    HOOK_OPTIONS,
    HOOK_TABLES,
    LOAD_HOOKS,
    active_ddp,
    disable_dynamo,
    graph_task,
    has_adapter,
    hook_table,
    peft_hook,
    peft_parts,
)
from sta_adapter.errors import STAError
from sta_adapter.integrations.vllm.lora_requests import lora_reader
from sta_adapter.integrations.vllm.registry import model_registry


class Seam(NamedTuple):
    """One seam as it is on this machine: `found` is "as tested", "not installed" or how it differs."""

    name: str
    package: str
    found: str

    @property
    def differs(self) -> bool:
        """Whether it is neither as tested nor absent with its package."""
        return self.found not in ("as tested", "not installed")


def _qwen2_vl() -> ModuleType:
    return importlib.import_module("transformers.models.qwen2_vl.modeling_qwen2_vl")


def _look_at_cache() -> None:
    model = _qwen2_vl().Qwen2VLModel
    cached_tokens(model.forward, "Qwen2VLModel.forward", {})


def _look_at_rope_index() -> None:
    model = _qwen2_vl().Qwen2VLModel
    if hasattr(model, ROPE_INDEX):  # before 4.52 it is the head's, where no other rule is put in
        known_parameters(
            getattr(model, ROPE_INDEX),
            f"Qwen2VLModel.{ROPE_INDEX}",
            ("self", "input_ids", "image_grid_thw", "video_grid_thw", "attention_mask"),
            ("mm_token_type_ids",),
        )


def _look_at_checkpointing() -> None:
    model = _qwen2_vl().Qwen2VLForConditionalGeneration
    checkpointing.checkpointing_methods(model)
    if not any(hasattr(model, name) for name in checkpointing.PROPERTIES):
        raise incompatible("transformers", f"{model.__name__} has neither {' nor '.join(checkpointing.PROPERTIES)}")


def _look_at_processors() -> None:
    transformers = importlib.import_module("transformers")
    kind = getattr(transformers, "Qwen2VLVideoProcessor", None) or transformers.Qwen2VLImageProcessor
    if not processors.Sizes.of(kind()).packs:
        raise incompatible("transformers", f"{kind.__name__} doesn't say that it packs patches")


def _look_at_hooks() -> None:
    module = nn.Identity()
    for name in (*HOOK_TABLES, *HOOK_OPTIONS, LOAD_HOOKS):
        hook_table(module, name)


def _look_at_xformers() -> None:
    try:
        xformers_kernels.import_xformers()
    except xformers_kernels.XformersUnusable as error:
        raise incompatible("xformers", str(error)) from error


def _look_at_vllm() -> None:
    model_registry()
    lora_reader()


_LOOKS: dict[str, tuple[str, Callable[[], object]]] = {
    "number of the backward pass": ("torch", graph_task),
    "functions outside of torch.compile": ("torch", disable_dynamo),
    "hook tables of a module": ("torch", _look_at_hooks),
    "the DDP module at work": ("torch", active_ddp),
    "a forward's cache": ("transformers", _look_at_cache),
    "get_rope_index": ("transformers", _look_at_rope_index),
    "positions for generation": (
        "transformers",
        lambda: has_generation_method(_qwen2_vl().Qwen2VLForConditionalGeneration),
    ),
    "rotary frequencies": ("transformers", lambda: has_frequency_method(_qwen2_vl().Qwen2VLRotaryEmbedding)),
    "checkpointing methods and flags": ("transformers", _look_at_checkpointing),
    "the trainer's flag for adapters": (
        "transformers",
        lambda: has_adapter(_qwen2_vl().Qwen2VLForConditionalGeneration),
    ),
    "sizes that processors tell": ("transformers", _look_at_processors),
    "layers and copies of PEFT": ("peft", peft_parts),
    "PEFT's hook before LoRA": ("peft", peft_hook),
    "xformers' CUDA build": ("xformers", _look_at_xformers),
    "vLLM's registry of models": ("vllm", _look_at_vllm),
}


def seams() -> list[Seam]:
    """Every seam as it is here."""
    found = []
    for name, (package, look) in _LOOKS.items():
        state = "as tested"
        if version(package) == "not installed":
            state = "not installed"
        else:
            try:
                look()
            except (STAError, ImportError, AttributeError) as error:
                state = str(error)
        found.append(Seam(name, package, state))
    return found
