"""Backbone: what a vision encoder must declare to take STA, and what its declarations are written with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import nn

from sta_adapter.attention.layout import ALL_ROWS, ClipLayout, ClipLengths
from sta_adapter.compatibility.calls import bound_arguments
from sta_adapter.compatibility.releases import incompatible
from sta_adapter.errors import ConfigError, InjectionError, LayoutError, UnknownClipsError

DummyInputs = Callable[[nn.Module], tuple[tuple[object, ...], Mapping[str, object]]]


@dataclasses.dataclass(frozen=True)
class EncoderCall:
    """One call of an encoder, for a backbone's layout function.

    Attributes:
        encoder: the module that is called.
        arguments: its arguments by the names in its `forward`; those not passed are absent.
        clip_lengths: of each clip its frames, or (frames, rows of each frame), when they were told: by
            `handle.clips(...)`, a `clip_lengths` keyword or a `ClipSource`; None otherwise.
    """

    encoder: nn.Module
    arguments: Mapping[str, object]
    clip_lengths: ClipLengths | None = None

    @classmethod
    def bind(
        cls, encoder: nn.Module, args: Sequence[object], kwargs: Mapping[str, object], clip_lengths: ClipLengths | None
    ) -> EncoderCall:
        """Name the arguments of `encoder(*args, **kwargs)`."""
        return cls(encoder, bound_arguments(encoder, args, kwargs), clip_lengths)

    def tensor(self, *names: str) -> torch.Tensor:
        """The first of these arguments that was passed as a tensor.

        Raises:
            LayoutError: when there is none.
        """
        for name in names:
            if isinstance(found := self.arguments.get(name), torch.Tensor):
                return found
        raise LayoutError(
            f"{type(self.encoder).__name__} was called without {' or '.join(names)}, which tells STA where the clips are; "
            f"found the arguments {', '.join(self.arguments) or 'none'}."
        )


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
    methods: Mapping[str, Callable[[nn.Module, Mapping[str, object]], ClipLengths | None]]
    runs: Mapping[str, Callable[[nn.Module, Callable[..., object], tuple[object, ...], dict[str, object]], object]] = (
        dataclasses.field(default_factory=dict)
    )

    def __post_init__(self) -> None:
        _require_names("ClipSource.model_classes", self.model_classes)


@dataclasses.dataclass(frozen=True)
class TextPositions:
    """How a family's language model numbers text beside clips, where releases of transformers do it otherwise.

    Attributes:
        in_use: from a model to the name of the rule that it computes, or None where that can't be asked.
        of_training: from a model to the name of the rule that its base was trained by, or None likewise.
        use: lets a model compute by the rule of a name; None for that of the installed transformers.
        forgets_padding: whether a model, as it is, leaves padding out of the positions of what it generates; `use` mends it.
    """

    in_use: Callable[[nn.Module], str | None]
    of_training: Callable[[nn.Module], str | None]
    use: Callable[[nn.Module, str | None], None]
    forgets_padding: Callable[[nn.Module], bool] = lambda model: False


@dataclasses.dataclass(frozen=True)
class LoRARecipe:
    """What stage two trains with LoRA (the paper's recipe; see `STAHandle.lora_config`)."""

    target_modules: tuple[str, ...]
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    r: int = 16
    lora_alpha: int = 16


@dataclasses.dataclass(frozen=True)
class VLLMTower:
    """The same encoder in vLLM, which has model classes of its own; see `sta_adapter.integrations.vllm`.

    Attributes:
        architectures: by the name of an architecture in a base's `config.json`, vLLM's class for it, "module:Class".
        changes: fields of the `Backbone` that differ there.
        text_positions: the rule by which vLLM numbers text beside clips, where there are several.
        splits_clips: whether vLLM's data-parallel mode for encoders gives frames of one clip to different ranks.
    """

    architectures: Mapping[str, str]
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    text_positions: str | None = None
    splits_clips: bool = False


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
        separate_frames: whether the encoder without STA computes each frame by itself: spatial attention within a
            frame, no embedding of time. Only then can `handle.stream` go on where the last call ended.
        qkv_bias: whether the branch's q, k, v projection has a bias.
        clip_source: calls of the full model that tell the clips, for encoders that get frames as a batch.
        lora: the recipe of stage two; None when there is none.
        dummy_inputs: from the encoder to arguments (args, kwargs) of a smallest clip, or of one picture, for processes whose
            batch has no video and for checks; None when not known: then the first real call is checked.
        positions: from a call and its layout to, for each clip, a tensor (rows, columns) with the index of the position
            that stands there on the picture, or None where that can't be known; for pictures of what STA does.
        text_positions: the rules of its language model's text positions, where there are several.
        published_names: names of `norm`, `to_qkv`, `to_out` (and `gamma`) in the published STAVEQ2 code's blocks.
        published_prefix: what stands in front of `blocks` in the keys of that code's checkpoints, "visual." for one.
        published_token_order: whether that code adds the branch in another token order than the paper's.
        vllm: the encoder in vLLM; None when STA isn't served there.
        is_variant: whether this is `registry.in_vllm` of a backbone, which is never registered under its name.
    """

    name: str
    encoder_classes: tuple[str, ...]
    layout: Callable[[EncoderCall], ClipLayout]
    heads: Callable[[nn.Module], int]
    blocks: str = "blocks"
    norm: str = "norm2"
    accepts: Callable[[nn.Module, nn.Module], bool] | None = None
    priority: int = 0
    defaults: Mapping[str, object] = dataclasses.field(default_factory=dict)
    separate_frames: bool = False
    qkv_bias: bool = True
    clip_source: ClipSource | None = None
    lora: LoRARecipe | None = None
    dummy_inputs: DummyInputs | None = None
    positions: Callable[[EncoderCall, ClipLayout], list[torch.Tensor | None]] | None = None
    text_positions: TextPositions | None = None
    published_names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    published_prefix: str = ""
    published_token_order: bool = False
    vllm: VLLMTower | None = None
    is_variant: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ConfigError(f"Backbone.name={self.name!r}: expected text, by which adapters name it.")
        _require_names("Backbone.encoder_classes", self.encoder_classes)

    def dummy_layout(self, call: EncoderCall) -> ClipLayout:
        """The layout of `dummy_inputs`, which are one clip, also for encoders that must be told of clips."""
        try:
            return self.layout(call)
        except UnknownClipsError:
            return self.layout(dataclasses.replace(call, clip_lengths=ALL_ROWS))

    def __deepcopy__(self, memo: dict[int, object]) -> Backbone:
        return self

    def find_encoder(self, model: nn.Module, active: Sequence[nn.Module] | None = None) -> nn.Module | None:
        """The encoder in `model`, or None; `active` are its `active_modules`, where they have been looked up already.

        Raises:
            InjectionError: when there are several.
        """
        found = [m for m in active or active_modules(model) if self._is_encoder(m)]
        if self.accepts is not None:
            found = [m for m in found if self.accepts(model, m)]
        if len(found) > 1:
            raise InjectionError(
                f"the model holds {len(found)} encoders of class {type(found[0]).__name__}; pass the one that STA shall go into."
            )
        return found[0] if found else None

    def _is_encoder(self, module: nn.Module) -> bool:
        return any(cls.__name__ in self.encoder_classes for cls in type(module).__mro__)


def _require_names(field: str, value: object) -> None:
    """Refuse a string above all, in which any part of a name would be found."""
    if isinstance(value, str) or not isinstance(value, Collection) or not value:
        example = f", ({value!r},)" if isinstance(value, str) else ""
        raise ConfigError(f"{field}={value!r}: expected a tuple of class names{example}.")


def number_of(owner: object, *names: str, default: int | None = None) -> int:
    """A whole number of a configuration or a module: the first of these names that it has.

    Raises:
        CompatibilityError: it has none of them, and there is no default.
    """
    found = next((value for name in names if _is_whole(value := getattr(owner, name, None))), default)
    if found is None:
        raise incompatible("transformers", f"{type(owner).__name__} has no whole number {' or '.join(names)}")
    return found


def sizes_of(owner: object, name: str) -> tuple[int, ...]:
    """A size of a configuration or a module, side by side; one number where all sides are alike.

    Raises:
        CompatibilityError: it has none of this name.
    """
    found = getattr(owner, name, None)
    sizes = tuple(found) if isinstance(found, (list, tuple)) else (found,)
    if not sizes or not all(map(_is_whole, sizes)):
        raise incompatible("transformers", f"{type(owner).__name__} has no size {name}, but {found!r}")
    return sizes


def black(encoder: nn.Module, *shape: int) -> torch.Tensor:
    """Zeros on the encoder's device, in the dtype that it computes in."""
    parameter = next(p for p in encoder.parameters() if p.is_floating_point())
    return torch.zeros(shape, device=parameter.device, dtype=parameter.dtype)  # `new_zeros` of a sharded one is sharded


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def active_modules(model: nn.Module) -> list[nn.Module]:
    """All modules but the frozen originals that PEFT keeps beside a trained copy (`modules_to_save`)."""
    originals = [getattr(m, "original_module", None) for m in model.modules() if hasattr(m, "modules_to_save")]
    replaced = {id(inner) for original in originals if isinstance(original, nn.Module) for inner in original.modules()}
    return [m for m in model.modules() if id(m) not in replaced]
