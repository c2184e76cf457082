"""The backbones that are known: the built-in ones, those of plug-ins (entry points), those registered; and which fits a model."""

from __future__ import annotations

import copyreg
import dataclasses
import difflib
import logging
import threading
from collections.abc import Callable, Sequence
from importlib import metadata

from torch import nn

from sta_adapter.errors import ConfigError, InjectionError, UnknownBackboneError
from sta_adapter.injection.backbone import Backbone, active_modules
from sta_adapter.injection.target import InjectionTarget, resolve_target

logger = logging.getLogger(__name__)
ENTRY_POINT_GROUP = "sta_adapter.backbones"
OWN_MODULES = "sta_adapter.backbones."


def locate(model: nn.Module, backbone: str | Backbone | None = None, preferred: str = "") -> InjectionTarget:
    """Find the encoder and the places of the hooks in a model, and check them; changes nothing.

    Of several backbones of one priority that fit, the `preferred` one is taken.

    Raises:
        UnknownBackboneError: when no backbone fits; lists those known.
        InjectionError: when a backbone fits by name but the model is not as it declares; lists every difference. Or the model
            has encoders for several backbones, none of them preferred.
    """
    active, specs = active_modules(model), _candidates(backbone, preferred)
    for place, spec in enumerate(specs, 1):
        encoder = spec.find_encoder(model, active)
        if encoder is not None:
            if spec.name != preferred:
                _require_only(encoder, spec, model, active, specs[place:])
            return resolve_target(spec, encoder)
    if backbone is not None:
        spec = _candidates(backbone)[0]
        classes = {type(m).__name__ for m in model.modules()}
        near = sorted({n for c in spec.encoder_classes for n in difflib.get_close_matches(c, classes)})
        raise UnknownBackboneError(
            f"{type(model).__name__!r} holds no encoder for backbone {spec.name!r}: it looks for a module of class "
            f"{' or '.join(spec.encoder_classes)}{' and a further condition' if spec.accepts else ''}; "
            f"the model's nearest are {', '.join(near) or 'none'}. "
            f"Leave backbone=None to have it found, or pass another of {', '.join(list_backbones())}."
        )
    raise UnknownBackboneError(
        f"no backbone matches {type(model).__name__!r}; known: {', '.join(list_backbones()) or 'none'}. "
        "Describe the encoder with register_backbone(Backbone(...)), or install a plug-in."
    )


def _require_only(
    encoder: nn.Module, spec: Backbone, model: nn.Module, active: Sequence[nn.Module], others: Sequence[Backbone]
) -> None:
    """Refuse a model with encoders of several kinds, of which one alone may be meant; one within the other is no second."""
    inside = {id(part) for part in encoder.modules()}
    outside = [module for module in active if id(module) not in inside]
    for other in others if outside else ():
        found = other.find_encoder(model, outside)
        if found is not None and all(part is not encoder for part in found.modules()):
            raise InjectionError(
                f"the model holds encoders of several kinds, {type(encoder).__name__} (backbone {spec.name!r}) and {type(found).__name__} "
                f"({other.name!r}); pass the one that STA shall go into, or its backbone=..."
            )


_REGISTRY: dict[str, Backbone] = {}
_LOADED_ENTRY_POINTS = False
_LOCK = threading.Lock()
_THREAD = threading.local()  # .loads: this thread is loading entry points


def register_backbone(spec: Backbone) -> None:
    """Make a backbone known to `inject_sta` and `load_sta`.

    Raises:
        ConfigError: when `spec` is no `Backbone`, or another one of that name is registered.
    """
    _load_entry_points()
    _register(spec)


def _register(spec: object) -> None:
    found = _checked(spec)
    _REGISTRY[found.name] = found


def _checked(spec: object) -> Backbone:
    if not isinstance(spec, Backbone):
        raise ConfigError(f"register_backbone takes a Backbone, not {type(spec).__name__}.")
    other = _REGISTRY.get(spec.name)
    if other is not None and other is not spec and not spec.is_variant:
        raise ConfigError(
            f"a backbone named {spec.name!r} is registered already: by {other.layout.__module__}, now by "
            f"{spec.layout.__module__}. Give one of them another name."
        )
    return spec


def unregister_backbone(name: str) -> None:
    """Forget a backbone that `register_backbone` made known; an unknown name is an error."""
    get_backbone(name)
    del _REGISTRY[name]


