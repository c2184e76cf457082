"""What an engine was asked for: the adapter that `hf_overrides` names, found, read and pinned before any weight loads.

`hf_overrides` become attributes of the base's configuration, which vLLM hands to each of its processes. The first one
to see them adds the digest of the adapter's files; in every other process, at a reload and on other machines the files
must have that digest again.
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from sta_adapter._validate import suggestion
from sta_adapter.adapter.base_model import MERGED_LORA
from sta_adapter.adapter.format import CONFIG, WEIGHTS, Description, read_description, read_weights, saved_config
from sta_adapter.adapter.hub import resolve_adapter
from sta_adapter.config import STAConfig
from sta_adapter.errors import CheckpointError, ConfigError, InjectionError
from sta_adapter.injection.backbone import Backbone
from sta_adapter.injection.registry import get_backbone, in_vllm

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ADAPTER = "sta_adapter"
REVISION = "sta_adapter_revision"
ANY_BASE = "sta_adapter_any_base"
DIGEST = "sta_adapter_digest"
SETTINGS = {ADAPTER: str, REVISION: str, ANY_BASE: bool}


@dataclasses.dataclass(frozen=True)
class ServedAdapter:
    """An adapter that an engine was asked for."""

    folder: Path  # where its files are on this machine
    description: Description  # contents of its `sta_config.json`
    digest: str  # of its files
    any_base: bool  # whether another base than the adapter names is taken, if it fits

    @property
    def backbone(self) -> Backbone:
        """The adapter's backbone as vLLM has it."""
        return in_vllm(get_backbone(self.description["backbone"]))

    @property
    def config(self) -> STAConfig:
        """STA's settings."""
        return saved_config(self.description, self.folder / CONFIG)


def asks_for_sta(hf_config: PretrainedConfig) -> bool:
    """Whether the engine was given an adapter; wrong settings, and settings without one, are refused."""
    found = {k: v for k, v in vars(hf_config).items() if k.replace("-", "_").startswith("sta_") and v is not None}
    for name, value in found.items():
        if name in (DIGEST, MERGED_LORA):
            continue
        if name not in SETTINGS:
            raise ConfigError(f"hf_overrides: there is no setting {name!r}. {suggestion(name, SETTINGS)}")
        if type(value) is not SETTINGS[name] or value == "":
            wanted = "a folder or the id of a repository on the Hub" if name == ADAPTER else SETTINGS[name].__name__
            raise ConfigError(f"hf_overrides: {name} is {value!r}, expected {wanted}.")
    given = [name for name in SETTINGS if name in found]
    if given and ADAPTER not in found:
        raise ConfigError(f"hf_overrides: {given[0]} is given, but no {ADAPTER}, which names the folder or repository.")
    return bool(given)


def requested(hf_config: PretrainedConfig) -> ServedAdapter:
    """The adapter that the engine was given; its digest is pinned in the configuration, and its files must be those pinned."""
    folder = resolve_adapter(hf_config.sta_adapter, getattr(hf_config, REVISION, None))
    description = read_description(folder)
    digest = adapter_digest(folder)
    pinned = getattr(hf_config, DIGEST, None)
    if pinned is None:
        read_weights(folder, description)
        setattr(hf_config, DIGEST, digest)
    elif pinned != digest:
        raise CheckpointError(
            f"the files of the adapter {hf_config.sta_adapter!r} changed while the engine ran: their digest was {pinned}, "
            f"now it is {digest}. Put the files back, or start a new engine; on several machines, copy the same files to all."
        )
    return ServedAdapter(folder, description, digest, bool(getattr(hf_config, ANY_BASE, False)))


def adapter_digest(folder: Path) -> str:
    """Of all that STA's output depends on: its weights and settings."""
    digest = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        try:
            digest.update((folder / name).read_bytes())
        except OSError as error:
            raise CheckpointError(f"{folder / name} can't be read: {error}.") from error
    return digest.hexdigest()[:16]


def check_architecture(adapter: ServedAdapter, architecture: str) -> None:
    """Refuse a base that has no tower of the adapter's kind in vLLM."""
    served = getattr(adapter.backbone.vllm, "architectures", {})
    if architecture not in served:
        raise InjectionError(
            f"the adapter in {adapter.folder} is for {adapter.description['backbone']!r}, which vLLM runs as "
            f"{' or '.join(served)}; the base is a {architecture}. Serve the base that it was trained on, by vLLM's own "
            "class (model_impl is 'auto' or 'vllm')."
        )
