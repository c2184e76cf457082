"""What STA did with a clip as a page that needs nothing else: report.html around sections.html.

Pictures are in the page itself, each in light and dark; the reader's setting chooses. `sections` is the page without
its head, for an app that has a page already.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment, FileSystemLoader

from sta_adapter.visualization.figures import (
    DARK,
    LIGHT,
    Theme,
    draw_attention,
    draw_branch,
    draw_maps,
    png,
    strongest_block,
)
from sta_adapter.visualization.observation import Observation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["notes", "page", "sections", "summary"]

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
    words = {"title": title, "subject": subject, "made": made, "sections": content}
    return TEMPLATES.get_template("report.html").render(words)


def summary(seen: Observation, notes: list[str], block: int) -> dict[str, Any]:
    """The figures behind the pictures, for scripts: means over tokens, in shares of 1."""
    heads, frames = seen.attention.shape[1:3]
    return {
        "frames": frames,
        "positions": seen.crossing.shape[-1],
        "heads": heads,
        "block_shown": block,
        "even_crossing": round(float(seen.even.mean()), 6),
        "change": round(float(seen.change.mean()), 6),
        "blocks": [
            {"block": index, "crossing": round(float(crossing), 6), "branch": round(float(branch), 6)}
            for index, crossing, branch in zip(
                seen.blocks, seen.crossing.mean((1, 2)), seen.branch.mean((1, 2)), strict=True
            )
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
) -> str:
    """The page's body: notes, pictures with what they show in words, and the numbers as a table.

    Args:
        seen: what STA did.
        frames: (T, height, width, 3) uint8, the picture of each temporal step; empty leaves the overlay out.
        times: (T,) seconds, or None.
        noted: of `notes`.
        block: index of the block whose maps are drawn; None takes the one in which STA adds most.
        movie: the overlay as an MP4 file.
    """
    strongest = strongest_block(seen)
    block = strongest if block is None else block
    row = seen.blocks.index(block)
    own = seen.attention.mean(1).diagonal(axis1=1, axis2=2).mean(1)
    return TEMPLATES.get_template("sections.html").render(
        notes=noted,
        block=block,
        is_strongest=block == strongest and seen.branch.any(),
        maps=_in_both_themes(lambda theme: draw_maps(seen, frames, times, block, theme)) if len(frames) else None,
        movie=_data_uri("video/mp4", movie) if movie else None,
        attention=_in_both_themes(lambda theme: draw_attention(seen, theme)),
        branch=_in_both_themes(lambda theme: draw_branch(seen, theme)),
        frames=seen.attention.shape[-1],
        own_frame="; ".join(
            f"block {b}: {100 * o:.0f} % to the own frame" for b, o in zip(seen.blocks, own, strict=True)
        ),
        crossing_range=_range(seen.crossing[row]),
        branch_range=_range(seen.branch[row]),
        change_range=_range(seen.change),
        numbers=summary(seen, noted, block),
    )


def _in_both_themes(draw: Callable[[Theme], Figure]) -> dict[str, str]:
    """A figure in light and dark; on a small screen it stays readable and is scrolled, also with the arrow keys."""
    return {theme.name: _data_uri("image/png", png(draw(theme))) for theme in (LIGHT, DARK)}


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _range(values: np.ndarray) -> str:
    return f"{100 * values.min():.1f} to {100 * values.max():.1f}"
