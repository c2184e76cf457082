"""Results of an evaluation side by side: base against adapter, and frames in order against frames out of order.

`compare` gives what results.json holds, `as_text` the same to read, within 80 columns. Differences are of the same
questions, with bootstrap intervals (see `mean_interval`); single accuracies have Wilson intervals.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Literal, NamedTuple, TypedDict

import numpy as np

from sta_adapter.data.conversation import Sample
from sta_adapter.data.message import files_of
from sta_adapter.evaluation.result import EvaluationResult, RunReport, ScoreReport

Results = Mapping[str, Mapping[str, EvaluationResult]]
Run = tuple[str, str]  # "base" or "adapter", and the order of frames
MODELS: tuple[Literal["base"], Literal["adapter"]] = ("base", "adapter")
CONTROLS = ("shuffled", "reversed")
LINE, NAME = 80, 30
DRAWS = 10_000
FEW = 30  # clips below which a bootstrap interval says little
_AT_ONCE = 2_000_000  # counts in memory


class Label(TypedDict, total=False):
    """What a difference is of: `frames` between models, `model` between orders of frames."""

    of: str
    frames: str
    model: str


class Difference(Label, total=False):
    """A difference of accuracies with its interval."""

    difference: float
    low: float
    high: float
    questions: int
    clips: int


class Chance(TypedDict):
    """The accuracy of guessing."""

    overall: float
    categories: dict[str, float]


class Report(TypedDict, total=False):
    """What `compare` gives, and what results.json has beside it."""

    base: dict[str, RunReport]
    adapter: dict[str, RunReport]
    differences: list[Difference]
    reading: list[str]
    chance: Chance | None
    notes: list[str]


class Contrast(NamedTuple):
    """A difference to report: the sum of some runs minus the sum of others."""

    label: Label
    plus: list[Run]
    minus: list[Run]


def clips_of(samples: Sequence[Sample]) -> list[Hashable]:
    """Which clips each sample is about; questions about the same ones are not independent of each other."""
    return [tuple(name for part in sample.visuals for name in files_of(part)) for sample in samples]


def chance(samples: Sequence[Sample]) -> Chance | None:
    """The accuracy of guessing among the options, in all and by category; None where not all samples have options."""
    samples = [sample for sample in samples if sample.problem is None]
    shares = [1 / len(sample.options) for sample in samples if sample.options]
    if not shares or len(shares) < len(samples):
        return None
    groups: dict[str, list[float]] = {}
    for sample, share in zip(samples, shares, strict=True):
        if sample.category is not None:
            groups.setdefault(sample.category, []).append(share)
    return {"overall": fmean(shares), "categories": {name: fmean(found) for name, found in groups.items()}}


def compare(results: Results, clips: Sequence[Hashable], *, seed: int = 0) -> Report:
    """Plain values of all results, their differences, and sentences that read them.

    Args:
        results: by name ("base", "adapter"), then by order of frames.
        clips: of each question, by its index, see `clips_of`.
        seed: of the bootstrap.
    """
    runs = {(name, order): result for name, orders in results.items() for order, result in orders.items()}
    differences = [
        _difference(contrast, runs, clips, seed)
        for contrast in _contrasts(results)
        if runs.keys() >= {*contrast.plus, *contrast.minus}
    ]
    report: Report = {}
    for name in MODELS:
        if name in results:
            report[name] = {order: result.to_dict(predictions=False) for order, result in results[name].items()}
    report["differences"], report["reading"] = differences, _reading(differences)
    return report


def runs_of(report: Report) -> dict[str, dict[str, RunReport]]:
    """The runs of a report by name, then by order of frames."""
    return {name: report[name] for name in MODELS if name in report}


def _contrasts(names: Iterable[str]) -> Iterator[Contrast]:
    """Adapter against base; each model's use of the order of frames; and how much more the adapter uses it than the base."""
    for order in ("ordered", *CONTROLS):
        yield Contrast({"of": "adapter - base", "frames": order}, [("adapter", order)], [("base", order)])
    for name in names:
        for order in CONTROLS:
            yield Contrast({"of": f"ordered - {order}", "model": name}, [(name, "ordered")], [(name, order)])
    for order in CONTROLS:
        plus, minus = [("adapter", "ordered"), ("base", order)], [("adapter", order), ("base", "ordered")]
        yield Contrast({"of": f"ordered - {order}", "model": "adapter - base"}, plus, minus)


def _difference(
    contrast: Contrast, runs: Mapping[Run, EvaluationResult], clips: Sequence[Hashable], seed: int
) -> Difference:
    """The contrast question by question, over the questions that all of its runs answered."""
    signs = [1] * len(contrast.plus) + [-1] * len(contrast.minus)
    right = [{p.index: float(p.correct) for p in runs[run].predictions} for run in (*contrast.plus, *contrast.minus)]
    shared = sorted(set.intersection(*(set(answers) for answers in right)))
    values = [sum(sign * answers[i] for sign, answers in zip(signs, right, strict=True)) for i in shared]
    about = [clips[index] for index in shared]
    mean, low, high = mean_interval(values, about, seed=seed)
    return {
        **contrast.label,
        "difference": mean,
        "low": low,
        "high": high,
        "questions": len(shared),
        "clips": len(set(about)),
    }


