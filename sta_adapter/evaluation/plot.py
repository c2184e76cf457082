"""A picture of an evaluation: accuracy by category, base against adapter, and the controls.

Colours are of Okabe and Ito's palette and marks differ in shape as well; the background is white, so that
it reads on dark pages too.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from sta_adapter._lazy import importing
from sta_adapter.evaluation.comparison import Report, runs_of
from sta_adapter.evaluation.result import RunReport, ScoreReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Scores = dict[str, list[ScoreReport | None]]
Panel = tuple[str, list[str], Scores, list[float | None]]

LOOKS = {  # colour, marker and offset from the row's middle
    "base": ("#D55E00", "s", 0.17),
    "adapter": ("#0072B2", "o", -0.17),
}
WRAP = 34  # characters of a category's name in a line
MOST_ROWS = 60  # categories; a picture of hundreds can't be read, one of thousands not be drawn
LINE_HEIGHT = 0.21  # inches


def draw(report: Report, path: Path) -> None:
    """Write the picture of what `sta_adapter.evaluation.comparison.compare` gives, a .png."""
    figure_of(report).savefig(path, dpi=150, facecolor="white")


def figure_of(report: Report) -> Figure:
    """The picture as a matplotlib figure; see `draw`."""
    with importing("the plot needs matplotlib: pip install 'sta-adapter[viz]'."):
        from matplotlib.figure import Figure

    models = runs_of(report)
    orders = list(dict.fromkeys(order for runs in models.values() for order in runs))
    first = "ordered" if "ordered" in orders else orders[0]
    shown = {name: runs[first] for name, runs in models.items() if first in runs}
    categories = list(dict.fromkeys(c for run in shown.values() for c in run["categories"]))
    chance = report.get("chance")
    panels: list[Panel] = []
    if categories:
        title = f"By category, frames {first}"
        if len(categories) > MOST_ROWS:
            title += f": the {MOST_ROWS} of {len(categories)} with most questions"
            categories = _largest(categories, shown)
        scores = {name: [run["categories"].get(c) for c in categories] for name, run in shown.items()}
        guessed = chance["categories"] if chance else {}
        panels.append((title, categories, scores, [guessed.get(c) for c in categories]))
    scores = {name: [runs[o]["overall"] if o in runs else None for o in orders] for name, runs in models.items()}
    guessed_all = [chance["overall"] if chance else None] * len(orders)
    panels.append(("All questions, by order of the frames", orders, scores, guessed_all))

    heights = [LINE_HEIGHT * sum(map(_lines, labels)) for _, labels, *_ in panels]
    figure = Figure(figsize=(8, sum(heights) + 1.0 * len(panels) + 0.5), facecolor="white", layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, panel in zip(axes, panels, strict=True):
        _panel(axis, *panel)
    axes[-1].set_xlabel("right answers (%), with 95 % Wilson intervals")
    legend = sorted(zip(*axes[-1].get_legend_handles_labels(), strict=True), key=lambda entry: entry[1] == "chance")
    figure.legend(*zip(*legend, strict=True), loc="outside upper center", ncols=len(legend), frameon=False)
    return figure


def _largest(categories: list[str], shown: dict[str, RunReport]) -> list[str]:
    """Those with most questions, in the order in which they came."""
    sizes = {
        c: max(run["categories"][c]["total"] if c in run["categories"] else 0 for run in shown.values())
        for c in categories
    }
    kept = set(sorted(categories, key=lambda c: -sizes[c])[:MOST_ROWS])
    return [c for c in categories if c in kept]


def _wrapped(label: str) -> str:
    return "\n".join(textwrap.wrap(label, WRAP)) or label


def _lines(label: str) -> float:
    """How many lines tall a label's row is."""
    return max(2, _wrapped(label).count("\n") + 1.6)


def _panel(axis: Axes, title: str, labels: list[str], scores: Scores, chances: list[float | None]) -> None:
    """One row a label, as tall as its name; a mark with its interval for each model, and where guessing would be."""
    middles, edge, told = [], 0.0, None
    for label, chance in zip(labels, chances, strict=True):
        height = _lines(label) / 2
        middles.append(edge + height / 2)
        if chance is not None:
            axis.plot(
                [100 * chance] * 2,
                [edge, edge + height],
                color="#555555",
                linestyle=":",
                label=None if told else "chance",
            )
            told = True
        edge += height
        axis.axhline(edge, color="#DDDDDD", linewidth=0.6)
    for name, found in scores.items():
        colour, marker, offset = LOOKS[name]
        rows = [(y - (offset if len(scores) > 1 else 0), s) for y, s in zip(middles, found, strict=True) if s]
        shares = [100 * score["accuracy"] for _, score in rows]
        ends = [
            [share - 100 * score["low"] for share, (_, score) in zip(shares, rows, strict=True)],
            [100 * score["high"] - share for share, (_, score) in zip(shares, rows, strict=True)],
        ]
        axis.errorbar(
            shares, [y for y, _ in rows], xerr=ends, fmt=marker, color=colour, markersize=6, capsize=3, label=name
        )
    # texts, not formulas
    axis.set_yticks(middles, [_wrapped(label) for label in labels], parse_math=False, usetex=False)
    axis.set_ylim(edge, 0)
    axis.set_xlim(-2, 102)
    axis.set_title(title, loc="left", fontsize=11)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
