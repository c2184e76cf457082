"""The model that a command works on: where it and its adapter come from, and how they are loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sta_adapter.cli.options import base_model_of

if TYPE_CHECKING:
    from torch import nn

    from sta_adapter.compatibility.processors import Processor


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """A base and its adapter, of which nothing is loaded yet: what `load_model` and `load_adapter` are to be given."""

    model: str
    revision: str | None = None
    trust_remote_code: bool = False
    dtype: str = "auto"
    quantize: str | None = None
    positions: str | None = None
    attn_implementation: str | None = None
    adapter: Path | None = None
    any_base: bool = False

    @classmethod
    def of(cls, options: Mapping[str, object], adapter: Path | None) -> ModelSource:
        """The one that a command's options name, with the adapter's folder (of `find_adapter`)."""
        names = {entry.name for entry in dataclasses.fields(cls)}
        given = {name: value for name, value in options.items() if name in names and value is not None}
        return cls(**{**given, "adapter": adapter})  # type: ignore[arg-type]

    def load_processor(self) -> Processor:
        """The base's processor."""
        from sta_adapter.loading import load_processor

        return load_processor(self.model, revision=self.revision, trust_remote_code=self.trust_remote_code)

    def load(self, device: str | None, is_trainable: bool = False) -> nn.Module:
        """The base with its text positions and, if there is one, its adapter."""
        from sta_adapter.loading import load_model, with_adapter

        net = load_model(
            self.model,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
            dtype=self.dtype,
            device=device,
            quantize=self.quantize,
            attn_implementation=self.attn_implementation,
        )
        how = {"positions": self.positions, "base_model": base_model_of(self.any_base)}
        return with_adapter(net, self.adapter, is_trainable=is_trainable, **how)
