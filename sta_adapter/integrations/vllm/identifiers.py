"""The identifiers of pictures and videos, which key vLLM's caches of encoder outputs and of prefixes, carry the adapter's digest.

vLLM makes them of the base's name and the content, or takes those of the request, so that another adapter's features
could be taken for this one's where engines share a cache.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from sta_adapter.compatibility.seams import incompatible
from sta_adapter.integrations.vllm.request import DIGEST

FACTORIES = "_processor_factory"
HASHES = "_get_mm_hashes"


def with_digest(model_class: type) -> object:
    """The processor factories of vLLM's class, whose processors put the digest behind each identifier.

    Raises:
        CompatibilityError: the class has no such factories.
    """
    factories: Any = getattr(model_class, FACTORIES, None)
    is_known = dataclasses.is_dataclass(factories) and callable(getattr(factories, "processor", None))
    if not is_known:
        raise incompatible("vllm", f"{model_class.__name__} has no {FACTORIES} with a processor")
    build = factories.processor

    def processor(info: Any, *args: object, **kwargs: object) -> object:
        made = build(info, *args, **kwargs)
        digest = getattr(info.ctx.model_config.hf_config, DIGEST, None)
        if digest is not None:
            add_digest(made, digest)
        return made

    return dataclasses.replace(factories, processor=processor)


def add_digest(processor: object, digest: str) -> None:
    """Put the digest behind each identifier that a processor makes.

    Raises:
        CompatibilityError: it makes them otherwise.
    """
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
