"""`sta-adapter evaluate`: how often a model is right, with and without its adapter, also on frames out of order.

Public: `command`.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import click

from sta_adapter.commands.options import Grouped, model_options, option
from sta_adapter.errors import ConfigError

ORDERS = ("ordered", "shuffled", "reversed")
FRAMES = click.Choice([*ORDERS, "all"])
BAD = click.Choice(["skip", "error"])


HELP = """\b
Example: sta-adapter evaluate --model Qwen/Qwen2-VL-2B-Instruct \\
             --adapter my-adapter --data test.jsonl --base

Measures accuracy with its 95 % interval, in all and by category.
"""


@click.command(cls=Grouped, help=HELP, short_help="Measure a model with and without its adapter.")
@option("What", "--model", metavar="ID", required=True, help="Model on the Hub, or its folder.")
@option("What", "--adapter", metavar="ID", help="Adapter on the Hub, or its folder.")
@option("What", "--data", metavar="FILE", required=True, help="JSON Lines with answers.")
@option("What", "--base", is_flag=True, help="Also measure the model without the adapter.")
@option("What", "--device", metavar="DEVICE", help="cpu, cuda:1, ... [default: CUDA if it is there]")
@option("What", "--frames", type=FRAMES, metavar="ORDER", default="ordered", help="ordered, shuffled, reversed or all.")
@option("How", "--batch-size", type=click.IntRange(1), metavar="N", default=8, help="Samples at a time. [default: 8]")
@option("How", "--max-new-tokens", type=click.IntRange(1), metavar="N", default=32, help="[default: 32]")
@option("How", "--num-workers", type=click.IntRange(0), metavar="N", default=2, help="That decode. [default: 2]")
@option("How", "--fps", type=float, metavar="RATE", help="Frames a second. [default: as trained]")
@option("How", "--nframes", type=int, metavar="N", help="Frames of every clip instead.")
@option("How", "--seed", type=int, metavar="N", default=0, help="Of the shuffling. [default: 0]")
@option("How", "--on-bad-sample", type=BAD, metavar="WHAT", default="skip", help="skip or error. [default: skip]")
@option("Result", "--out", metavar="FOLDER", help="Keeps predictions; begun ones go on.")
@option("Result", "--json", "as_json", is_flag=True, help="Print JSON, not a table.")
@model_options
def command(model: str, adapter: str | None, base: bool, out: str | None, as_json: bool, **options: Any) -> None:
    """Evaluate and print the outcome."""
    from sta_adapter.loading import load_adapter, load_model, load_processor

    source = {"revision": options["revision"], "trust_remote_code": options["trust_remote_code"]}
    processor = load_processor(model, **source)
    dataset = _dataset(processor, adapter, options)
    net = load_model(model, dtype=options["dtype"] or "auto", device=options["device"], **source)
    if adapter is not None:
        net = load_adapter(net, adapter)
    runs: dict[str, Any] = {"base": _without(net)} if base or adapter is None else {}
    if adapter is not None:
        runs["adapter"] = contextlib.nullcontext()
    results = {}
    for name, switched in runs.items():
        with switched:
            results[name] = _measure(
                net, dataset, f"{model} {adapter if name == 'adapter' else ''}", name, out, options
            )
    report = {
        name: {order: result.to_dict(predictions=False) for order, result in by_order.items()}
        for name, by_order in results.items()
    }
    if out:
        Path(out, "results.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    click.echo(json.dumps(report, indent=1) if as_json else _table(report))


def _dataset(processor: Any, adapter: str | None, options: dict[str, Any]) -> Any:
    """The data, with the frames that the adapter was trained with unless options say otherwise."""
    from sta_adapter.data import FrameSettings, VideoDataset
    from sta_adapter.loading import saved_frame_settings

    if options["fps"] is not None and options["nframes"] is not None:
        raise ConfigError("--fps and --nframes exclude each other; give one of them.")
    sampling = saved_frame_settings(adapter) if adapter else {}
    if options["fps"] is not None:
        sampling |= {"fps": options["fps"], "nframes": None}
    if options["nframes"] is not None:
        sampling["nframes"] = options["nframes"]
    frames = FrameSettings(**sampling)
    return VideoDataset(options["data"], processor, frames=frames, on_bad_sample=options["on_bad_sample"])


@contextlib.contextmanager
def _without(model: Any) -> Any:
    """The model without its adapter: STA off, LoRA off."""
    from sta_adapter.inject import get_sta

    handle = get_sta(model)
    with contextlib.ExitStack() as stack:
        if hasattr(model, "disable_adapter"):
            stack.enter_context(model.disable_adapter())
        if handle is not None:
            stack.enter_context(handle.disabled())
        yield


def _measure(model: Any, dataset: Any, tag: str, name: str, out: str | None, options: dict[str, Any]) -> dict[str, Any]:
    from sta_adapter.evaluation import evaluate

    return {
        order: evaluate(
            model,
            dataset,
            frames=order,
            seed=options["seed"],
            batch_size=options["batch_size"],
            max_new_tokens=options["max_new_tokens"],
            num_workers=options["num_workers"],
            predictions_file=Path(out, f"{name}-{order}.jsonl") if out else None,
            tag=tag.strip(),
            progress=True,
        )
        for order in (ORDERS if options["frames"] == "all" else (options["frames"],))
    }


def _table(report: dict[str, Any]) -> str:
    """Accuracy in percent with its interval: a row for each run, then a row for each category."""
    runs = {f"{name}, {order}": result for name, orders in report.items() for order, result in orders.items()}
    rows = [["", "accuracy", "of"]]
    rows += [[label, _cell(run["overall"]), str(run["overall"]["total"])] for label, run in runs.items()]
    blocks = [_columns(rows)]
    categories = dict.fromkeys(name for run in runs.values() for name in run["categories"])
    if categories:
        cells = [[c, *(_cell(run["categories"].get(c)) for run in runs.values())] for c in categories]
        blocks.append(_columns([["category", *runs], *cells]))
    bad = max(len(run["bad_samples"]) for run in runs.values())
    if bad:
        blocks.append(f"{bad} samples could not be used and don't count.")
    return "\n\n".join(blocks)


def _columns(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _cell(score: dict[str, Any] | None) -> str:
    if score is None:
        return ""
    low, high = (f"{100 * score[key]:.1f}" for key in ("low", "high"))
    return f"{100 * score['accuracy']:.1f} [{low}, {high}]"
