"""Draw one block with STA as docs/figures/sta-block.svg: `python scripts/draw_sta_block.py`.

Text and lines take the colour of the page around them, so that the drawing can be read in light and dark; the three
colours hold 3:1 against both and differ in lightness for those who don't see them.
"""

from __future__ import annotations

from pathlib import Path

FILE = Path(__file__).resolve().parent.parent / "docs" / "figures" / "sta-block.svg"
WIDTH, HEIGHT = 760, 400
STREAM, BRANCH = 66, 146  # heights of the residual stream and of the branches' boxes
CELL, FRAMES, SIDE = 13, 4, 3
SPATIAL, TEMPORAL, MLP = "#3b8fd0", "#d9730d", "#2e9e73"
STYLE = """
  .sta-drawing { color: var(--md-typeset-color, #1f2328); font: 14px system-ui, sans-serif; max-width: 100%; height: auto; }
  @media (prefers-color-scheme: dark) { .sta-drawing { color: var(--md-typeset-color, #e6edf3); } }
  .sta-drawing text { fill: currentColor; text-anchor: middle; }
  .sta-drawing .line { stroke: currentColor; stroke-width: 1.5; fill: none; }
"""


def text(x: float, y: float, words: str, style: str = "") -> str:
    """Centred words; `style` is CSS."""
    return f'<text x="{x:g}" y="{y:g}"' + (f' style="{style}"' if style else "") + f">{words}</text>"


def line(path: str, arrow: bool = False) -> str:
    """A line along an SVG path."""
    return f'<path class="line" d="{path}"' + (' marker-end="url(#sta-arrow)"' if arrow else "") + "/>"


def box(x: float, width: float, colour: str, *words: str) -> str:
    """A box of a branch with one or two lines of words."""
    shape = f'<rect x="{x:g}" y="{BRANCH - 24}" width="{width:g}" height="48" rx="6" fill="{colour}" fill-opacity="0.16" stroke="{colour}" stroke-width="2"/>'
    top = BRANCH + 5 - 9 * (len(words) - 1)
    return shape + "".join(text(x + width / 2, top + 18 * i, word) for i, word in enumerate(words))


def branch(left: float, right: float, boxes: list[tuple[float, str, tuple[str, ...]]]) -> str:
    """Boxes from a tap of the stream at `left` to a sum on it at `right`."""
    gap = (right - left - sum(width for width, _, _ in boxes)) / (len(boxes) + 1)
    parts, x = [line(f"M{left} {STREAM} V{BRANCH} h{gap:g}")], left + gap
    for width, colour, words in boxes:
        parts.append(box(x, width, colour, *words))
        x += width
        end = f"H{right} V{STREAM + 12}" if x + gap > right - 1 else f"h{gap:g}"
        parts.append(line(f"M{x:g} {BRANCH} {end}", arrow=end.startswith("H")))
        x += gap
    parts.append(f'<circle class="line" cx="{right}" cy="{STREAM}" r="10"/>')
    parts.append(line(f"M{right - 5} {STREAM} h10 M{right} {STREAM - 5} v10"))
    return "\n".join(parts)


def frames(centre: float, top: float, colour: str, marked: set[tuple[int, int]]) -> str:
    """The clip's frames, each a grid of patches; `marked` holds (frame, position) of those that are mixed."""
    size, gap = CELL * SIDE, 9
    left = centre - (FRAMES * size + (FRAMES - 1) * gap) / 2
    parts = []
    for frame in range(FRAMES):
        for position in range(SIDE * SIDE):
            x, y = left + frame * (size + gap) + position % SIDE * CELL, top + position // SIDE * CELL
            fill = f'fill="{colour}"' if (frame, position) in marked else 'fill="none"'
            parts.append(
                f'<rect x="{x:g}" y="{y:g}" width="{CELL}" height="{CELL}" {fill} stroke="currentColor" stroke-opacity="0.55"/>'
            )
    return "\n".join(parts)


def panel(centre: float, colour: str, title: str, marked: set[tuple[int, int]], *notes: str) -> str:
    """What a branch mixes, below it."""
    bold = "font-weight:600"
    lines = [text(centre, 310 + 20 * i, note) for i, note in enumerate(notes)]
    return "\n".join([text(centre, 222, title, bold), frames(centre, 240, colour, marked), *lines])


def draw() -> str:
    """The drawing as SVG text."""
    middle = 4  # the marked position: the middle of the grid
    parts = [
        line(f"M16 {STREAM} H742", arrow=True),
        *(text(x, STREAM - 18, name, "font-style:italic") for x, name in ((26, "x"), (248, "y"), (504, "z"), (730, "out"))),
        text(380, 20, "one block: the residual stream, tokens (T frames, N positions)"),
        branch(46, 226, [(48, SPATIAL, ("norm",)), (88, SPATIAL, ("spatial", "attention"))]),
        branch(270, 482, [(48, TEMPORAL, ("norm",)), (100, TEMPORAL, ("attention", "over frames")), (32, TEMPORAL, ("\u00d7 \u03b3",))]),
        branch(526, 700, [(48, MLP, ("norm",)), (88, MLP, ("MLP",))]),
        panel(136, SPATIAL, "as it was", {(1, p) for p in range(9)}, "within a frame:", "T sequences of N tokens"),
        panel(376, TEMPORAL, "STA", {(f, middle) for f in range(FRAMES)}, "one position through time:", "N sequences of T tokens"),
        panel(613, MLP, "as it was", {(2, middle)}, "each token", "on its own"),
        text(380, 382, "Filled: tokens that are mixed with each other, one sequence of many. Class tokens pass by STA.", "font-size:13px"),
    ]  # fmt: skip
    label = "A block of a vision transformer: spatial attention, then STA over the frames, then the MLP"
    head = f'<svg class="sta-drawing" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
    arrow = '<marker id="sta-arrow" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto-start-reverse"><path d="M0 0 10 5 0 10z" fill="currentColor"/></marker>'
    return "\n".join([head, f"<style>{STYLE}</style>", f"<defs>{arrow}</defs>", *parts, "</svg>", ""])


if __name__ == "__main__":
    FILE.write_text(draw(), encoding="utf-8")
