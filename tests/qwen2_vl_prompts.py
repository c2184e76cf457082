"""Prompts of text, images and clips for Qwen2-VL, and a plain, slow account of where their tokens stand."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

IMAGE, VIDEO, START, END, PAD = 150, 151, 152, 153, 0
Part = tuple[
    int, ...
]  # (n,): n tokens of text; (rows, columns): an image; (frames, rows, columns): a clip; merged tokens
MERGE = 2


def tokens_of(parts: list[Part]) -> list[int]:
    """A prompt's tokens; the text is 1, 2, 3, ..."""
    tokens: list[int] = []
    for part in parts:
        if len(part) == 1:
            tokens += [1 + len(tokens) % 120 for _ in range(part[0])]
        else:
            size = torch.Size(part).numel()
            tokens += [START, *[VIDEO if len(part) == 3 else IMAGE] * size, END]
    return tokens


def batch_of(*rows: list[Part], side: str = "left", pixels: bool = True, types: bool = True) -> dict[str, Any]:
    """Arguments of the model for a padded batch of prompts."""
    texts = [tokens_of(parts) for parts in rows]
    longest = max(map(len, texts))
    ids, mask = [], []
    for text in texts:
        gap = [PAD] * (longest - len(text))
        ids.append(gap + text if side == "left" else text + gap)
        ones = [1] * len(text)
        mask.append(gap + ones if side == "left" else ones + gap)
    batch: dict[str, Any] = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    grids = {2: ("image_grid_thw", "pixel_values"), 3: ("video_grid_thw", "pixel_values_videos")}
    for axes, (grid_name, pixel_name) in grids.items():
        found = [
            [1 if axes == 2 else part[0], part[-2] * MERGE, part[-1] * MERGE]
            for parts in rows
            for part in parts
            if len(part) == axes
        ]
        if found:
            batch[grid_name] = torch.tensor(found)
            if pixels:
                patches = int(batch[grid_name].prod(-1).sum())
                batch[pixel_name] = torch.randn(patches, 96, generator=torch.Generator().manual_seed(patches))
    if types and transformers_version() >= (5, 3):
        batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE) + 2 * (batch["input_ids"] == VIDEO)
    return batch


def cache_name(model: Any) -> str:
    """What the model's forward calls its cache."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def transformers_version() -> tuple[int, ...]:
    """Major and minor version of the installed transformers."""
    import transformers

    return tuple(int(part) for part in transformers.__version__.split(".")[:2])


def is_transformers_5() -> bool:
    return transformers_version() >= (5,)


# how the installed release numbers Qwen2-VL's text
NATIVE = next(
    name
    for since, name in (
        ((5, 6), "rows-and-columns"),
        ((5, 3), "unknown"),
        ((4, 49), "original"),
        ((0, 0), "sequential"),
    )
    if transformers_version() >= since
)
# transformers 4.47 to 4.51 give a model that was saved another attention
OF_SAVED = 1e-4 if (4, 47) <= transformers_version() < (4, 52) else 0.0
needs_seams = pytest.mark.skipif(transformers_version() < (4, 52), reason="needs transformers 4.52 or newer")


def reference_positions(parts: list[Part], scale: float | None) -> tuple[list[tuple[float, float, float]], float]:
    """(temporal, row, column) of every token, and the next position: VideoRoPE's with a scale, Qwen2-VL's without."""
    found: list[tuple[float, float, float]] = []
    free = 0.0
    for part in parts:
        if len(part) == 1:
            found += [(free + i,) * 3 for i in range(part[0])]
            free += part[0]
            continue
        frames, rows, columns = (1, *part) if len(part) == 2 else part
        found.append((free,) * 3)  # the token that opens a clip
        first = free + 1
        for t in range(frames):
            for i in range(rows):
                for j in range(columns):
                    if scale is None:
                        found.append((first + t, first + i, first + j))
                    else:
                        now = first + t * scale
                        found.append((now, now + i - (rows - 1) // 2, now + j - (columns - 1) // 2))
        free = first + (max(frames, rows, columns) if scale is None else (frames - 1) * scale + 1)
        found.append((free,) * 3)  # the token that closes it
        free += 1
    return found, free


def check_positions(rows: list[list[Part]], batch: dict[str, Any], result: Any, scale: float | None) -> None:
    """Compare a `get_rope_index` result with the reference: kept tokens, padding (1) and deltas."""
    positions, deltas = result
    for row, parts in enumerate(rows):
        found, free = reference_positions(parts, scale)
        expected = torch.tensor(found, dtype=positions.dtype).reshape(-1, 3).T
        kept = batch["attention_mask"][row] == 1
        torch.testing.assert_close(positions[:, row, kept], expected, rtol=0, atol=0)
        assert positions[:, row, ~kept].eq(1).all()
        assert deltas[row].item() == free - len(kept)


sizes = st.integers(1, 4)
text = st.tuples(st.integers(1, 6))
prompts = st.lists(st.one_of(text, st.tuples(sizes, sizes), st.tuples(st.integers(1, 6), sizes, sizes)), max_size=5)
# at least two tokens: transformers 4 counts the padding's position 1 into the delta of a one-token prompt
start = st.tuples(st.integers(2, 6))
rows_of_prompts = st.lists(st.builds(lambda first, rest: [first, *rest], start, prompts), min_size=1, max_size=3)
