"""LoRA's options: those with which an adapter can be saved, loaded and merged again, and what they may be.

The same list holds where LoRA is set up and where a file is read, so that whatever is
trained can be loaded. Any other option is refused unless it is off.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TypeGuard, TypeVar, cast

from sta_adapter._validate import shown
from sta_adapter.adapter.safe_read import MAX_NAMES, require_plain_patterns
from sta_adapter.errors import CheckpointError, STAError

T = TypeVar("T")
MAX_RANK = 8192
MAX_ALPHA = 1e6
MAX_LAYER = 10_000
BIASES = ("none", "all", "lora_only")
STARTS = (True, False, "gaussian")  # others change the base model (pissa, olora, ...) or need data (eva, corda)
TASKS = (None, "CAUSAL_LM", "FEATURE_EXTRACTION")
ALL_LINEAR = "all-linear"
OURS = "sta_adapter"  # the entry that says that STA belongs to the LoRA weights
# say nothing about the weights, or belong to an option that is refused
IGNORED = (
    "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "megatron_core",
    "qalora_group_size", OURS,
)  # fmt: skip


def checked_options(
    fields: Mapping[str, object], where: str, error: type[STAError] = CheckpointError
) -> dict[str, object]:
    """The supported options among LoRA's settings, in their normal form.

    Raises:
        STAError: an option is unknown or not supported and not off, or has another type or range.
    """
    kind = getattr(fields.get("peft_type"), "value", fields.get("peft_type"))
    if kind != "LORA":
        raise error(f"{where}: peft_type is {str(kind)[:80]!r}, expected 'LORA'.")
    refused = [
        name for name, value in fields.items() if name not in CHECKS and name not in IGNORED and not is_off(value)
    ]
    if refused:
        raise error(
            f"{where} sets {', '.join(map(str, sorted(refused)[:10]))}, with which an adapter can't be saved and loaded here; "
            f"supported are {', '.join(SUPPORTED)}. Leave {'it' if len(refused) == 1 else 'them'} out."
        )
    options = {}
    for name, (check, expected) in CHECKS.items():
        if name not in fields:
            continue
        value = _plain(fields[name])
        if not check(value):
            raise error(f"{where}: {name} is {shown(value)}, expected {expected}.")
        options[name] = value
    if options.get("target_modules") is None and not options.get("target_parameters"):
        raise error(f"{where}: target_modules is not given, expected names of modules.")
    pattern, layers = isinstance(options.get("target_modules"), str), options.get("layers_to_transform")
    if options.get("layers_pattern") and layers is None:
        raise error(f"{where}: layers_pattern has no effect without layers_to_transform; leave it out.")
    if pattern and options["target_modules"] != ALL_LINEAR and layers is not None:
        raise error(f"{where}: layers_to_transform goes with names of modules, and target_modules is a pattern.")
    try:
        for name in ("target_modules", "exclude_modules"):
            if isinstance(names := options.get(name), str) and names != ALL_LINEAR:
                require_plain_patterns(where, [names])
        for name in ("rank_pattern", "alpha_pattern"):
            if isinstance(patterns := options.get(name), dict):
                require_plain_patterns(where, patterns, prefixed=True)
    except CheckpointError as found:
        raise error(str(found)) from found
    return options


@dataclasses.dataclass(frozen=True)
class LoraOptions:
    """Checked options; `fields` are those of `checked_options`."""

    fields: Mapping[str, object]

    @classmethod
    def read(cls, fields: Mapping[str, object], path: Path) -> LoraOptions:
        """Those of an adapter's `adapter_config.json`; errors as `checked_options`."""
        options = checked_options(fields, str(path))
        if options.get("target_modules") == ALL_LINEAR:
            raise CheckpointError(
                f"{path}: target_modules is {ALL_LINEAR!r}, expected names of modules, as PEFT saves them."
            )
        return cls(options)

    def get(self, name: str, default: T) -> T:
        """The value of an option, which is checked to be of the default's type; where it is not given or None, the default."""
        value = self.fields.get(name)
        return default if value is None else cast("T", value)

    def rank(self, module: str) -> int:
        """The rank of LoRA on a module."""
        return self._of("rank_pattern", module, self.get("r", 8))

    def alpha(self, module: str) -> float:
        """What LoRA's product on a module is scaled by, before it is divided by the rank."""
        return float(self._of("alpha_pattern", module, self.get("lora_alpha", 8.0)))

    def _of(self, patterns: str, module: str, default: T) -> T:
        found = (v for k, v in self.get(patterns, dict[str, T]()).items() if re.match(rf"(.*\.)?({k})$", module))
        return next(found, default)

    def is_saved(self, module: str) -> bool:
        """Whether a module, or one that it lies in, is trained and saved whole: PEFT takes all whose names end so."""
        return any(f"{name}." in f"{module}." for name in self.get("modules_to_save", list[str]()))

    @functools.cached_property
    def names(self) -> dict[str, Collection[str]]:
        """Names of modules as sets, so that thousands of them are looked up at once; patterns as they are."""
        values = {name: self.get(name, cast("str | list[str]", [])) for name in ("target_modules", "exclude_modules")}
        return {name: value if isinstance(value, str) else frozenset(value) for name, value in values.items()}

    def targets(self, module: str) -> bool:
        """Whether LoRA goes on a module of this name, by PEFT's rules."""
        wanted = self.names["target_modules"]
        if self.is_saved(module) or named(self.names["exclude_modules"], module):
            return False
        if isinstance(wanted, str) or module in wanted or not named(wanted, module):
            return named(wanted, module)
        layers: int | list[int] = self.get("layers_to_transform", [])
        layers = layers if isinstance(layers, list) else [layers]
        if not layers:
            return True
        names: str | list[str] = self.get("layers_pattern", [])
        names = [names] if isinstance(names, str) else names
        found = (re.match(rf"(?:.*?\.)?{name}\.(\d+)\.", module) for name in names or [r"[^.]+"])
        index = next((match[1] for match in found if match), None)
        return index is not None and int(index) in layers

    def targets_parameter(self, parameter: str) -> bool:
        """Whether LoRA goes on a parameter of this name, as on those of experts."""
        return bool(parameter) and named(self.get("target_parameters", list[str]()), parameter)


