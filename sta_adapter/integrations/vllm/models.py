"""vLLM's own model classes, with the STA of an adapter in their vision tower.

The attributes of this module are made when they are asked for: `models.Qwen2VLForConditionalGeneration` is a subclass
of vLLM's class of that name.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from sta_adapter.compatibility.seams import incompatible, parameter_names
from sta_adapter.integrations.vllm.identifiers import with_digest
from sta_adapter.integrations.vllm.registry import architectures
from sta_adapter.integrations.vllm.serving import ServedSTA, put_sta


def __getattr__(name: str) -> type:
    known = architectures()
    if name not in known:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return serving_class(known[name])


@functools.cache
def serving_class(path: str) -> type:
    """A subclass of vLLM's model at "module:Class" that serves STA where the engine was asked to.

    Raises:
        CompatibilityError: there is no such class, or it is built or loaded otherwise.
    """
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
