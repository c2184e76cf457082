"""How a full model's own calls tell the clips to an encoder that gets frames as a batch; see `ClipSource`.

The model's forward is followed by hooks, its other methods, such as `chat`, by a `MethodInFront`.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from sta_adapter.attention.layout import ClipLengths
from sta_adapter.compatibility.calls import Arguments, bound_arguments
from sta_adapter.compatibility.seams import uncompiled_where
from sta_adapter.errors import UnknownClipsError
from sta_adapter.injection.backbone import ClipSource
from sta_adapter.injection.hooks import Hook
from sta_adapter.injection.methods import MethodInFront
from sta_adapter.injection.state import Injection
from sta_adapter.injection.told import take_clip_lengths

OF_TEXT = (
    *("input_ids", "inputs_embeds", "position_ids", "cache_position", "past_key_values", "labels", "logits_to_keep"),
    *("rope_deltas", "second_per_grid_ts"),
)


def _may_tell(hook: Hook, model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> bool:
    """Whether a forward may tell clips: one of text alone, as each of a cached generation is, does not."""
    given = [name for name, value in kwargs.items() if isinstance(value, (Tensor, list, tuple))]
    return bool(args) or kwargs.get("clip_lengths") is not None or not all(map(_is_of_text, given))


def _is_of_text(name: str) -> bool:
    """Whether an argument of many values is of tokens, or describes clips and pictures that come as another one."""
    return name in OF_TEXT or name.endswith(("_mask", "_type_ids", "_grid_thw", "_sizes"))


class ModelPreHook(Hook):
    """Forward pre-hook of the full model: takes `clip_lengths` away and notes the clips."""

    @uncompiled_where(_may_tell)
    def __call__(self, model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> Arguments:
        """Return the arguments without `clip_lengths`; what an outer model was told holds for those within it."""
        told = self.injection.told
        told.begin(model)
        kwargs, lengths = _tell(self.injection, model, "forward", args, kwargs)
        if lengths is None or lengths is told.by_user.value:  # the user's hold anyway
            told.forget()
        else:
            told.tell(lengths, model)
        return args, kwargs


class ModelPostHook(Hook):
    """Forward hook of the full model, called also after an exception: forgets the clips."""

    @uncompiled_where(lambda hook, *call: hook.injection.told.by_call.model is not None)
    def __call__(self, model: nn.Module, args: tuple[object, ...], output: object) -> None:
        """End what `ModelPreHook` began."""
        self.injection.told.forget()


class TellingMethod(MethodInFront):
    """A model's method that tells the clips of its arguments while it runs."""

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Run the method with the same arguments, without `clip_lengths`."""
        source = self.injection.spec.clip_source
        run = None if source is None else source.runs.get(self.name)
        if run is None or "clip_lengths" in kwargs:
            return self._call(*args, **kwargs)
        return run(self.model, self._call, args, kwargs)

    def _call(self, *args: object, **kwargs: object) -> object:
        kwargs, told = _tell(self.injection, self.model, self.name, args, kwargs)
        with self.injection.clips(told):
            return self.method(*args, **kwargs)


def attach_clip_source(model: nn.Module, encoder: nn.Module, source: ClipSource, injection: Injection) -> None:
    """Follow the calls of each module around the encoder that the backbone's `ClipSource` names."""
    for module in model.modules():
        if not any(cls.__name__ in source.model_classes for cls in type(module).__mro__):
            continue
        if all(inner is not encoder for inner in module.modules()):
            continue
        module.register_forward_pre_hook(ModelPreHook(injection), with_kwargs=True)
        module.register_forward_hook(ModelPostHook(injection), always_call=True)
        for name in source.methods:
            if name != "forward" and hasattr(type(module), name):
                module.__dict__[name] = TellingMethod(injection, module, name)


def _tell(
    injection: Injection,
    model: nn.Module,
    name: str,
    args: tuple[object, ...],
    kwargs: dict[str, object],
) -> tuple[dict[str, object], ClipLengths | None]:
    """(keywords for the method, clips): what the user told, else what the backbone reads from the arguments."""
    kwargs, told = take_clip_lengths(model, kwargs, name)
    told = told or injection.clip_lengths
    source = injection.spec.clip_source
    if told is not None or source is None or name not in source.methods or not injection.is_enabled:
        return kwargs, told
    try:
        arguments: Mapping[str, object] = bound_arguments(model, args, kwargs, name, partial=False)
    except TypeError:  # the method itself says best what is wrong with its arguments
        return kwargs, None
    try:
        return kwargs, source.methods[name](model, arguments)
    except UnknownClipsError:
        if injection.default_lengths is None:
            raise
        return kwargs, injection.default_lengths
