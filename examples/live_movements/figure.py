"""The table of docs/live.md and its figure, from results.json: `python figure.py`. No figure is typed by hand."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from sta_adapter.evaluation import wilson

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent.parent / "docs"
INK = "#123456"  # becomes the colour of the page's text
STYLE = """<style>
  .sta-live { color: var(--md-typeset-color, #1f2328); max-width: 100%; height: auto; }
  @media (prefers-color-scheme: dark) { .sta-live { color: var(--md-typeset-color, #e6edf3); } }
</style>"""
WAYS = {  # whether the adapter is causal, how it is asked, colour (3:1 against white and against dark pages)
    "both ways, the last 8 frames encoded again": (False, "again", "#d9730d"),
    "causal, each frame encoded once in a stream": (True, "stream", "#3b8fd0"),
}


def right(results: dict[str, Any], causal: bool, way: str) -> np.ndarray:
    """Whether the answer is right (seeds, clips, moments); moment k stands k frames behind the movement's first."""
    runs = sorted((run for run in results["runs"] if run["causal"] == causal), key=lambda run: run["seed"])
    return np.array([run["moments"][way] for run in runs], dtype=bool)


def delay(answers: np.ndarray) -> float:
    """Median number of the movement's frames seen when the answer has become right and stays so to its end.

    Of the clips whose answer is right when the whole movement is seen.
    """
    moving = answers[:, :9]
    known = moving[moving[:, -1]]
    wrong = ~known
    return float(np.median([0 if not row.any() else 1 + np.flatnonzero(row)[-1] for row in wrong]))


def table(results: dict[str, Any]) -> str:
    """A row a seed and a kind of attention."""
    rows = [
        "| seed | frames attend to | clips of 8 frames, % | frames shuffled, % | in a longer video, % | right after, frames |",
        "|" + " --- |" * 6,
    ]
    for run in sorted(results["runs"], key=lambda run: (run["seed"], not run["causal"])):
        answers = np.array(run["moments"]["stream" if run["causal"] else "again"], dtype=bool)
        counts = [run["ordered"]["overall"], run["shuffled"]["overall"]]
        cells = [percent(part["correct"], part["total"]) for part in counts]
        cells.append(percent(int(answers[:, 8].sum()), len(answers)))
        kind = "themselves and earlier ones" if run["causal"] else "all of the clip"
        rows.append(f"| {run['seed']} | {kind} | {' | '.join(cells)} | {delay(answers):g} |")
    return "\n".join(rows)


def percent(correct: int, total: int) -> str:
    """A share with its 95 % Wilson interval."""
    low, high = (100 * value for value in wilson(correct, total))
    return f"{100 * correct / total:.1f} ({low:.1f} to {high:.1f})"


def figure(results: dict[str, Any]) -> str:
    """Accuracy by the frames seen of the movement, mean of the seeds and each seed."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    colours = {f"{part}.color": INK for part in ("text", "xtick", "ytick")} | {
        "axes.labelcolor": INK,
        "axes.edgecolor": INK,
    }
    fixed = {"svg.fonttype": "none", "svg.hashsalt": "live", "font.family": "sans-serif", "font.size": 11}
    with pyplot.rc_context(fixed | colours):
        picture, axes = pyplot.subplots(figsize=(7.6, 3.6), layout="constrained")
        axes.axvspan(0, 8, color=INK, alpha=0.08, linewidth=0)
        axes.text(4, 0.985, "the movement", ha="center", va="top")
        axes.axhline(0.1, color=INK, alpha=0.35, linewidth=1, linestyle=":")
        axes.text(16, 0.085, "chance", ha="right", va="top")
        for name, (causal, way, colour) in WAYS.items():
            curves = right(results, causal, way).mean(axis=1)
            axes.plot(curves.T, color=colour, alpha=0.35, linewidth=1)
            axes.plot(curves.mean(axis=0), color=colour, linewidth=2.5, label=name)
        axes.set(xlim=(0, 16), ylim=(0, 1), xlabel="frames since the movement began", ylabel="right answers")
        axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
        axes.spines[["top", "right"]].set_visible(False)
        picture.legend(loc="outside upper center", frameon=False, ncols=1)
        text = io.StringIO()
        picture.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        pyplot.close(picture)
    svg = text.getvalue()[text.getvalue().index("<svg") :].replace(INK, "currentColor")
    label = "Share of right answers by the frames seen since the movement began"
    head = f'<svg class="sta-live" role="img" aria-label="{label}" '
    svg = re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1
    )
    return svg.replace("<svg ", head, 1).replace(">", ">\n" + STYLE, 1)


def page(results: dict[str, Any], text: str) -> str:
    """docs/live.md with today's table."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    made = f"{table(results)}\n\nWith {versions}; two threads on a CPU."
    return re.sub(
        r"(<!-- movements -->\n).*?(<!-- end movements -->)",
        lambda m: f"{m[1]}\n{made}\n\n{m[2]}",
        text,
        flags=re.DOTALL,
    )


def main() -> None:
    """Write the page's table and the figure."""
    results = json.loads((HERE / "results.json").read_text(encoding="utf-8"))
    file = DOCS / "live.md"
    file.write_text(page(results, file.read_text(encoding="utf-8")), encoding="utf-8")
    (DOCS / "figures" / "live.svg").write_text(figure(results), encoding="utf-8")


if __name__ == "__main__":
    main()