def is_built_in(spec: Backbone) -> bool:
    """Whether it is one of ours, whose names no other is taken with."""
    entries = metadata.entry_points(group=ENTRY_POINT_GROUP)
    return any(entry.name == spec.name and entry.value.startswith(OWN_MODULES) for entry in entries)


def in_vllm(spec: Backbone) -> Backbone:
    """The same backbone as vLLM has it.

    Raises:
        UnknownBackboneError: vLLM doesn't serve it; lists those that it does.
    """
    if spec.vllm is None:
        served = [known.name for known in all_backbones() if known.vllm is not None]
        raise UnknownBackboneError(
            f"STA with the backbone {spec.name!r} can't be served by vLLM; backbones that can: {', '.join(served)}."
        )
    return dataclasses.replace(spec, **spec.vllm.changes, is_variant=True)


def _named_in_vllm(name: str) -> Backbone:
    return in_vllm(get_backbone(name))


def _reduce(spec: Backbone) -> tuple[Callable[[str], Backbone], tuple[str]]:
    """A pickled model names its backbone, and finds it among the registered ones again."""
    if spec.is_variant:
        return _named_in_vllm, (spec.name,)
    _load_entry_points()
    if _REGISTRY.get(spec.name) is not spec:
        found = "another one" if spec.name in _REGISTRY else "none"
        raise ConfigError(
            f"a pickled model finds its backbone by the name {spec.name!r}, under which {found} is registered. "
            "Call register_backbone(spec) first, here and where it is unpickled."
        )
    return get_backbone, (spec.name,)


copyreg.pickle(Backbone, _reduce)


def list_backbones() -> list[str]:
    """Names of all backbones: the built-in ones, those of plug-ins, those registered."""
    return [spec.name for spec in all_backbones()]


def all_backbones() -> list[Backbone]:
    """Those that `list_backbones` names, in its order."""
    _load_entry_points()
    return sorted(_REGISTRY.values(), key=lambda spec: spec.name)


def get_backbone(name: str) -> Backbone:
    """The backbone of that name.

    Raises:
        UnknownBackboneError: when there is none; lists those known.
    """
    _load_entry_points()
    if name not in _REGISTRY:
        hint = "" if _REGISTRY else " The built-in ones can't be found: run `pip install -e .` in the source folder."
        raise UnknownBackboneError(f"no backbone {name!r}; known: {', '.join(list_backbones()) or 'none'}.{hint}")
    return _REGISTRY[name]


def _candidates(backbone: str | Backbone | None, preferred: str = "") -> list[Backbone]:
    if isinstance(backbone, Backbone):  # used without registering it
        _load_entry_points()
        return [_checked(backbone)]
    if backbone is not None:
        return [get_backbone(backbone)]
    return sorted(all_backbones(), key=lambda spec: (-spec.priority, spec.name != preferred))


def _load_entry_points() -> None:
    """Register the backbones of all installed packages, ours first; a broken one warns, names itself, and blocks nobody.

    Nothing is locked while a package is imported, which may call us, or wait for another thread that does: each thread
    loads for itself, and the first that is done registers what it found.
    """
    global _LOADED_ENTRY_POINTS
    if _LOADED_ENTRY_POINTS or getattr(_THREAD, "loads", False):
        return
    _THREAD.loads = True
    try:
        entries = sorted(metadata.entry_points(group=ENTRY_POINT_GROUP), key=lambda e: (e.name, e.value))
        for own in (True, False):
            loaded = [(e, _load(e)) for e in entries if e.value.startswith(OWN_MODULES) is own]
            with _LOCK:
                if not _LOADED_ENTRY_POINTS:
                    _register_loaded(loaded)
                    _LOADED_ENTRY_POINTS = not own
    finally:
        _THREAD.loads = False


def _load(entry: metadata.EntryPoint) -> object:
    """What an entry point names, or the error in its place."""
    try:
        return entry.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a package that ends the process when it is imported, too
        return error


def _register_loaded(loaded: Sequence[tuple[metadata.EntryPoint, object]]) -> None:
    names = [spec.name for spec in {id(s): s for _, s in loaded if isinstance(s, Backbone)}.values()]
    for entry, spec in loaded:
        try:
            if isinstance(spec, BaseException):
                raise spec
            if isinstance(spec, Backbone) and names.count(spec.name) > 1:
                raise ConfigError(f"several packages have a backbone named {spec.name!r}; uninstall all but one")
            _register(spec)
        except BaseException as error:
            source = entry.dist.name if entry.dist else "unknown package"
            logger.warning(
                "backbone plug-in %r of %s is left out: %s: %s", entry.name, source, type(error).__name__, error
            )
