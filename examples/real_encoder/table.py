"""The tables of docs/proof.md and its figure, from the runs in results/: `python table.py`. No figure is typed by hand."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from arms import ARMS, ORDERS

from sta_adapter.evaluation import wilson

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent.parent / "docs"
COLOURS = {"sta": "#3b8fd0", "lora": "#d9730d", "reader": "#8a8f98"}  # 3:1 against white and against dark pages
SHORT = {"sta": "STA", "lora": "LoRA", "reader": "reader alone"}
DASHES = {
    "learned": "none",
    "told": "11 3 2 3",
    "causal": "7 3",
    "none": "2 3",
}  # of lines, by what the reader knows of the frames' order
KNOWN = {
    "learned": "the reader learns the order from clips",
    "told": "it is told the order",
    "causal": "it has the causal mask alone",
    "none": "it knows no order",
}
# folders of results/: with Debian's pictures; with circles in the place of turns; all of the encoder's blocks in play
OTHERS = ("larger", "circling", "all-blocks")
EARLIER = ("even-attention", "two-blocks")  # set-ups before today's, folders of results/earlier
WIDTH, HEIGHT, LEFT, TOP, CURVES = 760, 330, 58, 30, 400
STYLE = """
  .sta-proof { color: var(--md-typeset-color, #1f2328); font: 13px system-ui, sans-serif; max-width: 100%; height: auto; }
  @media (prefers-color-scheme: dark) { .sta-proof { color: var(--md-typeset-color, #e6edf3); } }
  .sta-proof text { fill: currentColor; }
  .sta-proof .axis { stroke: currentColor; stroke-opacity: 0.25; fill: none; }
"""


def load(folder: Path = HERE / "results") -> list[dict[str, Any]]:
    """All runs of a folder, by name; `results/earlier` holds those of earlier set-ups."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def order_of(run: dict[str, Any]) -> str:
    """What the run's reader knows of the frames' order; the earliest runs don't say it."""
    return run["run"].get("order", "told")


def groups(runs: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Measured runs that differ in their seed alone: by what the reader knows of order, its rate, and in the order of `ARMS`."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in (run for run in runs if run["run"]["test"]):
        what = run["run"]
        order = list(ORDERS).index(order_of(run)), what["reader_lr"], list(ARMS).index(what["arm"])
        key = (*order, -what["share"], what["steps"], what["lr"])
        found.setdefault(key, []).append(run)
    return [sorted(found[key], key=lambda run: run["run"]["seed"]) for key in sorted(found)]


def percent(correct: int, total: int) -> str:
    """A share with its 95 % Wilson interval."""
    low, high = (100 * value for value in wilson(correct, total))
    return f"{100 * correct / total:.1f} ({low:.1f} to {high:.1f})"


def main_table(runs: list[dict[str, Any]]) -> str:
    """A row a group of runs."""
    pairs = list(next(run for run in runs if run["run"]["test"])["ordered"]["pairs"])
    heads = [
        "trained with the reader",
        "order",
        "parameters",
        "lr",
        "reader's lr",
        "steps",
        "data",
        "accuracy by seed, %",
        *pairs,
    ]
    heads += ["frames shuffled", "right of the pair named"]
    rows = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for group in groups(runs):
        what, orders = group[0]["run"], [run["ordered"] for run in group]
        accuracy = "<br>".join(percent(order["correct"], order["total"]) for order in orders)
        by_pair = [100 * sum(o["pairs"][p][0] for o in orders) / sum(o["pairs"][p][1] for o in orders) for p in pairs]
        shuffled = [sum(run["shuffled"][key] for run in group) for key in ("correct", "total", "pair_named")]
        within = [sum(order[key] for order in orders) for key in ("correct", "pair_named")]
        cells = [
            ARMS[what["arm"]].name,
            order_of(group[0]),
            f"{group[0]['parameters']:,}",
            "" if what["arm"] == "reader" else f"{what['lr']:g}",
        ]
        cells += [
            f"{what['reader_lr']:g}",
            str(what["steps"]),
            f"{100 * what['share']:g} %",
            accuracy,
            *(f"{value:.0f}" for value in by_pair),
        ]
        cells += [f"{100 * shuffled[0] / shuffled[1]:.1f}; of the pair {100 * shuffled[0] / max(1, shuffled[2]):.0f}"]
        rows.append("| " + " | ".join([*cells, f"{100 * within[0] / max(1, within[1]):.0f}"]) + " |")
    return "\n".join(rows)


def search_table(runs: list[dict[str, Any]]) -> str:
    """A row a run on the validation clips alone."""
    heads = ["on validation clips", "lr", "reader's lr", "reader first", "in", "steps", "accuracy by step, %"]
    rows = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    searched = [run for run in runs if not run["run"]["test"]]
    if not searched:
        return "None."
    for run in sorted(searched, key=lambda run: run["run"].get("warm", 0)):
        what = run["run"]
        curve = ", ".join(f"{100 * point['val']:.1f}" for point in run["curve"])
        lr = "" if what["arm"] == "reader" else f"{what['lr']:g}"
        cells = [
            ARMS[what["arm"]].name,
            lr,
            f"{what['reader_lr']:g}",
            first_of(run),
            "float32" if run["machine"].endswith("float32") else "bfloat16",
            str(what["steps"]),
            curve,
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def first_of(run: dict[str, Any]) -> str:
    """What the run's reader had learned besides describing frames."""
    if warm := run["run"].get("warm", 0):
        return f"{warm} steps on clips"
    return "the words" if run["settings"].get("word_steps") else ""


def in_validation(run: dict[str, Any]) -> float:
    """The run's accuracy on validation clips at its end."""
    return run["curve"][-1]["val"]


def chosen_rates(runs: list[dict[str, Any]]) -> dict[tuple[str, str], float]:
    """Of each (order, arm) with a grid on validation clips alone, its best rate."""
    searched = sorted((run for run in runs if not run["run"]["test"]), key=in_validation)
    return {(order_of(run), run["run"]["arm"]): run["run"]["lr"] for run in searched}  # the last of each stays


def verdict(runs: list[dict[str, Any]]) -> str:
    """Whether, on every seed that both have, STA's error is at most half of LoRA's, and the intervals are apart."""
    best: dict[tuple[str, float, int, int], dict[str, dict[str, Any]]] = {}
    rates = chosen_rates(runs)
    for run in (run for group in groups(runs) for run in group if run["run"]["share"] == 1):
        what = run["run"]
        arms = best.setdefault((order_of(run), what["reader_lr"], what["steps"], what["seed"]), {})
        other = arms.get(what["arm"])
        if rates.get((order_of(run), what["arm"]), what["lr"]) != what["lr"]:
            continue
        if other is None or in_validation(run) > in_validation(other):
            arms[what["arm"]] = run  # where no grid was run, of several rates the one that is best on validation clips
    lines: list[str] = []
    met: dict[str, list[bool]] = {}
    for (order, reader_lr, steps, seed), arms in sorted(best.items()):
        if not {"sta", "lora"} <= arms.keys():
            continue
        sta, lora = arms["sta"]["ordered"], arms["lora"]["ordered"]
        errors = [1 - measured["accuracy"] for measured in (sta, lora)]
        apart = wilson(sta["correct"], sta["total"])[0] > wilson(lora["correct"], lora["total"])[1]
        reached = errors[0] <= errors[1] / 2 and apart
        met.setdefault(order, []).append(reached)
        ratio = errors[0] / errors[1] if errors[1] else float("inf")
        lines.append(
            f"| {order} | {reader_lr:g} | {steps} | {seed} | {100 * errors[0]:.1f} | {100 * errors[1]:.1f} | {ratio:.2f} "
            f"| {'yes' if apart else 'no'} | {'met' if reached else 'not met'} |"
        )
    heads = [
        "| order | reader's lr | steps | seed | STA's error, % | LoRA's error, % | ratio | intervals apart | at most half |",
        "|" + " --- |" * 9,
    ]
    said = [
        f"with a reader whose order is *{order}* **{'met in every pair of runs' if all(pairs) else 'not met'}** "
        f"({sum(pairs)} of {len(pairs)})"
        for order, pairs in sorted(met.items(), key=lambda item: list(ORDERS).index(item[0]))
    ]
    goal = "The goal, at most half of LoRA's error with intervals apart, is"
    return "\n".join([*heads, *lines, "", f"{goal} {'; '.join(said) or '**not met** (no pair of runs)'}."])


def made_of(runs: list[dict[str, Any]]) -> str:
    """Of what the clips are made, and what the reader reads of single frames before any run."""
    pictures, reads = runs[0]["pictures"], runs[0]["reader_reads"]
    counts = "; ".join(f"{split} {has['object']} and {has['photograph']}" for split, has in pictures.items())
    right = ", ".join(f"{part} {100 * share:.0f} %" for part, share in reads.items())
    return (
        f"Objects and photographs: {counts}. Words of a single frame's description that the reader gets right: {right}."
    )


def made_with(runs: list[dict[str, Any]]) -> str:
    """Dates, machine, versions, and a command of each kind."""
    measured = [run for run in runs if run["run"]["test"]]
    dates = sorted({run["date"] for run in measured})
    versions = ", ".join(f"{name} {version}" for name, version in measured[-1]["versions"].items())
    machines = "; ".join(sorted({run["machine"] for run in measured}))
    seconds = sum(run["seconds"] for run in runs)
    return f"Run on {' and '.join(dates)} ({machines}; {versions}); {seconds / 60:.0f} minutes of one core's time in these runs."


def figure(runs: list[dict[str, Any]]) -> str:
    """Curves of the three arms on the validation clips, and each seed's accuracy on the test's with its interval."""
    shown: dict[tuple[str, str], list[dict[str, Any]]] = {}  # of each arm and order most seeds, then most steps
    rates = chosen_rates(runs)
    for group in sorted(groups(runs), key=lambda group: (len(group), group[0]["run"]["steps"])):
        what = group[0]["run"]
        rate = rates.get((order_of(group[0]), what["arm"]), what["lr"])
        if what["share"] == 1 and what["arm"] in COLOURS and what["lr"] == rate:
            shown[what["arm"], order_of(group[0])] = group
    orders = [order for order in DASHES if any(key[1] == order for key in shown)]
    right, bottom = LEFT + CURVES, HEIGHT - 46
    steps = max(group[0]["run"]["steps"] for group in shown.values())
    batch = runs[0]["settings"]["batch"]

    def height(share: float) -> float:
        return bottom - share * (bottom - TOP)

    parts = [f'<text x="{LEFT}" y="16">validation clips, while training</text>']
    parts += [f'<text x="{right + 56}" y="16">test clips, with 95 % intervals</text>']
    for tenth in range(0, 11, 2):
        y = height(tenth / 10)
        parts.append(f'<path class="axis" d="M{LEFT} {y:.1f}H{right}M{right + 56} {y:.1f}H{WIDTH - 8}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{10 * tenth} %</text>')
    for part in range(5):
        x = LEFT + part / 4 * CURVES
        parts.append(f'<text x="{x:.0f}" y="{bottom + 18}" text-anchor="middle">{steps * part // 4}</text>')
    parts.append(
        f'<text x="{LEFT + CURVES / 2}" y="{bottom + 38}" text-anchor="middle">optimiser steps of {batch} clips</text>'
    )
    arms = [arm for arm in COLOURS if any(key[0] == arm for key in shown)]
    for index, arm in enumerate(arms):
        column = right + 56 + (index + 0.5) * (WIDTH - 8 - right - 56) / len(arms)
        for number, order in enumerate(orders):
            seeds = shown.get((arm, order), ())
            for place, run in enumerate(seeds):
                x = column + 34 * (number - (len(orders) - 1) / 2) + 9 * (place - (len(seeds) - 1) / 2)
                points = [(LEFT + p["step"] / steps * CURVES, height(p["val"])) for p in run["curve"]]
                stroke = f'stroke="{COLOURS[arm]}" stroke-width="2" stroke-dasharray="{DASHES[order]}"'
                line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
                parts.append(f'<polyline points="{line}" fill="none" {stroke}/>')
                low, high = wilson(run["ordered"]["correct"], run["ordered"]["total"])
                parts.append(f'<path d="M{x:.1f} {height(low):.1f}V{height(high):.1f}" {stroke}/>')
                y = height(run["ordered"]["accuracy"])
                parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{COLOURS[arm]}"/>')
        parts.append(f'<text x="{column:.1f}" y="{bottom + 18}" text-anchor="middle">{SHORT[arm]}</text>')
        parts.append(f'<circle cx="{column:.1f}" cy="{bottom + 30}" r="5" fill="{COLOURS[arm]}"/>')
    if len(orders) > 1:
        for number, order in enumerate(orders):
            y = bottom - 12 - 18 * (len(orders) - 1 - number)
            stroke = f'stroke="currentColor" stroke-width="2" stroke-dasharray="{DASHES[order]}"'
            parts.append(
                f'<path d="M{LEFT + 8} {y}h36" {stroke}/><text x="{LEFT + 52}" y="{y + 4}">{KNOWN[order]}</text>'
            )
    label = "Accuracy of what is compared: curves on validation clips, and test clips by seed"
    head = f'<svg class="sta-proof" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
    return "\n".join([head, f"<style>{STYLE}</style>", *parts, "</svg>", ""])


def fill(page: str, name: str, text: str) -> str:
    """The page with what stands between two marks replaced."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
    if not pattern.search(page):
        raise SystemExit(f"the page has no marks for {name}")
    return pattern.sub(lambda match: f"{match[1]}\n{text}\n\n{match[2]}", page)


def page(runs: list[dict[str, Any]], text: str) -> str:
    """docs/proof.md with today's tables."""
    parts = {"table": main_table(runs) + "\n\n" + made_with(runs), "goal": verdict(runs), "search": search_table(runs)}
    for name in OTHERS:
        others = load(HERE / "results" / name)
        compared = [verdict(others)] if {"sta", "lora"} <= {run["run"]["arm"] for run in others} else []
        searched = [search_table(others)] if any(not run["run"]["test"] for run in others) else []
        parts[name] = "\n\n".join([*compared, main_table(others), *searched, made_of(others), made_with(others)])
    for name in EARLIER:
        earlier = load(HERE / "results" / "earlier" / name)
        parts[name] = "\n\n".join([main_table(earlier), search_table(earlier), made_with(earlier)])
    for name, part in parts.items():
        text = fill(text, name, part)
    return text


def main() -> None:
    """Write the page's tables and the figure, or print the tables of another folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, help="folder of runs to print a table of, instead of writing the page")
    given = parser.parse_args()
    if given.results:
        print(main_table(load(given.results)))
        return
    runs, proof = load(), DOCS / "proof.md"
    proof.write_text(page(runs, proof.read_text(encoding="utf-8")), encoding="utf-8")
    (DOCS / "figures" / "proof.svg").write_text(figure(runs), encoding="utf-8")


if __name__ == "__main__":
    main()
