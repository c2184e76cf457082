"""What STA reads of transformers' processors though no documentation promises it, each in one place."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from sta_adapter.compatibility.releases import incompatible, transformers_release

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import BatchFeature, PreTrainedTokenizerBase

PARTS = ("video_processor", "image_processor")
# what the names of a processor's outputs end with, where it packs patches of all sizes into one tensor
GRID = "_grid_thw"


class Processor(Protocol):
    """What is used of a model's processor, one of transformers' or of ours."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The language model's."""

    def __call__(self, *args: Any, **kwargs: Any) -> BatchFeature:
        """Encode texts with their clips and pictures."""

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        """A conversation as text."""

    def save_pretrained(self, folder: Path, /) -> object:
        """Write its files."""


class VisualPart(Protocol):
    """What is used of transformers' image and video processors."""

    preprocess: Callable[..., BatchFeature]
    patch_size: int  # of those that pack patches


def visual_part(processor: object) -> VisualPart:
    """What processes clips: the video processor; before transformers 4.52 the image processor."""
    part: VisualPart | None = next(
        (found for name in PARTS if (found := getattr(processor, name, None)) is not None), None
    )
    if part is None:
        raise incompatible("transformers", f"{type(processor).__name__} has neither {' nor '.join(PARTS)}")
    return part


def takes_clips(processor: Processor) -> bool:
    """Whether clips have a processor of their own, which is told not to sample; before 4.52 the image processor took them."""
    if getattr(processor, "video_processor", None) is not None:
        return True
    part = visual_part(processor)
    names = inspect.signature(part.preprocess).parameters
    if "videos" not in names and "pixel_values_videos" not in _outputs(part):
        raise incompatible(
            "transformers",
            f"{type(processor).__name__} has no video_processor, and {type(part).__name__} takes no videos",
        )
    return False


def keeps_clips(processor: Processor) -> bool:
    """Whether the video processor takes frames that are chosen already, and each clip's times reach the prompt.

    GLM-4V's did not before 4.57: 4.53 refuses such frames, 4.54 and 4.55 drop the times, and 4.56 gives the first clip's
    to all.
    """
    names = {cls.__name__ for cls in type(visual_part(processor)).__mro__}
    return "BaseVideoProcessor" in names and ("Glm4vVideoProcessor" not in names or transformers_release() >= (4, 57))


class Sizes(NamedTuple):
    """Edge lengths that a processor cuts clips by; 1 where it brings all frames to one size."""

    factor: int  # of a visual token, in pixels
    # of a temporal step, in frames; those that tokens are merged over, where a processor of ours has `merged_frames`
    frames: int
    packs: bool  # whether it cuts at all

    @classmethod
    def of(cls, part: object) -> Sizes:
        """Of what `visual_part` gives."""
        if not any(name.endswith(GRID) for name in _outputs(part)):
            return cls(1, getattr(part, "merged_frames", 1), False)
        names = ("patch_size", "merge_size", "temporal_patch_size")
        found = {name: size for name in names if type(size := getattr(part, name, None)) is int and size > 0}
        if wrong := [name for name in names if name not in found]:
            raise incompatible(
                "transformers",
                f"{type(part).__name__} has no whole number called {' or '.join(wrong)}, of a patch's size",
            )
        return cls(found["patch_size"] * found["merge_size"], found["temporal_patch_size"], True)


def _outputs(part: object) -> list[str]:
    """What a part calls its outputs, which is how models and trainers know them."""
    names = getattr(part, "model_input_names", None)
    if not isinstance(names, (list, tuple)):
        raise incompatible("transformers", f"{type(part).__name__} has no list model_input_names")
    return list(names)


def placeholder(processor: Processor, kind: str, *, required: bool = False) -> str | None:
    """The token that stands for a clip ("video") or picture ("image") in the text; None where the tokenizer has none.

    A processor of ours with `text_placeholders` puts tokens in the place of words, which need be none of the
    tokenizer's.

    Raises:
        CompatibilityError: there is none where it is required, so that places in the text can't be counted.
    """
    tokenizer = processor.tokenizer
    for owner in (processor, tokenizer):
        token = getattr(owner, f"{kind}_token", None)
        if isinstance(token, str) and (getattr(owner, "text_placeholders", False) or _is_token(tokenizer, token)):
            return token
    usual = f"<|{kind}_pad|>"
    if _is_token(tokenizer, usual):
        return usual
    if required:
        raise incompatible("transformers", f"{type(processor).__name__} has no {kind}_token that its tokenizer knows")
    return None


def _is_token(tokenizer: PreTrainedTokenizerBase, token: str) -> bool:
    return tokenizer.convert_tokens_to_ids(token) not in (None, tokenizer.unk_token_id)


def row_tokens(processor: object) -> tuple[int, int]:
    """(tokens of a row, the id of their placeholder) of a processor that gives frames and tiles as rows of one tensor."""
    row, token = (getattr(processor, name, None) for name in ("image_seq_length", "image_token_id"))
    if not isinstance(row, int) or not isinstance(token, int):
        raise incompatible(
            "transformers",
            f"{type(processor).__name__} has no numbers image_seq_length and image_token_id, so its rows can't be told",
        )
    return row, token


def fingerprint_parts(processor: object) -> list[dict[str, object]]:
    """The settings of all that processes clips and pictures."""
    visual_part(processor)
    settings = []
    for name in PARTS:
        part = getattr(processor, name, None)
        if part is None:
            continue
        if not callable(getattr(part, "to_dict", None)):
            raise incompatible("transformers", f"{type(part).__name__} has no to_dict, which tells its settings")
        settings.append(part.to_dict())
    return settings
