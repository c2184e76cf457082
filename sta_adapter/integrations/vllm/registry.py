"""Our classes in vLLM's registry of models, and a look at each base that an engine is configured for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Protocol, cast

from sta_adapter.compatibility.calls import parameter_names
from sta_adapter.compatibility.releases import incompatible
from sta_adapter.errors import InjectionError
from sta_adapter.injection.registry import all_backbones
from sta_adapter.integrations.vllm.frames import register_loader
from sta_adapter.integrations.vllm.lora_requests import check_lora_requests
from sta_adapter.integrations.vllm.request import asks_for_sta, check_architecture, requested

MODELS = "sta_adapter.integrations.vllm.models"
INSPECT = ("architectures", "model_config")


class Registry(Protocol):
    """What is used of vLLM's registry of models."""

    models: Mapping[str, object]
    inspect_model_cls: Callable[[object, object], tuple[object, str]]

    def register_model(self, architecture: str, path: str, /) -> None:
        """Put a class, "module:Class", in an architecture's place."""


def architectures() -> dict[str, str]:
    """VLLM's class, "module:Class", of each architecture that a backbone names."""
    towers = [spec.vllm for spec in all_backbones() if spec.vllm is not None]
    return {name: path for tower in towers for name, path in tower.architectures.items()}


def register_models() -> None:
    """Put our classes in the place of vLLM's, and look at what engines are configured for."""
    registry = model_registry()
    for name in architectures():
        registry.register_model(name, f"{MODELS}:{name}")
    register_loader()
    check_lora_requests()
    if not isinstance(registry.inspect_model_cls, _Inspecting):
        registry.inspect_model_cls = _Inspecting(registry, registry.inspect_model_cls)


def model_registry() -> Registry:
    """VLLM's registry, with the methods that we use; a CompatibilityError where it has others."""
    import vllm

    registry = cast(Registry, getattr(vllm, "ModelRegistry", None))
    if not all(callable(getattr(registry, name, None)) for name in ("register_model", "inspect_model_cls")):
        raise incompatible("vllm", "vllm.ModelRegistry has no register_model or inspect_model_cls")
    if not isinstance(getattr(registry, "models", None), dict):
        raise incompatible("vllm", "vllm.ModelRegistry has no dict of models")
    inspect = getattr(registry.inspect_model_cls, "original", registry.inspect_model_cls)
    if (found := parameter_names(inspect, "ModelRegistry.inspect_model_cls", "vllm")) != INSPECT:
        raise incompatible("vllm", f"ModelRegistry.inspect_model_cls takes {', '.join(found)}")
    return registry


class _Inspecting:
    """vLLM's `inspect_model_cls`, which it calls while it configures an engine: bad requests end there."""

    def __init__(self, registry: Registry, original: Callable[[object, object], tuple[object, str]]) -> None:
        self.registry = registry
        self.original = original
        functools.update_wrapper(self, original)

    def __call__(self, architectures: object, model_config: object) -> tuple[object, str]:
        found = self.original(architectures, model_config)
        hf_config = getattr(model_config, "hf_config", None)
        if hf_config is not None and asks_for_sta(hf_config):
            adapter = requested(hf_config)
            check_architecture(adapter, found[1])
            module = getattr(self.registry.models.get(found[1]), "module_name", None)
            if module != MODELS:
                raise InjectionError(
                    f"vLLM runs {found[1]} by the class in {module or 'an unknown module'}, which another plug-in has "
                    "registered, so STA can't be served. Leave that plug-in out (VLLM_PLUGINS names those to load)."
                )
        return found
