"""The options that several commands share, as their functions get them; `RUN_OPTIONS` and `FLAGS` are names of a `Run`'s."""

from __future__ import annotations

from typing import TypedDict


class ModelOptions(TypedDict):
    """What `model_options` and `adapter_options` add to a command that has --device."""

    device: str | None
    revision: str | None
    positions: str | None
    trust_remote_code: bool
    dtype: str | None
    any_base: bool
    adapter_revision: str | None


class Run(TypedDict):
    """A run's own options, those of `sta-adapter train` that are no settings; None for what was not given."""

    model: str
    revision: str | None
    dtype: str | None
    quantize: str | None
    attn_implementation: str | None
    positions: str | None
    adapter: str | None
    adapter_revision: str | None
    data: str | list[str]
    eval_data: str | None
    videos: str | None
    format: str | None
    cache: str | None
    out: str
    stage: str
    overwrite: bool
    trust_remote_code: bool
    dry_run: bool
    any_base: bool


RUN_OPTIONS = tuple(Run.__annotations__)
FLAGS = ("overwrite", "trust_remote_code", "dry_run", "any_base")
