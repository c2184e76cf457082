"""Backbone: what a vision encoder must declare to take STA, the registry of all of them, and entry points."""

from __future__ import annotations

import dataclasses
import difflib
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

import torch
from torch import nn

from sta_adapter.attention.layout import ALL_ROWS, ClipLayout, ClipLengths
from sta_adapter.errors import ConfigError, InjectionError, UnknownBackboneError, UnknownClipsError
from sta_adapter.injection.encoder_call import EncoderCall
from sta_adapter.injection.target import InjectionTarget, resolve_target
from sta_adapter.injection.vllm_tower import VLLMTower

logger = logging.getLogger(__name__)
ENTRY_POINT_GROUP = "sta_adapter.backbones"
OWN_MODULES = "sta_adapter.backbones."


@dataclasses.dataclass(frozen=True)
class ClipSource:
    """Calls of the model around an encoder that tell where the clips of its rows end.

    Each of these methods then takes a keyword `clip_lengths` as well. What the user tells, by that or by
    `handle.clips(...)`, comes first; the functions are asked only when nothing was told.

    Attributes:
        model_classes: class names of the model; subclasses count.
        methods: by the name of a method, `forward` among them, a function from (model, arguments by name) to the clip
            lengths, or to None when they need no telling; raises LayoutError when they can't be known.
        runs: by the name of a method, a function that calls it: from (model, the method, which tells the clips, its
            arguments, its keywords) to its result.
    """

    model_classes: tuple[str, ...]
    methods: Mapping[str, Callable[[nn.Module, Mapping[str, Any]], ClipLengths | None]]
    runs: Mapping[str, Callable[[nn.Module, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]] = (
        dataclasses.field(default_factory=dict)
    )


@dataclasses.dataclass(frozen=True)
class TextPositions:
    """How a family's language model numbers text beside clips, where releases of transformers do it otherwise.

    Attributes:
        in_use: from a model to the name of the rule that it computes, or None where that can't be asked.
        of_training: from a model to the name of the rule that its base was trained by, or None likewise.
        use: lets a model compute by the rule of a name; None for that of the installed transformers.
    """

    in_use: Callable[[nn.Module], str | None]
    of_training: Callable[[nn.Module], str | None]
    use: Callable[[nn.Module, str | None], None]


@dataclasses.dataclass(frozen=True)
class LoRARecipe:
    """What stage two trains with LoRA (the paper's recipe; see `STAHandle.lora_config`)."""

    target_modules: tuple[str, ...]
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    r: int = 16
    lora_alpha: int = 16


@dataclasses.dataclass(frozen=True)
class Backbone:
    """Where STA goes in one kind of vision encoder: data, and one function that reads the clip layout.

    Attributes:
        name: what `handle.backbone` and saved adapters say.
        encoder_classes: class names by which the encoder is found anywhere in a model; subclasses count.
        layout: from a call of the encoder to the `ClipLayout` of its tokens.
        heads: from the encoder to its number of attention heads.
        blocks: path from the encoder to the sequence of its blocks.
        norm: path from a block to the norm in front of its MLP; its input must be the block's residual stream.
        accepts: a further condition on (model, encoder); None when the class name is enough.
        priority: backbones with a higher one are tried first.
        defaults: values of STAConfig fields that differ from the general ones.
        separate_frames: whether the encoder without STA computes each frame by itself: spatial attention within a frame,
            no embedding of time. Only then can `handle.stream` go on where the last call ended.
        qkv_bias: whether the branch's q, k, v projection has a bias.
        clip_source: calls of the full model that tell the clips, for encoders that get frames as a batch.
        lora: the recipe of stage two; None when there is none.
        dummy_inputs: from the encoder to arguments (args, kwargs) of a smallest clip of two frames, for processes
            whose batch has no video (see `inject`) and for checks; None when not known: then the first real call is checked.
        positions: from a call and its layout to, for each clip, a tensor (rows, columns) with the index of the position
            that stands there on the picture, or None where that can't be known; for pictures of what STA does.
        text_positions: the rules of its language model's text positions, where there are several.
        published_names: names of `norm`, `to_qkv`, `to_out` (and `gamma`) in the published STAVEQ2 code's blocks.
        published_prefix: what stands in front of `blocks` in the keys of that code's checkpoints, "visual." for one.
        published_token_order: whether that code adds the branch in another token order than the paper's.
        vllm: the encoder in vLLM; None when STA isn't served there.
        is_variant: whether this is `in_vllm()` of a backbone, which is never registered under its name.
    """

    name: str
    encoder_classes: tuple[str, ...]
    layout: Callable[[EncoderCall], ClipLayout]
    heads: Callable[[nn.Module], int]
    blocks: str = "blocks"
    norm: str = "norm2"
    accepts: Callable[[nn.Module, nn.Module], bool] | None = None
    priority: int = 0
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    separate_frames: bool = False
    qkv_bias: bool = True
    clip_source: ClipSource | None = None
    lora: LoRARecipe | None = None
    dummy_inputs: Callable[[nn.Module], tuple[tuple[Any, ...], dict[str, Any]]] | None = None
    positions: Callable[[EncoderCall, ClipLayout], list[torch.Tensor | None]] | None = None
    text_positions: TextPositions | None = None
    published_names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    published_prefix: str = ""
    published_token_order: bool = False
    vllm: VLLMTower | None = None
    is_variant: bool = False

    def in_vllm(self) -> Backbone:
        """The same backbone as vLLM has it.

        Raises:
            UnknownBackboneError: vLLM doesn't serve it.
        """
        if self.vllm is None:
            served = [name for name in list_backbones() if get_backbone(name).vllm is not None]
            raise UnknownBackboneError(
                f"STA with the backbone {self.name!r} can't be served by vLLM; backbones that can: {', '.join(served)}."
            )
        return dataclasses.replace(self, **self.vllm.changes, is_variant=True)

    def dummy_layout(self, call: EncoderCall) -> ClipLayout:
        """The layout of `dummy_inputs`, which are one clip, also for encoders that must be told of clips."""
        try:
            return self.layout(call)
        except UnknownClipsError:
            return self.layout(dataclasses.replace(call, clip_lengths=ALL_ROWS))

    def __deepcopy__(self, memo: dict[int, Any]) -> Backbone:
        return self

    def __reduce__(self) -> tuple[Callable[[str], Backbone], tuple[str]]:
        """A pickled model names its backbone, and finds it among the registered ones again."""
        if self.is_variant:
            return _variant, (self.name,)
        _load_entry_points()
        if _REGISTRY.get(self.name) is not self:
            found = "another one" if self.name in _REGISTRY else "none"
            raise ConfigError(
                f"a pickled model finds its backbone by the name {self.name!r}, under which {found} is registered. "
                "Call register_backbone(spec) first, here and where it is unpickled."
            )
        return get_backbone, (self.name,)

    def find_encoder(self, model: nn.Module) -> nn.Module | None:
        """The encoder in `model`, or None.

        Raises:
            InjectionError: when there are several.
        """
        found = [m for m in _active_modules(model) if self._is_encoder(m)]
        if self.accepts is not None:
            found = [m for m in found if self.accepts(model, m)]
        if len(found) > 1:
            raise InjectionError(
                f"the model holds {len(found)} encoders of class {type(found[0]).__name__}; pass the one that STA shall go into."
            )
        return found[0] if found else None

    def _is_encoder(self, module: nn.Module) -> bool:
        return any(cls.__name__ in self.encoder_classes for cls in type(module).__mro__)


def _active_modules(model: nn.Module) -> list[nn.Module]:
    """All modules but the frozen originals that PEFT keeps beside a trained copy (`modules_to_save`)."""
    originals = [getattr(m, "original_module", None) for m in model.modules() if hasattr(m, "modules_to_save")]
    replaced = {id(inner) for original in originals if isinstance(original, nn.Module) for inner in original.modules()}
    return [m for m in model.modules() if id(m) not in replaced]


def locate(model: nn.Module, backbone: str | Backbone | None = None) -> InjectionTarget:
    """Find the encoder and the places of the hooks in a model, and check them; changes nothing.

    Raises:
        UnknownBackboneError: when no backbone fits; lists those known.
        InjectionError: when a backbone fits by name but the model is not as it declares; lists every difference.
    """
    for spec in _candidates(backbone):
        encoder = spec.find_encoder(model)
        if encoder is not None:
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


def _register(spec: Backbone) -> None:
    _check_name(spec)
    _REGISTRY[spec.name] = spec


def _check_name(spec: Backbone) -> None:
    if not isinstance(spec, Backbone):
        raise ConfigError(f"register_backbone takes a Backbone, not {type(spec).__name__}.")
    other = _REGISTRY.get(spec.name)
    if other is not None and other is not spec and not spec.is_variant:
        raise ConfigError(
            f"a backbone named {spec.name!r} is registered already: by {other.layout.__module__}, now by "
            f"{spec.layout.__module__}. Give one of them another name."
        )


def unregister_backbone(name: str) -> None:
    """Forget a backbone that `register_backbone` made known; an unknown name is an error."""
    get_backbone(name)
    del _REGISTRY[name]


def _variant(name: str) -> Backbone:
    return get_backbone(name).in_vllm()


def list_backbones() -> list[str]:
    """Names of all backbones: the built-in ones, those of plug-ins, those registered."""
    _load_entry_points()
    return sorted(_REGISTRY)


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


def _candidates(backbone: str | Backbone | None) -> list[Backbone]:
    _load_entry_points()
    if isinstance(backbone, Backbone):  # used without registering it
        _check_name(backbone)
        return [backbone]
    if backbone is not None:
        return [get_backbone(backbone)]
    return sorted(_REGISTRY.values(), key=lambda spec: (-spec.priority, spec.name))


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


def _load(entry: metadata.EntryPoint) -> Any:
    """What an entry point names, or the error in its place."""
    try:
        return entry.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a package that ends the process when it is imported, too
        return error


def _register_loaded(loaded: Sequence[tuple[metadata.EntryPoint, Any]]) -> None:
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
