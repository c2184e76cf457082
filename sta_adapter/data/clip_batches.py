"""Clips and pictures of unequal sizes in one sample and in one batch, for models that don't pack them by themselves."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby

import torch

from sta_adapter.compatibility.processors import Processor, row_tokens
from sta_adapter.data.message import Visual
from sta_adapter.data.tensor_handover import HAS_MEMFD, LARGE, joined_in_file
from sta_adapter.errors import DataError

PIXELS = ("pixel_values_videos", "pixel_values")
PER_TOKEN = ("input_ids", "mm_token_type_ids", "token_type_ids")
"""What has one value a token; the rest goes along clips and pictures."""
ONE_KIND = ("Glm4vProcessor", "Glm46VProcessor")
"""Of models whose clips and pictures have the same placeholder, so that one forward can't take both."""


def put_together(key: str, values: Sequence[torch.Tensor], *, shared: bool = False) -> torch.Tensor:
    """What a processor gave under one name for several samples, one after the other.

    `shared`: in memory that other processes see, where a worker's batch goes in the end; it spares two copies of large clips.

    Clips `(clips, T, 3, H, W)` of unequal T are filled up with frames of NaN, which STA's backbone takes out again (a
    model without it counts too many features, and says so); tiles of pictures `(pictures, N, 3, H, W)` with black ones,
    which models leave out by the pictures' sizes.
    """
    longest = max(value.shape[1] if value.dim() == 5 else 0 for value in values)
    if any(value.dim() == 5 and value.shape[1] < longest for value in values):
        fill = float("nan") if key == "pixel_values_videos" else 0.0
        values = [
            torch.nn.functional.pad(value, (0, 0, 0, 0, 0, 0, 0, longest - value.shape[1]), value=fill)
            for value in values
        ]
    large = sum(value.nbytes for value in values) >= LARGE
    if not (shared and HAS_MEMFD and large) or len({(value.dtype, value.shape[1:]) for value in values}) > 1:
        return torch.cat(list(values))
    return joined_in_file(values)


def missing_frames(videos: torch.Tensor) -> torch.Tensor:
    """(clips, T) which of the frames of `(clips, T, 3, H, W)` are none, but fill a clip up."""
    return videos[:, :, 0, 0, 0].isnan()


def takes_one_kind(processor: Processor) -> bool:
    """Whether the processor's model takes either pictures or clips in one forward."""
    return any(cls.__name__ in ONE_KIND for cls in type(processor).__mro__)


def tokens_of(processor: Processor, text: str) -> list[int]:
    """The ids of a text, without such as the tokenizer would put in front of it."""
    return processor.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []


def split_unequal(processor: Processor, text: str, visuals: Sequence[Visual]) -> list[tuple[str, list[Visual]]]:
    """The text in pieces of one clip each, where the processor stacks clips and these are of unequal lengths or sizes."""
    part = getattr(processor, "video_processor", None)
    shapes = {visual.pixels.shape for visual in visuals if visual.kind == "video"}
    if len(shapes) < 2 or part is None or hasattr(part, "merge_size"):
        return [(text, list(visuals))]
    words = {str(getattr(processor, f"{kind}_token")): kind for kind in ("image", "video")}
    places = [(found.start(), words[found[0]]) for found in re.finditer("|".join(map(re.escape, words)), text)]
    starts = [index for index, (_, kind) in enumerate(places) if kind == "video"][1:]
    bounds = list(zip([0, *starts], [*starts, len(places)], strict=True))
    cuts = [0, *(places[index][0] for index in starts), len(text)]
    pieces = [
        (text[cuts[number] : cuts[number + 1]], list(visuals[first:last]))
        for number, (first, last) in enumerate(bounds)
    ]
    apart = [token for piece, _ in pieces for token in tokens_of(processor, piece)]
    if [kind for _, kind in places] != [visual.kind for visual in visuals] or tokens_of(processor, text) != apart:
        raise DataError(
            "this model's processor takes clips of unequal lengths only one by one, and its tokenizer can't read the text "
            "around each by itself. Give all clips of the sample the same nframes."
        )
    return pieces


def row_lengths(
    processor: Processor, encoded: dict[str, torch.Tensor], visuals: Sequence[Visual]
) -> dict[str, torch.Tensor]:
    """`clip_lengths`, for models that get the frames of clips and the tiles of pictures as rows of one `pixel_values`.

    The rows' placeholders tell which is which: each frame has a run of its own, a picture one run for all its tiles.
    """
    pixels, clips = encoded.get("pixel_values"), any(visual.kind == "video" for visual in visuals)
    # pictures are tiles that a number of placeholders stands for, or clips came out among them
    rows = hasattr(processor, "image_seq_length") or (clips and PIXELS[0] not in encoded)
    if pixels is None or pixels.dim() != 4 or not rows:
        return {}
    per_row, token = row_tokens(processor)
    flags = (encoded["input_ids"] == token).tolist()
    runs = iter([len(list(group)) // per_row for flag, group in groupby(flags) if flag])
    lengths: list[int] = []
    for visual in visuals:
        if visual.kind == "image":
            lengths += [1] * next(runs, 0)
        else:
            lengths.append(sum(next(runs, 0) for _ in range(len(visual.pixels))))
    if sum(lengths) != len(pixels) or next(runs, None) is not None:
        raise DataError(
            f"the processor made {len(pixels)} rows of pixels, and its placeholders tell of clips and tiles {lengths}; "
            "expected as many. Its chat template or settings don't go together."
        )
    return {"clip_lengths": torch.tensor(lengths)}
