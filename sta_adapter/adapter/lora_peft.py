"""LoRA between PEFT and a file, alike with every release of PEFT.

Releases differ in which module a pattern means, which modules have LoRA, and how an adapter's name is told from a module's.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from torch import Tensor, nn

from sta_adapter.adapter.lora_keys import PREFIX, is_embedding
from sta_adapter.adapter.lora_options import CHECKS, LoraOptions, is_off, named
from sta_adapter.attention.module import CHILD
from sta_adapter.compatibility.module_names import name_in_state
from sta_adapter.compatibility.releases import version
from sta_adapter.compatibility.seams import peft_parts, peft_targets
from sta_adapter.errors import CheckpointError

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PretrainedConfig

CHOOSING = ("exclude_modules", "layers_to_transform", "layers_pattern")  # which modules get LoRA
NOT_LINEAR = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # that PEFT's LoRA takes as well


class LoraLayer(Protocol):
    """What is used of PEFT's wrapper around a layer."""

    def get_base_layer(self) -> nn.Module:
        """That layer."""


Fields = dict[str, Any]  # of a `LoraConfig`
Values = Mapping[str, tuple[int, float]]  # rank and alpha by module


def peft_config(
    options: LoraOptions, is_trainable: bool, modules: Mapping[str, str], names: Iterable[str], renamed: bool = False
) -> LoraConfig:
    """The `peft.LoraConfig` of options.

    Args:
        options: those of a file.
        is_trainable: whether to go on training.
        modules: the modules with LoRA, from this model's names to those that the options have for them.
        names: of all modules of this model.
        renamed: whether these differ, so that PEFT must be told the modules one by one.

    Raises:
        CheckpointError: the installed PEFT lacks one of the options.
    """
    from peft import LoraConfig

    fields = peft_fields(options, modules, names, renamed)
    if missing := sorted(set(fields) - _known()):
        raise CheckpointError(f"peft {version('peft')} has no option {', '.join(missing)}: pip install -U peft")
    return LoraConfig(**{**fields, "init_lora_weights": True, "inference_mode": not is_trainable})


def peft_fields(
    options: LoraOptions, modules: Mapping[str, str], names: Iterable[str], renamed: bool = False
) -> Fields:
    """The options as they are; where a release of PEFT would read them otherwise, those that each reads as we do.

    The arguments are those of `peft_config`.
    """
    known = _known()
    fields: Fields = {k: v for k, v in options.fields.items() if k in known or not is_off(v)}
    if renamed or not _chosen_alike(options, fields, modules, names):
        fields = {k: v for k, v in fields.items() if k not in CHOOSING} | {"target_modules": list(modules)}
    if renamed or not _scaled_alike(options, modules):
        fields |= _patterns(options, {ours: (options.rank(n), options.alpha(n)) for ours, n in modules.items()})
    return fields


def _known() -> set[str]:
    from peft import LoraConfig

    return {field.name for field in dataclasses.fields(LoraConfig)}


def _chosen_alike(options: LoraOptions, fields: Fields, modules: Iterable[str], names: Iterable[str]) -> bool:
    """Whether the installed PEFT gives LoRA to the same modules.

    Before 0.16 it also does to what lies in a module that is trained whole, and the index of a layer is the last number
    of its name before 0.20, the first since.
    """
    names, ours = [name for name in names if name], set(modules)
    matched = {name for name in names if named(options.names["target_modules"], name)}
    if matched == ours and all(fields.get(name) is None for name in CHOOSING):
        return True
    if set(fields) - _known():
        return False
    from peft import LoraConfig

    return peft_targets(LoraConfig(**fields), names) == ours


def _scaled_alike(options: LoraOptions, modules: Iterable[str]) -> bool:
    """Whether all releases find the same ranks and alphas.

    Before 0.15 PEFT takes a pattern with a choice for two halves, and before 0.14 the alpha of the pattern that gave the rank.
    """
    ranks, alphas = options.get("rank_pattern", dict[str, int]()), options.get("alpha_pattern", dict[str, float]())
    patterns = {**ranks, **alphas}
    plain = (options.get("r", 8), options.get("lora_alpha", 8.0))
    for name in modules if patterns else ():
        key = next((key for key in patterns if re.match(rf".*\.{key}$", name)), name)
        if (ranks.get(key, plain[0]), alphas.get(key, plain[1])) != (options.rank(name), options.alpha(name)):
            return False
    return True


def _patterns(options: LoraOptions, values: Values) -> Fields:
    """`rank_pattern` and `alpha_pattern` by the shortest ends of names that all releases read alike."""
    of_end: dict[str, set[tuple[int, float]]] = {}
    for name, value in values.items():
        for end in _ends(name):
            of_end.setdefault(end, set()).add(value)
    ends = {next((end for end in _ends(name) if len(of_end[end]) == 1), name): value for name, value in values.items()}
    parameters = options.get("target_parameters", list[str]())  # which the patterns are of, too
    kept = options.fields if parameters else {}
    if not parameters:
        plain = options.get("r", 8), float(options.get("lora_alpha", 8.0))
        ends = {end: value for end, value in ends.items() if value != plain}
    return {
        name: {**{end: value[i] for end, value in ends.items()}, **cast("dict[str, float]", kept.get(name) or {})}
        for i, name in enumerate(("rank_pattern", "alpha_pattern"))
    }


def _ends(name: str) -> Iterator[str]:
    """Of "a.b.c": "c", "b.c", "a.b.c"."""
    parts = name.split(".")
    return (".".join(parts[i:]) for i in reversed(range(len(parts))))