def mean_interval(
    values: Sequence[float], clips: Sequence[Hashable], *, seed: int = 0, draws: int = DRAWS
) -> tuple[float, float, float]:
    """Mean, lower and upper end of its 95 % bootstrap percentile interval; zeros where there is no question.

    Questions about one clip are drawn together: they are right or wrong together more often than others, and counted singly
    they would make the interval too narrow. Of differences question by question it is that of a paired comparison.

    Args:
        values: one a question.
        clips: which clip each question is about.
        seed: of the drawing; the same seed gives the same interval.
        draws: how many samples are drawn.
    """
    if len(values) == 0:
        return 0.0, 0.0, 0.0
    number: dict[Hashable, int] = {}
    place = np.array([number.setdefault(clip, len(number)) for clip in clips])
    sums = np.bincount(place, weights=np.asarray(values, dtype=np.float64))
    sizes = np.bincount(place).astype(np.float64)
    generator, means, count = np.random.default_rng(seed), [], len(sums)
    for start in range(0, draws, max(1, _AT_ONCE // count)):
        rows = min(max(1, _AT_ONCE // count), draws - start)
        times = generator.multinomial(count, np.full(count, 1 / count), size=rows)
        means.append((times @ sums) / (times @ sizes))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(np.mean(values)), float(low), float(high)


def _reading(differences: Sequence[Difference]) -> list[str]:
    """What the differences say: adapter against base with frames in order, and whether the order matters at all."""
    control = next((entry["of"] for entry in differences if entry.get("model")), None)
    said = []
    for entry in differences:
        model, better, worse = entry.get("model"), entry["low"] > 0, entry["high"] < 0
        if entry.get("frames") == "ordered":
            verdict = "better than" if better else "worse than" if worse else "not shown to differ from"
            said.append(f"The adapter is {verdict} the base: {_points(entry)} points.")
        elif entry["of"] == control and model == "adapter - base":
            verdict = "uses it more" if better else "uses it less" if worse else "is not shown to use it more or less"
            said.append(f"The adapter {verdict} than the base does: {_points(entry)} points.")
        elif entry["of"] == control:
            verdict = "Yes" if better else "No, it is better without" if worse else "Not shown"
            said.append(f"Does the {model} use time at all? {verdict}: {control} is {_points(entry)} points.")
    few = min((entry["clips"] for entry in differences), default=FEW)
    return [*said, f"Only {few} clip{'s' * (few > 1)}: too few to rely on these intervals."] if few < FEW else said


def _points(entry: Difference) -> str:
    """A difference in points with its interval."""
    return f"{100 * entry['difference']:+.1f} [{100 * entry['low']:+.1f}, {100 * entry['high']:+.1f}]"


def as_text(report: Report) -> str:
    """The report to read: accuracy in percent, categories, what it says, and what was left out."""
    models = runs_of(report)
    runs = {f"{name}, {order}": run for name, orders in models.items() for order, run in orders.items()}
    rows = [["", "right, %", "of"]]
    rows += [[label, _cell(run["overall"]), str(run["overall"]["total"])] for label, run in runs.items()]
    blocks = [_columns(rows)]
    if report.get("differences"):
        named = [(f"{d['of']}, {d.get('model') or d['frames']}", d) for d in report["differences"]]
        blocks.append(
            _columns([["difference", "points", "clips"], *([n, _points(d), str(d["clips"])] for n, d in named)])
        )
    shown = {name: orders.get("ordered") or next(iter(orders.values())) for name, orders in models.items()}
    totals = {c: score["total"] for run in shown.values() for c, score in run["categories"].items()}
    if totals:
        cells = [[c, *(_cell(run["categories"].get(c)) for run in shown.values()), str(totals[c])] for c in totals]
        frames = ", ".join(dict.fromkeys(run["frames"] for run in shown.values()))
        blocks.append(_columns([[f"by category, {frames}", *shown, "of"], *cells], NAME))
    said = [*report.get("reading", []), *report.get("notes", []), *_faults(runs)]
    blocks.append("\n".join(textwrap.fill(s, LINE, break_long_words=False, break_on_hyphens=False) for s in said))
    return "\n\n".join(block for block in blocks if block)


def _faults(runs: Mapping[str, RunReport]) -> list[str]:
    """Samples that could not be asked, and answers that no rule could read."""
    said = []
    bad = max((run["bad_samples"] for run in runs.values()), key=len)
    if bad:
        said.append(f"Samples that could not be used and don't count: {len(bad)}. The first: {bad[0]}")
    unmatched = {label: run["unmatched"] for label, run in runs.items() if run.get("unmatched")}
    if unmatched:
        counts = ", ".join(f"{count} ({label})" for label, count in unmatched.items())
        said.append(f"Answers that could not be read, counted as wrong: {counts}. Such as:")
        examples = next(run["unmatched_examples"] for run in runs.values() if run.get("unmatched"))
        said += [f"  {json.dumps(example['said'], ensure_ascii=False)} ({example['source']})" for example in examples]
    return said


def _columns(rows: list[list[str]], name_width: int = LINE) -> str:
    """Rows in columns; a long name goes on below itself."""
    tall: list[list[str]] = []
    for name, *cells in rows:
        first, *more = textwrap.wrap(name, name_width) or [""]
        tall += [[first, *cells], *([part, *[""] * len(cells)] for part in more)]
    widths = [max(len(row[i]) for row in tall) for i in range(len(tall[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in tall)


def _cell(score: ScoreReport | None) -> str:
    if score is None:
        return ""
    return f"{100 * score['accuracy']:.1f} [{100 * score['low']:.1f}, {100 * score['high']:.1f}]"
