"""What STA did with a clip as a page that needs nothing else. Public: `page`, `sections`, `summary`.

Pictures are in the page itself, each in light and dark; the reader's setting chooses. `sections` is the page without
its head, for an app that has a page already.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Callable
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import numpy as np

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

STYLE = """<style>
.sta-look h2 { line-height: 1.2; margin: 2.2rem 0 0.3rem; font-size: 1.3rem; }
.sta-look figure { margin: 0.8rem 0; overflow-x: auto; }
.sta-look figure:focus-visible, .sta-look .scroll:focus-visible { outline: 3px solid #0072B2; outline-offset: 3px; }
.sta-look img, .sta-look video { max-width: 100%; height: auto; border-radius: 4px; }
.sta-look figure[tabindex] img { min-width: 40rem; }
.sta-look .note { border-left: 4px solid #D55E00; padding: 0.2rem 0.8rem; }
.sta-look .scroll { overflow-x: auto; }
.sta-look table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; }
.sta-look th, .sta-look td { border-bottom: 1px solid color-mix(in srgb, currentColor 25%, transparent);
  padding: 0.3rem 0.7rem; text-align: right; }
.sta-look summary { cursor: pointer; padding: 0.3rem 0; }
</style>"""
UNTRAINED = (
    "No adapter was given, so STA is untrained: its branch starts at zero, adds nothing and changes nothing, and whom it "
    "looks at is chance. Train one, or name one with --adapter."
)
ELSEWHERE = (
    "This adapter keeps the token order of the published code, in which the result of a position's attention is added to "
    "another token. Attention and crossing are shown where attention looks from, branch and change where the result lands."
)


def page(title: str, subject: str, made: str, content: str) -> str:
    """A whole page; `content` is HTML (see `sections`), all else is plain text."""
    template = Template((Path(__file__).parent / "report.html").read_text(encoding="utf-8"))
    words = {"title": title, "subject": subject, "made": made}
    return template.substitute({name: html.escape(text) for name, text in words.items()}, sections=content)


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
    block = strongest_block(seen) if block is None else block
    parts = ['<div class="sta-look">', STYLE, *(f'<p class="note">{html.escape(note)}</p>' for note in noted)]
    if len(frames):
        parts += _overlay(seen, frames, times, block, movie)
    parts += _attention(seen) + _branch(seen) + ["</div>"]
    return "\n".join(parts)


def _overlay(
    seen: Observation, frames: np.ndarray, times: np.ndarray | None, block: int, movie: bytes | None
) -> list[str]:
    strongest = ", the one in which STA adds most" if block == strongest_block(seen) and seen.branch.any() else ""
    alternative = (
        f"Frames of the clip, and over them three maps of block {block}. Attention to other frames goes from "
        f"{_range(seen.crossing[seen.blocks.index(block)])} %, STA's part from "
        f"{_range(seen.branch[seen.blocks.index(block)])} % of the residual, the change from {_range(seen.change)} %."
    )
    parts = [
        "<h2>Where in the picture</h2>",
        f"<p>Maps of block {block}{strongest}. A square is one patch as the encoder sees it; a frame is the first one of its "
        "temporal step.</p>",
        "<ul><li><b>crossing</b>: the share of a patch's temporal attention that goes to frames other than its own, mean over "
        "heads. Before STA there is none: STA is the branch that looks along time. (An encoder whose own attention spans "
        "frames looks there as well, which is not shown.)</li>"
        "<li><b>branch</b>: the length of what STA adds to a patch's features in this block, against the length of the "
        "features that it is added to.</li>"
        "<li><b>change</b>: before and after STA, in the whole encoder: how far the features behind its last block are from "
        "those of the same model with STA off, against the length of the latter. LoRA, if the adapter has any, is on in "
        "both.</li></ul>",
        _figure(lambda theme: draw_maps(seen, frames, times, block, theme), alternative),
    ]
    if movie:
        parts.append(
            f'<figure><video controls loop muted playsinline preload="auto" aria-label="The same maps as a moving picture" '
            f'src="data:video/mp4;base64,{base64.b64encode(movie).decode()}">The maps as a moving picture.</video></figure>'
        )
    return parts


def _attention(seen: Observation) -> list[str]:
    mean = seen.attention.mean(1)
    own = mean.diagonal(axis1=1, axis2=2).mean(1)
    told = "; ".join(f"block {b}: {100 * o:.0f} % to the own frame" for b, o in zip(seen.blocks, own, strict=True))
    frames = seen.attention.shape[-1]
    alternative = f"Attention over {frames} frames for every block and head. {told}."
    return [
        "<h2>Which frame looks at which</h2>",
        f"<p>Temporal attention over the {frames} frames, mean over all positions of the picture. Each row of a square is "
        "a frame that looks and adds up to 100 %; bright cells are the frames that it looks at.</p>",
        _figure(lambda theme: draw_attention(seen, theme), alternative),
    ]


def _branch(seen: Observation) -> list[str]:
    rows = summary(seen, [], 0)["blocks"]
    cells = "".join(
        f'<tr><th scope="row">{row["block"]}</th><td>{100 * row["branch"]:.2f}</td><td>{100 * row["crossing"]:.1f}</td></tr>'
        for row in rows
    )
    return [
        "<h2>How much STA adds</h2>",
        "<p>Length of what STA adds to a token, against the length of the residual stream that it is added to. Points are "
        "medians over all tokens, bars hold the middle 80 %.</p>",
        _figure(lambda theme: draw_branch(seen, theme), "STA's part of the residual by block; the numbers are below."),
        '<details><summary>The numbers</summary><div class="scroll" tabindex="0" role="region" aria-label="Numbers by '
        'block"><table><thead><tr><th scope="col">block</th><th scope="col">STA\'s part, mean (%)</th>'
        f'<th scope="col">attention to other frames, mean (%)</th></tr></thead><tbody>{cells}</tbody></table></div>'
        f"<p>Attention spread evenly would give {100 * seen.even.mean():.1f} % to other frames. The encoder's output "
        f"changes by {100 * seen.change.mean():.2f} % on average.</p></details>",
    ]


def _figure(draw: Callable[[Theme], Figure], alternative: str) -> str:
    """A figure in light and dark; on a small screen it stays readable and is scrolled, also with the arrow keys."""
    light, dark = (f"data:image/png;base64,{base64.b64encode(png(draw(t))).decode()}" for t in (LIGHT, DARK))
    told = html.escape(alternative, quote=True)
    return (
        f'<figure tabindex="0"><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{told}"></picture></figure>'
    )


def _range(values: np.ndarray) -> str:
    return f"{100 * values.min():.1f} to {100 * values.max():.1f}"
