"""The line that serves an adapter with vLLM: the base, STA, and clips sampled and sized as in training."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

from sta_adapter.adapter.format import read_description
from sta_adapter.adapter.hub import resolve_adapter
from sta_adapter.adapter.lora_options import LoraOptions
from sta_adapter.adapter.lora_weights import LORA_CONFIG
from sta_adapter.adapter.safe_read import read_json
from sta_adapter.data.clip_reader import ClipReader
from sta_adapter.errors import ConfigError
from sta_adapter.injection.registry import get_backbone, in_vllm
from sta_adapter.integrations.vllm.frames import media_io_kwargs
from sta_adapter.integrations.vllm.refusals import check_positions
from sta_adapter.integrations.vllm.request import ADAPTER, ANY_BASE, REVISION

LORA_NAME = "adapted"  # what requests name as their model to get the LoRA weights
PLUGIN = "sta_adapter"


def serve_line(
    model: str,
    adapter: str,
    *,
    revision: str | None = None,
    any_base: bool = False,
    reader: ClipReader | None = None,
    extra: Sequence[str] = (),
) -> list[str]:
    """The words of the line; `extra` are further options of `vllm serve`, which must not be those that it sets.

    Base and adapter are folders or ids on the Hub, `revision` is of the adapter. The `reader` says how clips are read; None
    leaves vLLM's own way.
    """
    folder = resolve_adapter(adapter, revision)
    description = read_description(folder)
    backbone = get_backbone(description["backbone"])
    in_vllm(backbone)
    check_positions(folder, description, backbone)
    named = os.path.abspath(adapter) if os.path.isdir(adapter) else adapter
    overrides: dict[str, object] = {ADAPTER: named}
    overrides |= {REVISION: revision} if revision else {}
    overrides |= {ANY_BASE: True} if any_base else {}
    options = {"--hf-overrides": json.dumps(overrides)}
    if reader is not None:
        options["--media-io-kwargs"] = json.dumps(media_io_kwargs(reader))
    if reader is not None and reader.sizes_frames:
        options["--mm-processor-kwargs"] = json.dumps({"videos_kwargs": {"do_resize": False}})
    for name in options:
        if any(_stands_for(word, name) for word in extra):
            raise ConfigError(f"{name} is set by this command; run vllm serve yourself to set it otherwise.")
    line = ["vllm", "serve", model, *(word for pair in options.items() for word in pair)]
    if (folder / LORA_CONFIG).exists():
        rank = _largest_rank(LoraOptions.read(read_json(folder / LORA_CONFIG), folder / LORA_CONFIG))
        line += ["--enable-lora", "--enable-tower-connector-lora", "--max-lora-rank", str(rank)]
        # of the folder that was looked at: vLLM has no revision for LoRA weights
        line += ["--lora-modules", json.dumps({"name": LORA_NAME, "path": os.path.abspath(folder)})]
    return [*line, *extra]


def trained_reader(
    model: str, adapter: str, revision: str | None = None, *, model_revision: str | None = None
) -> ClipReader:
    """How the adapter's run read its clips; the published recipe where it isn't known."""
    from sta_adapter.loading import frames_in_force, load_processor

    settings = frames_in_force(model, adapter, revision=revision)
    return ClipReader.of(load_processor(model, revision=model_revision), settings)


def check_plugins(allowed: str | None) -> None:
    """Refuse an environment whose `VLLM_PLUGINS` leaves STA's plug-in out, which vLLM would do silently."""
    if allowed is not None and PLUGIN not in allowed.split(","):
        raise ConfigError(
            f"VLLM_PLUGINS is {allowed!r}, so that vLLM would serve the base without STA: add {PLUGIN}, or unset it."
        )


def _stands_for(word: str, option: str) -> bool:
    """Whether vLLM reads a word as this option: also shortened, with underscores, or as one field of its JSON behind a dot."""
    name = word.split("=")[0].split(".")[0].replace("_", "-")
    return name.startswith("--") and name != "--" and option.startswith(name)


def _largest_rank(options: LoraOptions) -> int:
    """VLLM takes one of a few values; the smallest that holds every rank."""
    ranks = [options.get("r", 8), *options.get("rank_pattern", dict[str, int]()).values()]
    return next((size for size in (8, 16, 32, 64, 128, 256, 320, 512) if size >= max(ranks)), max(ranks))
