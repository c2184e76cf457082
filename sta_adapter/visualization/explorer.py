"""The part of the page that can be clicked: which frame a patch looks at, in each block and head, relative to even spread.

explorer.html, explorer.css and explorer.js, with the numbers and the frames in the page itself; nothing is loaded.
"""

from __future__ import annotations

import base64
import hashlib
import io
from pathlib import Path
from typing import TypedDict

import numpy as np

from sta_adapter.visualization.figures import data_uri, shades
from sta_adapter.visualization.observation import Observation
from sta_adapter.visualization.patch_attention import BUDGET, HIDDEN, decode, encode, may_see, scale_of

SCRIPT = (Path(__file__).parent / "explorer.js").read_text(encoding="utf-8")
FRAME_SIDES = ((16, 224), (100, 112), (1 << 30, 56))  # up to so many frames, so many pixels of a frame's longer side
SPRITE_ROW = 16  # frames side by side


def script_hash() -> str:
    """What a page's Content-Security-Policy must name to let the script run, and no other."""
    return f"sha256-{base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()}"


class Patches(TypedDict):
    """Where single patches look."""

    blocks: list[int]
    heads: int
    rows: int
    columns: int
    edge: int
    whole: list[int]
    codes: str


class Sprite(TypedDict):
    """All frames in two pictures."""

    source: str
    grey: str
    width: int
    height: int
    across: int


class ExplorerData(TypedDict):
    """What the page's script needs."""

    frames: int
    times: list[float] | None
    blocks: list[int]
    heads: int
    first: int
    scale: float
    means: str
    patches: Patches | None
    sprite: Sprite | None


def explorer_data(
    seen: Observation, frames: np.ndarray, times: np.ndarray | None, block: int, budget: int = BUDGET
) -> ExplorerData | None:
    """What the script needs, as JSON takes it; None for a clip of so many frames that not even one block fits.

    Of `frames` (T, height, width, 3) there are none where patches can't be laid on the picture; `times` (T,) are seconds; `block`
    is shown first. The patches' attention takes at most `budget` bytes, that of whole frames an eighth of it.
    """
    count, heads, steps, _ = seen.attention.shape
    first = seen.blocks.index(block)
    by_strength = sorted(range(count), key=lambda row: (row != first, -float(seen.branch[row].mean())))
    rows = sorted(by_strength[: budget // 8 // (heads * steps**2)])
    if not rows or first not in rows:
        return None
    data: ExplorerData = {
        "frames": steps,
        "times": None if times is None else [round(float(time), 3) for time in times],
        "blocks": [seen.blocks[row] for row in rows],
        "heads": heads,
        "first": rows.index(first),
        "scale": scale_of(seen.relative),
        "means": _text(encode(seen.attention[rows], may_see(seen.even))),
        "patches": None,
        "sprite": _sprite(frames) if len(frames) else None,
    }
    if seen.patches is None or seen.pooling is None or not len(frames):
        return data
    with_patches = [row for row in sorted(by_strength[: seen.pooling.blocks]) if row in rows]
    if with_patches:
        kept = seen.patches[with_patches]
        data["scale"] = max(data["scale"], scale_of(_sampled(kept)))
        data["patches"] = {
            "blocks": [rows.index(row) for row in with_patches],
            "heads": kept.shape[1],
            "rows": kept.shape[2],
            "columns": kept.shape[3],
            "edge": seen.pooling.edge,
            "whole": list(seen.positions.shape) if seen.positions is not None else [],
            "codes": _text(kept),
        }
    return data


def _sampled(codes: np.ndarray) -> np.ndarray:
    """Multiples of even spread of at most two million codes."""
    flat = codes.reshape(-1)[:: max(1, codes.size >> 20)]
    return decode(flat[flat != HIDDEN], codes.shape[-1])


def _text(codes: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(codes).tobytes()).decode()


def _sprite(frames: np.ndarray) -> Sprite:
    """All frames, made small, as JPEG pictures with rows of up to 16: in colour, and in grey to lay colours over."""
    from PIL import Image

    longest = next(side for count, side in FRAME_SIDES if len(frames) <= count)
    height, width = frames.shape[1:3]
    shrink = min(1.0, longest / max(height, width))
    size = (max(1, round(width * shrink)), max(1, round(height * shrink)))
    across = min(SPRITE_ROW, len(frames))

    def sheet(pictures: np.ndarray) -> str:
        whole = Image.new("RGB", (size[0] * across, size[1] * -(-len(pictures) // across)))
        for index, picture in enumerate(pictures):
            small = Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS)
            whole.paste(small, (index % across * size[0], index // across * size[1]))
        buffer = io.BytesIO()
        whole.save(buffer, "JPEG", quality=85)
        return data_uri("image/jpeg", buffer.getvalue())

    grey = (255 * shades(frames)).astype(np.uint8)
    return {"source": sheet(frames), "grey": sheet(grey), "width": size[0], "height": size[1], "across": across}
