"""Seams of transformers where text gets its positions: the cache that they go on from, their rules, and rotary frequencies."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from sta_adapter.compatibility.calls import known_parameters, parameter_names
from sta_adapter.compatibility.releases import incompatible, transformers_release

CACHE_NAMES = ("cache", "past_key_values")  # of a forward's cache: since transformers 5.24, and before
GENERATION_METHOD = "_prepare_position_ids_for_generation"  # positions of what `generate` is given
# with it Qwen2-VL's rotary embedding mixes its axes; in earlier releases the attention does
FREQUENCY_METHOD = "recomposition_frequencies"
SINCE = {GENERATION_METHOD: (5, 2), FREQUENCY_METHOD: (5, 17)}  # releases of transformers that have them
ROPE_INDEX = "get_rope_index"


def cached_tokens(function: Callable[..., object], what: str, given: Mapping[str, object]) -> int:
    """How many tokens the cache holds that a forward was given; 0 without one.

    Args:
        function: the forward; what it calls its cache is looked up in its parameters.
        what: its name, for the error.
        given: its arguments by name.

    Raises:
        CompatibilityError: the forward has no parameter for a cache that we know, a cache came under another name, or
            is of a kind that doesn't tell its length. Positions would start again at zero.
    """
    names = parameter_names(function, what)
    if not any(name in names for name in CACHE_NAMES):
        raise incompatible(
            "transformers", f"{what} has no parameter called {' or '.join(CACHE_NAMES)}, so a cache can't be known"
        )
    for name, value in given.items():
        if name not in CACHE_NAMES and hasattr(value, "get_seq_length"):
            raise incompatible("transformers", f"{what} was given a cache ({type(value).__name__}) as {name!r}")
    caches = [given[name] for name in CACHE_NAMES if given.get(name) is not None]
    if not caches:
        return 0
    lengths = {int(_length(cache, what)) for cache in caches}
    if len(lengths) > 1:
        raise incompatible(
            "transformers", f"{what} was given two caches, of {' and '.join(map(str, sorted(lengths)))} tokens"
        )
    return lengths.pop()


def _length(cache: object, what: str) -> int:
    measure: Callable[[], int] | None = getattr(cache, "get_seq_length", None)
    if measure is None:
        raise incompatible(
            "transformers", f"{what} was given a {type(cache).__name__} as cache, which has no get_seq_length"
        )
    return measure()


def has_generation_method(head: type) -> bool:
    """Whether a generating model prepares positions by a method of its own (since 5.2), which we then replace."""
    return hasattr(head, "generate") and _has_method(head, GENERATION_METHOD, ("self", "inputs_tensor", "model_kwargs"))


def rope_index_parameters(owner: nn.Module) -> tuple[str, ...]:
    """Parameters of the model's `get_rope_index`, of which each is known."""
    what = f"{type(owner).__name__}.{ROPE_INDEX}"
    if not hasattr(owner, "rope_deltas"):
        raise incompatible("transformers", f"{type(owner).__name__} has no rope_deltas")
    needed = ("input_ids", "image_grid_thw", "video_grid_thw", "attention_mask")
    return known_parameters(getattr(owner, ROPE_INDEX), what, needed, ("mm_token_type_ids", "second_per_grid_ts"))


def forget_earlier_batches(model: nn.Module, batch: Mapping[str, object]) -> None:
    """Before a batch without pictures and cache: transformers 5.2 and 5.3 would number it on from the clips of an earlier one."""
    if transformers_release() in ((5, 2), (5, 3)) and not any(name.endswith("grid_thw") for name in batch):
        for module in model.modules():
            if getattr(module, "rope_deltas", None) is not None:
                vars(module)["rope_deltas"] = None


def generates_behind_padding() -> bool:
    """Whether `generate` of Qwen2-VL and Qwen2.5-VL numbers what it adds to a padded prompt as if the padding weren't there (4.54 to 4.56).

    What the prompt's positions are and what is counted on from them include it, so that new tokens come too early by as much.
    """
    return (4, 54) <= transformers_release() < (4, 57)


def has_frequency_method(rotary: type) -> bool:
    """Whether a class of rotary embeddings mixes its axes by a method (since 5.17), or leaves it to attention."""
    return _has_method(rotary, FREQUENCY_METHOD, ("self", "freq"))


def _has_method(owner: type, name: str, parameters: tuple[str, ...]) -> bool:
    """Whether a class has a method that releases of transformers have since some time, with the parameters that we know."""
    method = getattr(owner, name, None)
    if method is not None:
        known_parameters(method, f"{owner.__name__}.{name}", parameters)
    elif transformers_release() >= SINCE[name]:
        raise incompatible("transformers", f"{owner.__name__} has no {name}")
    return method is not None
