"""What STA did with a clip as a page that needs nothing else: report.html around sections.html.

Pictures are in the page itself, each in light and dark; the reader's setting chooses. `sections` is the page without
its head, for an app that has a page already.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np
from jinja2 import Environment, FileSystemLoader

from sta_adapter.visualization.explorer import SCRIPT, ExplorerData, explorer_data, script_hash
from sta_adapter.visualization.figures import data_uri, draw_attention, draw_branch, draw_maps, png, strongest_block
from sta_adapter.visualization.observation import Observation
from sta_adapter.visualization.patch_attention import BUDGET
from sta_adapter.visualization.theme import DARK, LIGHT, Theme

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATES = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
UNTRAINED = (
    "No adapter was given, so STA is untrained: its branch starts at zero, adds nothing and changes nothing, and its "
    "attention weights are chance. Train one, or name one with --adapter."
)
ELSEWHERE = (
    "This adapter keeps the token order of the published code, in which the result of a position's attention is added to "
    "another token. Attention and crossing are shown where attention looks from, branch and change where the result lands."
)


def page(title: str, subject: str, made: str, content: str) -> str:
    """A whole page; `content` is HTML (see `sections`), all else is text."""
    words = {"title": title, "subject": subject, "made": made, "sections": content, "script_hash": script_hash()}
    return TEMPLATES.get_template("report.html").render(words)


class BlockSummary(TypedDict):
    """Means of a block."""

    block: int
    crossing: float
    branch: float


class Summary(TypedDict):
    """What `summary` gives."""

    frames: int
    positions: int
    heads: int
    block_shown: int
    even_crossing: float
    change: float
    blocks: list[BlockSummary]
    notes: list[str]


def summary(seen: Observation, notes: list[str], block: int) -> Summary:
    """The figures behind the pictures, for scripts: means over tokens, in shares of 1."""
    heads, frames = seen.attention.shape[1:3]
    means = zip(seen.blocks, seen.crossing.mean((1, 2)), seen.branch.mean((1, 2)), strict=True)
    return {
        "frames": frames,
        "positions": seen.crossing.shape[-1],
        "heads": heads,
        "block_shown": block,
        "even_crossing": round(float(seen.even.mean()), 6),
        "change": round(float(seen.change.mean()), 6),
        "blocks": [
            {"block": index, "crossing": round(float(crossing), 6), "branch": round(float(branch), 6)}
            for index, crossing, branch in means
        ],
        "notes": notes,
    }


def notes(seen: Observation, why_no_overlay: str, *, trained: bool) -> list[str]:
    """What a reader must know before believing the pictures."""
    found = [] if trained else [UNTRAINED]
    found += [ELSEWHERE] if seen.lands_elsewhere else []
    return found + ([f"There is no overlay: {why_no_overlay}"] if why_no_overlay else [])


def sections(
    seen: Observation,
    frames: np.ndarray,
    times: np.ndarray | None,
    *,
    noted: list[str],
    block: int | None = None,
    movie: bytes | None = None,
    budget: int = BUDGET,
    framed: bool = False,
) -> str:
    """The page's body: notes, pictures with what they show in words, and the numbers as a table.

    Args:
        seen: what STA did.
        frames: (T, height, width, 3) uint8, the picture of each temporal step; empty leaves the overlay out.
        times: (T,) seconds, or None.
        noted: of `notes`.
        block: whose maps are drawn; None takes the one in which STA adds most.
        movie: the overlay as an MP4 file.
        budget: of `explorer_data`.
        framed: put the part that can be clicked into a frame, for a page that runs no scripts out of what it is given.
    """
    strongest = strongest_block(seen)
    block = strongest if block is None else block
    row = seen.blocks.index(block)
    own = np.nanmean(seen.relative.mean(1).diagonal(axis1=1, axis2=2), axis=1)
    data = explorer_data(seen, frames, times, block, budget)
    kept = _kept(seen, data) if data else ""
    clickable = {"data": data, "script": SCRIPT, "kept": kept, "script_hash": script_hash()}
    return TEMPLATES.get_template("sections.html").render(
        notes=noted,
        block=block,
        is_strongest=block == strongest and seen.branch.any(),
        maps=_in_both_themes(lambda theme: draw_maps(seen, frames, times, block, theme)) if len(frames) else None,
        movie=data_uri("video/mp4", movie) if movie else None,
        attention=_in_both_themes(lambda theme: draw_attention(seen, theme)),
        branch=_in_both_themes(lambda theme: draw_branch(seen, theme)),
        frames=seen.attention.shape[-1],
        own_frame="; ".join(f"block {b}: {o:.2f} times uniform" for b, o in zip(seen.blocks, own, strict=True)),
        crossing_range="{:.2f} to {:.2f}".format(*_ends(seen.relative_crossing[row])),
        branch_range="{:.1f} to {:.1f}".format(*_ends(100 * seen.branch[row])),
        change_range="{:.1f} to {:.1f}".format(*_ends(100 * seen.change)),
        framed=TEMPLATES.get_template("framed.html").render(clickable) if framed and data else "",
        **clickable,
        numbers=summary(seen, noted, block),
    )


def _in_both_themes(draw: Callable[[Theme], Figure]) -> dict[str, str]:
    """A figure in light and dark, narrow enough to be read on a small screen."""
    return {theme.name: data_uri("image/png", png(draw(theme))) for theme in (LIGHT, DARK)}


def _ends(values: np.ndarray) -> tuple[float, float]:
    return float(values.min()), float(values.max())


def _kept(seen: Observation, data: ExplorerData) -> str:
    """What of the patches' attention is in the page, in words."""
    patches, frames = data["patches"], seen.attention.shape[-1]
    if patches is None:
        return ""
    size = len(patches["codes"]) * 3 // 4
    words = [
        f"Each value is kept in one byte, to {100 * np.expm1(np.log(max(2, frames)) / 254):.1f} %: {size / 2**20:.2g} MiB of at most {BUDGET >> 20}."
    ]
    if patches["edge"] > 1:
        words.append(f"A square is the mean of {patches['edge']} x {patches['edge']} patches.")
    if len(patches["blocks"]) < len(seen.blocks):
        words.append(f"Patches are there for the {len(patches['blocks'])} blocks in which STA adds most.")
    if patches["heads"] < data["heads"]:
        words.append("Of patches there is the mean of the heads alone.")
    return " ".join(words)