def patterns_at_work(model: nn.Module, name: str, options: LoraOptions) -> Fields:
    """LoRA's patterns as PEFT has read them, where that is another reading than ours, or its scales were set by hand.

    Raises:
        CheckpointError: a scale is one that no file can hold.
    """
    values, root = dict[str, tuple[int, float]](), math.sqrt if options.get("use_rslora", False) else float
    for path, layer in model.named_modules():
        scale = getattr(layer, "scaling", {}).get(name) if isinstance(layer, peft_parts()[0]) else None
        if scale is None or hasattr(layer, "parameter_name") or ".modules_to_save." in path:
            continue
        module, rank = name_in_state(path).removeprefix(PREFIX), layer.r[name]
        values[module] = rank, float(scale) * root(rank)
        if not CHECKS["lora_alpha"][0](values[module][1]):
            raise CheckpointError(
                f"LoRA on {module} is scaled by {scale} in this model, which can't be saved: expected a number above 0."
            )
    alike = all(
        rank == options.rank(module) and math.isclose(alpha, options.alpha(module), rel_tol=1e-6)
        for module, (rank, alpha) in values.items()
    )
    return {} if alike else _patterns(options, values)


def adapter_tensors(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Of a model's state one adapter's LoRA and what is trained whole with it, under the names that a file has for them.

    PEFT's own function takes the name of the adapter out of those of modules, too, before 0.18 ("d" out of "down_proj"), and other
    adapters in, before 0.20.
    """
    lora = re.compile(rf"(.*\.lora_[^.]+)\.{re.escape(name)}((?:\.\w+)?)")
    whole = re.compile(rf"(.*)\.modules_to_save\.{re.escape(name)}(\..+)")
    found = {}
    for key, tensor in state.items():
        if match := lora.fullmatch(key) or whole.fullmatch(key):
            is_vector = match[1].endswith(".lora_magnitude_vector")
            found[match[1] + ("" if is_vector else match[2])] = tensor
    return found


def trained_biases(state: Mapping[str, Tensor], bias: object) -> dict[str, Tensor]:
    """The base model's biases that train, of which PEFT's releases save some or all."""
    return {
        key: value
        for key, value in state.items()
        if isinstance(value, nn.Parameter)
        and "bias" in key.rpartition(".")[2]
        and ".lora_" not in key
        and (bias == "all" or (bias == "lora_only" and ".base_layer." in key))
    }


def require_findable(model: nn.Module, layers: Iterable[LoraLayer], bias: object) -> None:
    """Refuse LoRA on what is no linear layer, and on parameters around tensors that are saved along, under names that change with it.

    Args:
        model: that LoRA is in.
        layers: those of it that have LoRA.
        bias: LoRA's option.
    """
    wholes = (module for module in model.modules() if isinstance(module, peft_parts()[1]))
    within = {id(part) for module in wholes for part in module.modules()}
    for layer in layers:
        base = layer.get_base_layer()
        if isinstance(base, NOT_LINEAR):
            raise CheckpointError(
                f"LoRA is on a layer of class {type(base).__name__}, and only that on linear layers can be loaded again; leave it out of "
                "target_modules, or train it whole (modules_to_save)."
            )
        biased = bias != "none" and getattr(base, "bias", None) is not None
        if hasattr(layer, "parameter_name") and (biased or id(layer) in within):
            what = "whose bias trains along" if biased else "that is trained whole (modules_to_save)"
            raise CheckpointError(
                f"target_parameters has put LoRA on parameters of a layer {what}, which can't be loaded again; leave these out."
            )


def embeddings(model: nn.Module, kept: Mapping[str, Tensor], adapter_name: str) -> dict[str, Tensor]:
    """The embeddings among a model's tensors, where it has more or fewer than the base that it came from."""
    from peft import get_peft_model_state_dict

    resized: Literal[True, "auto"] = True if has_other_vocabulary(getattr(model, "config", None)) else "auto"
    saved = get_peft_model_state_dict(model, kept, adapter_name=adapter_name, save_embedding_layers=resized)
    return {key: value for key, value in saved.items() if is_embedding(key)}


def has_other_vocabulary(config: PretrainedConfig | None) -> bool:
    """Whether a model has more or fewer tokens than the base that its configuration names, as far as that is at hand.

    PEFT looks for `vocab_size` in the configuration itself, and not in its text_config.
    """
    if config is None:
        return False
    try:
        name, revision = config._name_or_path, getattr(config, "_commit_hash", None)
        told, _ = type(config).get_config_dict(name, revision=revision or "main", local_files_only=True)
        if config.model_type not in {
            part.get("model_type") for part in (told, *told.values()) if isinstance(part, dict)
        }:
            return False  # as a model was published, which its own loader reads
        base = type(config).from_pretrained(name, revision=revision or "main", local_files_only=True)
        here, there = (found.get_text_config().vocab_size for found in (config, base))
    except (OSError, ValueError, TypeError, AttributeError):  # no base by that name, or a configuration of another kind
        return False
    return bool(here != there)


def forget_sta(model: nn.Module) -> None:
    """Of LoRA that stays in a model without STA, what PEFT saves names it no longer: nothing could load that."""
    for config in getattr(model, "peft_config", {}).values():
        if names := getattr(config, "modules_to_save", None):
            config.modules_to_save = [name for name in names if name.split(".")[-1] != CHILD] or None
        vars(config).pop("sta", None)  # of `STALoraConfig`
