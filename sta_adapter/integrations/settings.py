"""How a training tool is told what to do with STA, and the model made ready for it.

The settings are one mapping: fields of `STAConfig`, and beside them `stage`, `adapter` and
`patience`. It stands under `sta:` in the YAML of tools that have one, or in the environment variable STA_SETTINGS.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from sta_adapter._validate import unknown_names
from sta_adapter.config import STAConfig
from sta_adapter.errors import ConfigError
from sta_adapter.injection.handle import STAHandle, get_sta
from sta_adapter.injection.inject import inject_sta
from sta_adapter.injection.load import load_sta
from sta_adapter.injection.target import widen

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = ["Settings", "merging_loses_sta", "prepare_model"]

VARIABLE = "STA_SETTINGS"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to do with STA in a tool's run.

    Attributes:
        config: of the branch; None for the backbone's defaults. Not together with `adapter`, which has its own.
        stage: 1 trains STA alone, 2 trains it with LoRA beside it.
        adapter: folder or Hub id of an adapter to start from, such as stage one's for stage two.
        patience: after how many steps without a gradient for STA the run ends; see `RequireGradient`.
    """

    config: STAConfig | None = None
    stage: int = 2
    adapter: str | None = None
    patience: int = 10

    def __post_init__(self) -> None:
        if isinstance(self.stage, bool) or self.stage not in (1, 2):
            raise ConfigError(f"stage={self.stage!r}: expected 1 (STA alone) or 2 (STA and LoRA); a run is one stage.")
        if isinstance(self.patience, bool) or not isinstance(self.patience, int) or self.patience < 1:
            raise ConfigError(f"patience={self.patience!r}: expected a whole number of steps above 0.")
        if self.adapter is not None and (not isinstance(self.adapter, str | os.PathLike) or not str(self.adapter)):
            raise ConfigError(f"adapter={self.adapter!r}: expected a folder or the id of an adapter on the Hub.")
        if self.adapter is not None and self.config is not None and self.config.given:
            fields = ", ".join(sorted(self.config.given))
            raise ConfigError(f"{fields} and adapter exclude each other: the adapter {self.adapter!r} has its own.")

    def require_branch(self, saved: object, where: str) -> None:
        """That what is said of the branch is so in what is trained on, which has its own fields.

        Args:
            saved: these fields, as `STAConfig.to_dict` gives them.
            where: what has them, for the message.

        Raises:
            ConfigError: they differ.
        """
        there, asked = STAConfig.from_dict(saved).to_dict(), self.config or STAConfig()
        differ = [name for name in sorted(asked.given) if asked.to_dict()[name] != there[name]]
        if differ:
            found = ", ".join(f"{name} {there[name]!r} (not {asked.to_dict()[name]!r})" for name in differ)
            raise ConfigError(f"{where} has {found}, and goes on with that; leave it out of STA's settings.")

    @classmethod
    def from_mapping(cls, values: Mapping[str, object] | None) -> Settings:
        """Settings from one mapping, such as what stands under `sta:` in a YAML file.

        Raises:
            ConfigError: a name is unknown (all are named), or a value is of the wrong type or out of range.
        """
        if values is None:
            return cls()
        if not isinstance(values, Mapping):
            raise ConfigError(f"the settings of STA are {values!r}, expected a mapping such as {{stage: 1}}.")
        own = {field.name for field in dataclasses.fields(cls)} - {"config"}
        branch = {field.name for field in dataclasses.fields(STAConfig)}
        if unknown := [name for name in values if name not in own | branch]:
            known = sorted(own | branch)
            raise ConfigError(f"unknown setting {unknown_names(unknown, known)}; known: {', '.join(known)}.")
        fields = {name: value for name, value in values.items() if name in branch}
        rest: dict[str, Any] = {name: value for name, value in values.items() if name in own}
        return cls(config=STAConfig.from_dict(fields) if fields else None, **rest)

    @classmethod
    def from_environment(cls) -> Settings:
        """Settings from STA_SETTINGS: a mapping in YAML or JSON, or the path of a file with one.

        Raises:
            ConfigError: it is neither, or as `from_mapping`.
        """
        import yaml

        text = os.environ.get(VARIABLE, "").strip()
        try:
            if text and "{" not in text and ":" not in text.replace(":\\", ""):
                with open(text, encoding="utf-8") as file:
                    text = file.read()
            return cls.from_mapping(yaml.safe_load(text) if text else None)
        except (OSError, UnicodeDecodeError, yaml.YAMLError, ConfigError) as error:
            raise ConfigError(f"{VARIABLE}={os.environ.get(VARIABLE)!r}: {error}") from error


def merging_loses_sta(command: str) -> ConfigError:
    """The error for a tool's command that writes a base with LoRA merged in: no base's own class has a place for STA."""
    return ConfigError(
        f"{command} writes the base model with LoRA in its weights, of which whoever loads it leaves STA out. Write both: sta-adapter "
        "export ADAPTER OUT --merge-lora BASE; then OUT/base is the model, and OUT/sta its adapter."
    )


def prepare_model(model: nn.Module, settings: Settings, **lora: object) -> tuple[STAHandle, LoraConfig | None]:
    """Put STA into a model that a tool has loaded, as the settings say; it trains in float32 on a base in 16 bits, as PEFT's LoRA does.

    Args:
        model: the base model, or one that has STA already.
        settings: as said.
        lora: fields of `LoraConfig` in the place of the recipe's.

    Returns:
        The handle, and the LoRA to add to `handle.model`; None in stage one, and where the adapter that the run starts
        from brought its own LoRA, which goes on training.

    Raises:
        ConfigError: the settings don't fit each other, the model or the adapter.
        STAError: as `inject_sta` and `load_sta`.
    """
    handle = get_sta(model)
    if handle is not None and (settings.adapter or settings.config):
        raise ConfigError("the model has STA already; leave out adapter and STA's fields, or pass the base model.")
    if handle is None and settings.adapter is not None:
        handle = load_sta(model, settings.adapter, is_trainable=True)
    elif handle is None:
        handle = inject_sta(model, settings.config)
    widen(handle.parameters())
    has_lora = bool(getattr(handle.model, "peft_config", None))
    if settings.stage == 1:
        if has_lora:
            where = f"the adapter {settings.adapter!r}" if settings.adapter else "the model"
            raise ConfigError(f"{where} has LoRA weights, and stage 1 trains STA alone; go on with stage 2.")
        if lora:
            raise ConfigError(f"{', '.join(sorted(lora))}: stage 1 trains STA alone, without LoRA; leave that out.")
        return handle.freeze_base(), None
    if has_lora:
        if lora:
            raise ConfigError(f"{', '.join(sorted(lora))}: the LoRA that is there goes on as it is; leave that out.")
        return handle, None
    return handle, handle.lora_config(**lora)
