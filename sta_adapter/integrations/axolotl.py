"""STA in axolotl: `plugins: [sta_adapter.integrations.axolotl.STAPlugin]` in the YAML, and STA's settings under `sta:`.

LoRA is the YAML's own; `adapter: lora` must be there.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel
from torch import nn
from transformers import TrainerCallback, set_seed

from sta_adapter.adapter.format import read_description
from sta_adapter.attention.module import CHILD
from sta_adapter.config import STAConfig
from sta_adapter.errors import ConfigError
from sta_adapter.injection.inject import inject_sta
from sta_adapter.injection.target import widen
from sta_adapter.integrations.callbacks import sta_callbacks
from sta_adapter.integrations.settings import Settings, merging_loses_sta, prepare_model

if TYPE_CHECKING:
    from axolotl.utils.dict import DictDefault

__all__ = ["STAArgs", "STAPlugin"]

PACKING = ("sample_packing", "eval_sample_packing", "batch_flattening")


class STAArgs(BaseModel):
    """What the YAML may say: `sta`, a mapping."""

    sta: dict[str, Any] | None = None


class STAPlugin(BasePlugin):
    """Puts STA into the model before LoRA, has LoRA train and save it, and the run watched."""

    def register(self, cfg: DictDefault) -> None:
        """Refuse what can't be trained, or merged, before anything is loaded."""
        take_settings(cfg)
        if cfg.get("merge_lora"):
            raise merging_loses_sta("axolotl merge-lora")

    def get_input_args(self) -> str | None:
        """Where axolotl finds the YAML's further fields."""
        return f"{__name__}.STAArgs"

    def pre_lora_load(self, cfg: DictDefault, model: nn.Module) -> None:
        """Put STA in; an adapter that goes on (`lora_model_dir`) has its own settings."""
        settings = take_settings(cfg)
        set_seed(42 if cfg.seed is None else cfg.seed)  # axolotl leaves the start of LoRA and STA to chance
        if cfg.lora_model_dir:
            description = read_description(Path(cfg.lora_model_dir))
            settings.require_branch(description["config"], f"the adapter {str(cfg.lora_model_dir)!r}")
            widen(inject_sta(model, STAConfig.from_dict(description["config"])).parameters())
        else:
            handle, lora = prepare_model(model, settings)
            if lora is None or handle.model is not model:
                raise ConfigError(
                    f"the adapter {settings.adapter!r} has LoRA weights: go on with lora_model_dir instead."
                )
        cfg["lora_modules_to_save"] = sorted({CHILD, *(cfg.lora_modules_to_save or [])})

    def add_callbacks_pre_trainer(self, cfg: DictDefault, model: nn.Module) -> list[TrainerCallback]:
        """Those that save the adapter and look at STA's gradients."""
        return sta_callbacks(take_settings(cfg))


def take_settings(cfg: DictDefault) -> Settings:
    """STA's settings in a configuration of axolotl, else those of STA_SETTINGS; a run that STA can't train in is refused."""
    given = cfg.get("sta")
    settings = Settings.from_environment() if given is None else Settings.from_mapping(given)
    if settings.stage == 1:
        raise ConfigError(
            "stage 1 has no LoRA, which axolotl's plug-ins for adapters need: train stage 1 by `sta-adapter train --stage 1`, and go "
            "on from its folder with sta: {adapter: FOLDER}."
        )
    if cfg.get("adapter") not in ("lora", "qlora"):
        raise ConfigError(
            f"adapter is {cfg.get('adapter')!r} in the YAML, and STA is saved together with LoRA: set adapter: lora."
        )
    if cfg.get("rl"):
        raise ConfigError(
            f"rl is {cfg['rl']!r} in the YAML, and axolotl's preference and reinforcement learning hands no clips to the model: leave rl "
            "out, or train by DPO in TRL, ms-swift or LLaMA-Factory."
        )
    if cfg.get("freeze_mm_modules"):
        raise ConfigError(
            "freeze_mm_modules is true in the YAML and would freeze STA, which is in the vision encoder: leave it out."
        )
    for name in PACKING:
        if cfg.get(name):
            raise ConfigError(
                f"{name} is {cfg[name]!r} in the YAML, and axolotl packs texts without clips: set {name}: false."
            )
    return settings