def named(names: Collection[str], module: str) -> bool:
    """Whether a pattern fits a module's whole name, or one of the names is its end."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    parts = module.split(".")
    return any(".".join(parts[i:]) in names for i in range(len(parts)))


def is_off(value: object) -> bool:
    """Whether an option with this value does nothing."""
    return value is None or value is False or (isinstance(value, (str, list, tuple, dict, set)) and not value)


def _plain(value: object) -> object:
    """As JSON would have it: sets and tuples as lists, enumerations as their values."""
    if isinstance(value, (set, tuple)):
        return sorted(value, key=str)
    return getattr(value, "value", value)


def _whole(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _number(value: object, low: float, high: float) -> TypeGuard[float]:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return low <= value <= high and (isinstance(value, int) or math.isfinite(value))


def _names(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and len(value) <= MAX_NAMES and all(_text(name) for name in value)


def _text(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 1000


def _module_names(value: object) -> bool:
    return _names(value) and len(value) <= 64 and all(re.fullmatch(r"[\w.]+", name) for name in value)


def _mapping(of: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, dict) and all(_text(key) and of(item) for key, item in value.items())


def _or_none(check: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or check(value)


def _rank(value: object) -> bool:
    return _whole(value, 1, MAX_RANK)


def _alpha(value: object) -> bool:
    return _number(value, 0, MAX_ALPHA) and value > 0


def _layers(value: object) -> bool:
    return _whole(value, 0, MAX_LAYER) or (
        isinstance(value, list) and len(value) <= MAX_LAYER and all(_whole(layer, 0, MAX_LAYER) for layer in value)
    )


def _targets(value: object) -> bool:
    return _text(value) or _names(value)


def _one_of(values: tuple[object, ...]) -> Callable[[object], bool]:
    return lambda value: any(value is known or (isinstance(value, str) and value == known) for known in values)


_RANKS = f"a whole number from 1 to {MAX_RANK}"
_ALPHAS = f"a number above 0, up to {MAX_ALPHA:g}"
CHECKS: dict[str, tuple[Callable[[object], bool], str]] = {
    "r": (_rank, _RANKS),
    "lora_alpha": (_alpha, _ALPHAS),
    "lora_dropout": (lambda value: _number(value, 0, 1) and value < 1, "a number from 0 to below 1"),
    "target_modules": (_or_none(_targets), f"names of modules, at most {MAX_NAMES}, or a pattern for them"),
    "exclude_modules": (_or_none(_targets), f"names of modules, at most {MAX_NAMES}, or a pattern for them"),
    "rank_pattern": (_or_none(_mapping(_rank)), f"patterns for names of modules, each with {_RANKS}"),
    "alpha_pattern": (_or_none(_mapping(_alpha)), f"patterns for names of modules, each with {_ALPHAS}"),
    "layers_to_transform": (_or_none(_layers), "indices of layers"),
    "layers_pattern": (
        lambda value: value is None or _module_names([value] if isinstance(value, str) else value),
        "names of modules",
    ),
    "modules_to_save": (_or_none(_module_names), "names of modules, at most 64"),
    "bias": (_one_of(BIASES), f"one of {', '.join(BIASES)}"),
    "init_lora_weights": (
        _one_of(STARTS),
        "True, False or 'gaussian': other starts change the base model or need data",
    ),
    "use_rslora": (lambda value: isinstance(value, bool), "True or False"),
    "use_dora": (lambda value: isinstance(value, bool), "True or False"),
    "task_type": (_one_of(TASKS), f"one of {', '.join(map(str, TASKS))}"),
}
SUPPORTED = tuple(CHECKS)
# PEFT sets it by itself where a mixture of experts keeps its weights in one tensor
CHECKS["target_parameters"] = (_or_none(_names), f"names of parameters, at most {MAX_NAMES}")
