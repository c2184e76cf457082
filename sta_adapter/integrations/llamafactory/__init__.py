"""STA in LLaMA-Factory: `python -m sta_adapter.integrations.llamafactory train config.yaml`.

It stands in the place of `llamafactory-cli` and takes the same commands, files and environment variables; a YAML file
may have STA's settings under `sta:`. LLaMA-Factory loads the model and builds LoRA by itself, so STA goes in where PEFT
begins.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Protocol, cast

from sta_adapter._lazy import importing
from sta_adapter.compatibility.releases import incompatible
from sta_adapter.errors import ConfigError
from sta_adapter.integrations import peft
from sta_adapter.integrations.callbacks import sta_callbacks
from sta_adapter.integrations.settings import Settings, merging_loses_sta

if TYPE_CHECKING:
    from transformers import TrainerCallback

__all__ = ["main", "run_exp"]

KEY = "sta"


def main() -> None:
    """Run one of LLaMA-Factory's commands with STA; its launcher starts this again for several processes."""
    with importing("LLaMA-Factory can't be imported ({}): pip install llamafactory"):
        from llamafactory import launcher
        from llamafactory.train import tuner
    own_run_exp, own_export = tuner.run_exp, tuner.export_model

    def export(args: object = None) -> None:
        refuse_merging(args)
        own_export(args)

    def run(args: object = None, callbacks: Sequence[TrainerCallback] | None = None) -> None:
        run_exp(args, callbacks, own_run_exp)

    tuner.run_exp, tuner.export_model = run, export
    if "LOCAL_RANK" in os.environ:  # a process that torchrun has started
        if sys.argv[1:2] == ["train"]:
            del sys.argv[1]
        run()
        return
    if "__file__" not in launcher.launch.__code__.co_names:
        raise incompatible("llamafactory", "llamafactory.launcher.launch starts its processes in another way")
    if sys.argv[1:2] == ["webui"]:
        raise ConfigError(
            "the web page starts llamafactory-cli by itself, which trains without STA: take the command train."
        )
    if sys.argv[1:2] != ["train"]:
        peft.install()  # what chats, serves and exports loads an adapter with its STA
    if sys.argv[1:2] in (["api"], ["chat"], ["webchat"]):
        _not_by_sglang(importlib.import_module("llamafactory.chat.chat_model"))
    launcher.__file__ = str(Path(__file__).with_name("__main__.py"))
    launcher.launch()


def run_exp(
    args: object = None,
    callbacks: Sequence[TrainerCallback] | None = None,
    own: Callable[[object, list[TrainerCallback]], None] | None = None,
) -> None:
    """LLaMA-Factory's `run_exp`, with STA.

    Args:
        args: as there: a mapping, or None to read the file named on the command line. `sta` in it holds our settings.
        callbacks: further ones.
        own: LLaMA-Factory's own `run_exp`.

    Raises:
        ConfigError: the settings don't fit.
    """
    from llamafactory.hparams.parser import read_args

    if own is None:
        own = importlib.import_module("llamafactory.train.tuner").run_exp
    values = read_args(args)
    settings = take_settings(values)
    peft.install(settings)
    try:
        own(values, [*sta_callbacks(settings), *(callbacks or [])])
    finally:
        peft.uninstall()


class _ModelSettings(Protocol):
    """What is used of LLaMA-Factory's settings of a model."""

    adapter_name_or_path: Sequence[str] | None
    adapter_folder: str | None
    model_revision: str


def _not_by_sglang(chat: ModuleType) -> None:
    """Have LLaMA-Factory's module that answers refuse the engine that would take LoRA alone from an adapter with STA."""
    own = chat.get_infer_args

    @functools.wraps(own)
    def get_infer_args(args: object = None) -> object:
        found = own(args)
        if found[0].infer_backend == "sglang" and _has_sta(found[0]):
            raise ConfigError(
                "infer_backend: sglang would answer by LoRA without its STA: take huggingface, or serve by vLLM (sta-adapter serve ADAPTER)."
            )
        return found

    chat.get_infer_args = get_infer_args  # type: ignore[attr-defined]


def _has_sta(model: _ModelSettings) -> bool:
    """Whether STA belongs to one of the adapters that LLaMA-Factory's settings of the model name."""
    within = {"subfolder": model.adapter_folder, "revision": model.model_revision}
    return any(peft.adapter_folder(name, within) for name in model.adapter_name_or_path or ())


def refuse_merging(args: object = None) -> None:
    """Refuse to export an adapter with STA; LoRA alone may go into the base. `args` are those of LLaMA-Factory's `export_model`."""
    from llamafactory.hparams import get_infer_args

    if _has_sta(get_infer_args(args)[0]):
        raise merging_loses_sta("llamafactory-cli export")


def take_settings(values: object) -> Settings:
    """Our settings out of LLaMA-Factory's, where they would be unknown; else those of STA_SETTINGS. A run without LoRA is refused."""
    given = values if isinstance(values, dict) else _of_words(cast("Sequence[str]", values))
    ours = values.pop(KEY, None) if isinstance(values, dict) else None
    settings = Settings.from_environment() if ours is None else Settings.from_mapping(ours)
    kind = given.get("finetuning_type", "lora")
    if kind != "lora":
        raise ConfigError(
            f"finetuning_type is {kind!r}, and STA goes in together with LoRA: set finetuning_type: lora."
        )
    if given.get("packing") and not given.get("neat_packing"):
        raise ConfigError(
            "packing without neat_packing lets the samples of a row attend to each other's clips: set neat_packing: true."
        )
    return settings


def _of_words(words: Sequence[str]) -> dict[str, object]:
    """Settings that were given on the command line, `--name value`, `--name=value` or `--name`, as a file would have them."""
    import yaml

    parts = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    pairs = zip(parts, [*parts[1:], "--"], strict=True)
    return {
        n[2:]: True if value.startswith("--") else yaml.safe_load(value) for n, value in pairs if n.startswith("--")
    }
