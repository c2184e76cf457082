"""LoRA beside STA: a backbone's recipe as a `peft.LoraConfig` with which an adapter can be saved and loaded again."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from peft import LoraConfig
from torch import nn

from sta_adapter.adapter.lora_options import ALL_LINEAR, OURS, LoraOptions, checked_options, named
from sta_adapter.adapter.lora_peft import peft_fields
from sta_adapter.attention.module import CHILD, TemporalAttention
from sta_adapter.compatibility.seams import peft_parts, peft_targets
from sta_adapter.errors import ConfigError
from sta_adapter.injection.backbone import Backbone, LoRARecipe
from sta_adapter.injection.contents import describe_adapter
from sta_adapter.injection.handle import STAHandle


def require_recipe(backbone: Backbone) -> LoRARecipe:
    """The backbone's recipe.

    Raises:
        ConfigError: it has none.
    """
    if backbone.lora is None:
        raise ConfigError(f"backbone {backbone.name!r} has no LoRA recipe; train stage 1, or add the recipe to it.")
    return backbone.lora


def recipe_targets(recipe: LoRARecipe, model: nn.Module) -> list[str]:
    """The recipe's names that a layer of this model has: the models of a family, and their releases, differ in them."""
    names = [name for name, _ in _layers(model)]
    return [target for target in recipe.target_modules if any(named((target,), name) for name in names)]


class STALoraConfig(LoraConfig):
    """A `peft.LoraConfig` that knows the STA beside it, so that a folder which PEFT itself saves can be loaded as what it is."""

    sta: Mapping[str, object] | None = None  # contents of `sta_config.json`

    def to_dict(self) -> dict[str, object]:
        """As PEFT has it, with the description of STA."""
        fields = super().to_dict()  # type: ignore[no-untyped-call]
        return {**fields, **({OURS: dict(self.sta)} if self.sta else {})}


def recipe_config(handle: STAHandle, overrides: Mapping[str, object]) -> LoraConfig:
    """See `STAHandle.lora_config`."""
    recipe = handle._injection.spec.lora
    if recipe is None and "target_modules" not in overrides:
        raise ConfigError(f"backbone {handle.backbone!r} has no LoRA recipe; pass target_modules=[...].")
    model = getattr(handle.model, "get_base_model", lambda: handle.model)()  # whose names PEFT takes
    fields: dict[str, Any] = {}
    if recipe is not None:
        fields = {"target_modules": recipe_targets(recipe, model), "r": recipe.r, "lora_alpha": recipe.lora_alpha}
        if "r" not in overrides and "target_modules" not in overrides:
            fields |= {"rank_pattern": dict(recipe.rank_pattern), "alpha_pattern": dict(recipe.alpha_pattern)}
    fields |= {"bias": "none", **overrides}
    known = inspect.signature(LoraConfig).parameters
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise ConfigError(f"LoraConfig has no field {', '.join(unknown)}; known: {', '.join(known)}.")
    if fields.get("target_parameters"):
        raise ConfigError(
            "LoRA's settings sets target_parameters, which PEFT sets by itself where a model has experts."
        )
    options = checked_options({"peft_type": "LORA", **fields}, "LoRA's settings", ConfigError)
    fields["modules_to_save"] = saved_with_sta(handle, model, fields.get("modules_to_save"))
    if isinstance(fields["target_modules"], str):
        if fields["target_modules"].lower() == ALL_LINEAR:
            fields["target_modules"] = _linear_layers(model)
        elif "exclude_modules" in known:
            fields.setdefault("exclude_modules", rf".*\.{CHILD}(\..*)?")
    chosen = LoraOptions({**options, **fields})
    targets = _require_linear(model, chosen)
    config = STALoraConfig(
        **peft_fields(chosen, {name: name for name in targets}, [name for name, _ in _layers(model)])
    )
    config.sta = describe_adapter(handle)
    return config


def saved_with_sta(handle: STAHandle, model: nn.Module, names: Collection[str] | None) -> list[str]:
    """LoRA's `modules_to_save` with STA, which is among them already where the vision encoder is trained whole.

    Raises:
        ConfigError: a part of the encoder is, or a name is also the end of those of layers inside STA.
    """
    others = {*(names or ())} - {CHILD}
    inner = [
        f"{CHILD}.{path}"
        for module in model.modules()
        if isinstance(module, TemporalAttention)
        for path, _ in module.named_modules()
        if path
    ]
    if within := sorted(name for name in others if any(path.endswith(name) for path in inner)):
        raise ConfigError(
            f"LoRA's settings: modules_to_save names {within[0]!r}, by which PEFT would also take a layer inside STA, which is trained whole anyway; "
            f"give more of the path, such as 'language_model.{within[0]}'."
        )
    options = LoraOptions({"modules_to_save": [*others]})
    whole = [module for name, module in model.named_modules() if options.is_saved(name)]
    inside = {id(part) for module in whole for part in module.modules()}
    covered = [index for index, block in handle.blocks.items() if id(block) in inside]
    if 0 < len(covered) < len(handle.blocks):
        raise ConfigError(
            f"LoRA's settings: modules_to_save names what holds STA of the blocks {covered} alone; name the whole encoder, or no block."
        )
    return sorted(others if covered else {CHILD, *others})


def targets_outside(model: nn.Module, config: LoraConfig) -> list[str] | str | None:
    """The `target_modules` of settings, named one by one where PEFT would also give LoRA to layers of what is trained whole.

    So it does before 0.16, though nothing computes with them.
    """
    targets, saved = config.target_modules, LoraOptions({"modules_to_save": [*(config.modules_to_save or ())]})
    if not targets or not peft_targets(LoraConfig(target_modules=["b"], modules_to_save=["a"]), ["a.b"]):
        return targets
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        return [name for name in _linear_layers(model) if not saved.is_saved(name)]
    found = sorted(peft_targets(config, [name for name, _ in model.named_modules() if name]))
    outside = [name for name in found if not saved.is_saved(name)]
    return targets if outside == found else outside


def _require_linear(model: nn.Module, options: LoraOptions) -> Collection[str]:
    """The modules that get LoRA."""
    targets = {name: module for name, module in _layers(model) if options.targets(name)}
    other = next((name for name, module in targets.items() if not isinstance(module, nn.Linear)), None)
    if other is not None:
        kind = type(targets[other]).__name__
        raise ConfigError(f"LoRA's settings: target_modules names {other!r}, a {kind}; expected linear layers.")
    if not targets:
        raise ConfigError("LoRA's settings: target_modules names no module of this model.")
    return targets


def _linear_layers(model: nn.Module) -> list[str]:
    """Names of the model's linear layers but the output layer, as PEFT's "all-linear" has it, and but STA's own."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    skipped = {
        id(part) for module in model.modules() if isinstance(module, TemporalAttention) for part in module.modules()
    }
    return [
        name
        for name, module in _layers(model)
        if isinstance(module, nn.Linear) and module is not head and id(module) not in skipped
    ]


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules, without what PEFT has put in: a second LoRA lies beside the first, not upon it."""
    kinds = peft_parts()
    wrappers = {name for name, module in model.named_modules() if isinstance(module, kinds)}
    for name, module in model.named_modules():
        if not any(name[:end] in wrappers for end, letter in enumerate(name) if letter == "."):
            yield name, module.get_base_layer() if isinstance(module, kinds[0]) else module
