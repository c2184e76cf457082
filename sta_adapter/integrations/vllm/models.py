"""vLLM's own model classes, with the STA of an adapter in their vision tower.

The attributes of this module are made when they are asked for: `models.Qwen2VLForConditionalGeneration` is a subclass
of vLLM's class of that name. The identifiers of pictures and videos, which key vLLM's caches of encoder outputs and of
prefixes, are made of the base's name and the content, or come with the request: they get the adapter's digest, so that
another adapter's features are never taken for this one's where engines share a cache.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from sta_adapter.compatibility.calls import parameter_names
from sta_adapter.compatibility.releases import incompatible
from sta_adapter.integrations.vllm.registry import architectures
from sta_adapter.integrations.vllm.request import DIGEST, asks_for_sta, requested
from sta_adapter.integrations.vllm.serving import ServedSTA, put_sta

FACTORIES = "_processor_factory"
HASHES = "_get_mm_hashes"


def __getattr__(name: str) -> type:
    known = architectures()
    if name not in known:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return serving_class(known[name])


@functools.cache
def serving_class(path: str) -> type:
    """A subclass of vLLM's model at "module:Class" that serves STA where the engine was asked to."""
    module, name = path.split(":")
    try:
        base: Any = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise incompatible("vllm", f"there is no {path} ({error})") from error
    if not {"vllm_config", "prefix"} <= set(parameter_names(base.__init__, f"{name}.__init__", "vllm")):
        raise incompatible("vllm", f"{name} is not built from a vllm_config and a prefix")
    if parameter_names(base.load_weights, f"{name}.load_weights", "vllm") != ("self", "weights"):
        raise incompatible("vllm", f"{name}.load_weights takes other arguments than weights")

    class Serving(base):
        sta_served: ServedSTA | None = None

        def __init__(self, *, vllm_config: object, prefix: str = "") -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            self.sta_served = put_sta(self, vllm_config)

        def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str] | None:
            if self.sta_served is not None:
                weights = self.sta_served.of_the_base(weights)
            loaded: set[str] | None = super().load_weights(weights)
            if self.sta_served is None:
                return loaded
            names = self.sta_served.load()
            return None if loaded is None else set(loaded) | names

        def get_submodule(self, target: str) -> nn.Module:
            """Also how a reload in vLLM's kernel format, which passes by `load_weights`, finds where it writes."""
            if self.sta_served is not None:
                self.sta_served.refuse_sent(target)
            found: nn.Module = super().get_submodule(target)
            return found

        def train(self, mode: bool = True) -> Serving:
            """Also how vLLM's loaders end, by `eval()`, once all weights have their final form."""
            done = super().train(mode)
            if not mode and self.sta_served is not None:
                self.sta_served.check()
            return done

    Serving._processor_factory = with_digest(base)
    Serving.__name__ = Serving.__qualname__ = name
    Serving.__module__ = __name__
    return Serving


def with_digest(model_class: type) -> object:
    """The processor factories of vLLM's class, whose processors put the digest behind each identifier."""
    factories: Any = getattr(model_class, FACTORIES, None)
    is_known = dataclasses.is_dataclass(factories) and callable(getattr(factories, "processor", None))
    if not is_known:
        raise incompatible("vllm", f"{model_class.__name__} has no {FACTORIES} with a processor")
    build = factories.processor

    def processor(info: Any, *args: object, **kwargs: object) -> object:
        made = build(info, *args, **kwargs)
        hf_config = info.ctx.model_config.hf_config
        if asks_for_sta(hf_config):
            add_digest(made, getattr(hf_config, DIGEST, None) or requested(hf_config).digest)
        return made

    return dataclasses.replace(factories, processor=processor)


def add_digest(processor: object, digest: str) -> None:
    """Put the digest behind each identifier that a processor makes."""
    original = getattr(processor, HASHES, None)
    if not callable(original):
        raise incompatible("vllm", f"{type(processor).__name__} has no {HASHES}")

    def hashes(inputs: object) -> dict[str, list[str]]:
        found = original(inputs)
        try:
            return {kind: [f"{name}-sta-{digest}" for name in names] for kind, names in found.items()}
        except (AttributeError, TypeError) as error:
            raise incompatible("vllm", f"{HASHES} gave a {type(found).__name__} ({error})") from error

    setattr(processor, HASHES, hashes)
