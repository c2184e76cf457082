"""VLLMTower: what a backbone declares about the same encoder in vLLM."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class VLLMTower:
    """The same encoder in vLLM, which has model classes of its own; see `sta_adapter.integrations.vllm`.

    Attributes:
        architectures: by the name of an architecture in a base's `config.json`, vLLM's class for it, "module:Class".
        changes: fields of the `Backbone` that differ there.
        text_positions: the rule by which vLLM numbers text beside clips, where there are several.
        splits_clips: whether vLLM's data-parallel mode for encoders gives frames of one clip to different ranks.
    """

    architectures: Mapping[str, str]
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    text_positions: str | None = None
    splits_clips: bool = False
