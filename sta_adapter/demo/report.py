"""The demo's report: a table in the terminal, figures, and a page with clips."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader

from sta_adapter.data.dataset import VideoDataset
from sta_adapter.demo.clips import LABELS
from sta_adapter.demo.methods import METHODS, DemoSettings
from sta_adapter.demo.run import answer_inputs
from sta_adapter.demo.scores import Results, compared, summary
from sta_adapter.evaluation.result import ScoreReport
from sta_adapter.injection.handle import STAHandle
from sta_adapter.visualization.observation import temporal_attention
from sta_adapter.visualization.patch_attention import scale_of
from sta_adapter.visualization.theme import LIGHT, new_figure

COLOURS = {"sta": "#0072B2", "lora": "#D55E00", "lora_language": "#009E73"}  # Okabe and Ito: told apart by everybody
MARKERS = {"sta": "o", "lora": "s", "lora_language": "^"}
SHORT = {"sta": "STA + LoRA", "lora": "LoRA, both", "lora_language": "LoRA, language"}


def table(results: Results) -> tuple[list[str], list[list[str]]]:
    """Headings and rows, one row a method."""
    rows = [summary(results, method) for method in compared(results)]
    heads = ["", "accuracy %", *(f"{pair} %" for pair in rows[0]["pairs"])]
    heads += ["shuffled frames %", "parameters", "training s"]
    return heads, [
        [
            SHORT[row["method"]],
            _percent(row["ordered"], interval=True),
            *(_percent(score) for score in row["pairs"].values()),
            _percent(row["shuffled"], interval=True),
            f"{row['trainable_parameters']:,}",
            f"{row['seconds']:.0f}",
        ]
        for row in rows
    ]


def is_quick(results: Results) -> bool:
    """Whether these are the results of a run that shows every step and proves nothing."""
    return bool(results["settings"] == dataclasses.asdict(DemoSettings.quick()))


def print_table(results: Results) -> None:
    """The table, fitted to the terminal: a line a quantity, a column a method."""
    from rich.console import Console
    from rich.table import Table

    heads, rows = table(results)
    settings, seeds = results["settings"], results["seeds"]
    grid = Table(
        title=f"{settings['test_clips']} clips never trained on, {len(seeds)} seed(s), {settings['steps']} steps",
        caption="a quick run: it shows every step and proves nothing" if is_quick(results) else None,
    )
    grid.add_column("95 % intervals below", no_wrap=True)
    for row in rows:
        grid.add_column(row[0], justify="right")
    for index, head in enumerate(heads[1:], 1):
        grid.add_row(head, *(row[index] for row in rows), end_section=index == 1)
    Console().print(grid)


def write_report(folder: Path, results: Results, handle: STAHandle, test: VideoDataset) -> Path:
    """Write `curves.png`, `attention.png` and `index.html` into the demo's folder; the page's path.

    `handle` is of the first seed's STA model, `test` the test clips.
    """
    draw_curves(folder / "curves.png", results)
    draw_attention(folder / "attention.png", handle, test)
    heads, rows = table(results)
    text = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True).get_template("report.html")
    page = text.render(
        methods=[(SHORT[method], METHODS[method]) for method in compared(results)],
        heads=heads,
        rows=rows,
        clips=_clips(folder, test, results),
        quick=is_quick(results),
        steps=results["settings"]["steps"],
        settings=", ".join(f"{k} {v}" for k, v in results["settings"].items()),
        reader=", ".join(f"{k} {v}" for k, v in results["reader"].items()),
        versions=", ".join(f"{k} {v}" for k, v in results["versions"].items()),
        seeds=", ".join(map(str, results["seeds"])),
        reloaded=f"{results['reloaded']['clips']} clips" if results["reloaded"]["bit_equal"] else "none",
        seconds=f"{results['seconds']:.0f}",
    )
    (folder / "index.html").write_text(page, encoding="utf-8")
    return folder / "index.html"


def draw_curves(path: Path, results: Results) -> None:
    """Accuracy over steps: a line a method (the mean), a thin one a seed."""
    figure = new_figure(7, 4.2, paper="white")
    axes = figure.subplots()
    for method in compared(results):
        colour = COLOURS[method]
        curves = [np.array(run["curve"]) for run in results["runs"] if run["method"] == method]
        if len(curves) > 1:
            for curve in curves:
                axes.plot(curve[:, 0], 100 * curve[:, 1], color=colour, alpha=0.3, linewidth=1)
        mean = np.mean(curves, axis=0)
        axes.plot(mean[:, 0], 100 * mean[:, 1], color=colour, marker=MARKERS[method], linewidth=2, label=SHORT[method])
    axes.axhline(100 / len(LABELS), color="0.4", linestyle=":", label="chance")
    first = results["settings"]["steps"] * results["settings"]["stage_one"]
    if first:
        axes.axvline(first, color="0.6", linestyle="--", linewidth=1)
        axes.text(first, 101, "stage two of STA begins", fontsize=8, ha="left", va="bottom", color="0.35")
    count = min(results["settings"]["curve_clips"], results["settings"]["test_clips"])
    axes.set(xlabel="optimiser steps", ylabel=f"accuracy on {count} clips never trained on (%)", ylim=(0, 100))
    axes.legend(frameon=False, loc="upper left", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def draw_attention(path: Path, handle: STAHandle, test: VideoDataset) -> None:
    """Which frame looks at which in each block, against even spread, for a clip and the movement that is its opposite."""
    pictures = {}
    for index in (0, 1):
        sample = test.samples[index]
        pictures[str(sample.answer)] = temporal_attention(handle, answer_inputs(test, index))
    blocks = list(next(iter(pictures.values())))
    relative = {label: {b: w.shape[-1] * w.mean((0, 1)) for b, w in found.items()} for label, found in pictures.items()}
    scale = scale_of(np.stack([weights for found in relative.values() for weights in found.values()]))
    end = np.log2(scale)
    figure = new_figure(1.5 * len(blocks) + 1, 3.6, paper="white")
    axes = figure.subplots(len(pictures), len(blocks), squeeze=False)
    for row, (label, weights) in zip(axes, relative.items(), strict=True):
        for axis, block in zip(row, blocks, strict=True):
            shown = axis.imshow(np.log2(np.maximum(weights[block], 1e-6)), vmin=-end, vmax=end, cmap=LIGHT.colours)
            axis.set(title=f"block {block}")
            axis.locator_params(integer=True, nbins=4)
        row[0].set_ylabel(f"{label!r}\nframe that looks")
    for axis in axes[-1]:
        axis.set_xlabel("frame looked at")
    bar = figure.colorbar(shown, ax=axes, label="attention, relative to uniform", shrink=0.8, ticks=[-end, 0, end])
    bar.ax.set_yticklabels([f"1/{scale:g}", "1", f"{scale:g}"])
    figure.savefig(path, dpi=150)


def _percent(score: ScoreReport, *, interval: bool = False) -> str:
    text = f"{100 * score['accuracy']:.1f}"
    return f"{text}\n{100 * score['low']:.1f} to {100 * score['high']:.1f}" if interval else text


def _clips(folder: Path, test: VideoDataset, results: Results) -> list[dict[str, object]]:
    """One clip of each label, and what each method of the first seed said."""
    answers = {run["method"]: run["answers"] for run in reversed(results["runs"])}
    clips: list[dict[str, object]] = []
    for index, sample in enumerate(test.samples[: len(LABELS)]):
        clip = next(part["video"] for part in sample.messages[0]["content"] if part["type"] == "video")
        said = [(SHORT[method], answers[method][index]) for method in compared(results)]
        clips.append({"source": os.path.relpath(clip, folder), "answer": sample.answer, "said": said})
    return clips
