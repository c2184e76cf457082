"""`sta-adapter inspect`: what STA would put where in a model, and what it costs; weights are never loaded."""

from __future__ import annotations

import itertools
import json
import re
import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import click

from sta_adapter.cli.options import Grouped, option
from sta_adapter.errors import ConfigError

if TYPE_CHECKING:
    from sta_adapter.inspection import InspectedBlock, Inspection

LINE = 80


HELP = """\b
Example: sta-adapter inspect Qwen/Qwen2-VL-2B-Instruct
         sta-adapter inspect my-model/config.json --layers 0-15

Shows where STA would go in a model, and what it costs. MODEL is a Hub
id, a folder or a config.json. Weights are neither downloaded nor loaded.
"""


@click.command(cls=Grouped, help=HELP)
@click.argument("model")
@option("What", "--head-scale", type=float, help="Share of the encoder's heads. [default: the backbone's]")
@option("What", "--layers", metavar="LIST", help="Blocks that get STA, such as 0-3,8. [default: all]")
@option(
    "What", "--order", type=click.Choice(["after_spatial", "before_spatial"]), help="Place of the branch in its block."
)
@option("What", "--backbone", metavar="NAME", help="Backbone to use. [default: by the model's classes]")
@option(
    "What", "--clip", default="16x32x32", show_default=True, help="Clip to count: frames, rows, columns of patches."
)
@option("What", "--window", type=int, metavar="FRAMES", help="Also show the memory of a stream of causal STA.")
@option("Result", "--json", "as_json", is_flag=True, help="Print JSON, with a row for each block.")
@option("Model", "--revision", metavar="NAME", help="Branch, tag or commit of the model on the Hub.")
@option("Model", "--trust-remote-code", is_flag=True, help="Run Python code that comes with the model.")
def command(
    model: str,
    clip: str,
    backbone: str | None,
    as_json: bool,
    revision: str | None,
    trust_remote_code: bool,
    **cfg: object,
) -> None:
    """Show where STA would go in a model, and what it costs."""
    from sta_adapter.config import STAConfig
    from sta_adapter.inspection import ClipSize, empty_model, inspect_model

    size = ClipSize.parse(clip)
    given = {name: value for name, value in cfg.items() if value is not None}
    if "layers" in given:
        given["layers"] = parse_layers(str(given["layers"]))
    if "window" in given:
        given["causal"] = True
    settings = STAConfig.from_dict(given)
    empty = empty_model(model, revision=revision, trust_remote_code=trust_remote_code)
    report = inspect_model(empty, settings, backbone=backbone, clip=size)
    click.echo(json.dumps(report, indent=1) if as_json else "\n".join(describe(report, str(size))))


def parse_layers(text: str) -> Literal["all"] | tuple[int, ...]:
    """`"all"`, or the indices in a list such as "0-3,8"."""
    if text.strip() == "all":
        return "all"
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        numbers = [first, last] if dash else [first]
        if not all(re.fullmatch("[0-9]{1,4}", number) for number in numbers) or int(numbers[-1]) < int(first):
            raise ConfigError(f"layers {text!r}: expected block indices such as 0-3,8 or all.")
        found += range(int(first), int(numbers[-1]) + 1)
    return tuple(found)


def describe(report: Inspection, clip: str) -> list[str]:
    """The report as lines of at most 80 columns."""
    encoder, config, parameters = report["encoder"], report["config"], report["parameters"]
    at = f" at {encoder['path']}" if encoder["path"] else ""
    arithmetic = report["arithmetic"]
    added, rest = _operations(arithmetic["sta_gflop"]), _operations(arithmetic["encoder_gflop"])
    shares = f"{_percent(parameters['sta'], parameters['encoder'])} of the tower's {_millions(parameters['encoder'])}"
    if parameters["model"] != parameters["encoder"]:
        shares += (
            f", {_percent(parameters['sta'], parameters['model'])} of the model's {_millions(parameters['model'])}"
        )
    lines = [
        *_item("model", report["model"]),
        *_item("code", report["code"]),
        *_item("backbone", report["backbone"]),
        *_item("encoder", f"{encoder['class']}{at}"),
        *_item(
            "",
            f"{encoder['blocks']} blocks, {encoder['width']} wide, {encoder['heads']} heads of {encoder['head_size']}",
        ),
        *_item("STA", f"order {config['order']}, head_scale {config['head_scale']:g}, RoPE {_rope(config)}"),
        "",
        *table(report["blocks"]),
        "",
        *_item("parameters", f"{_millions(parameters['sta'])} added: {shares}"),
        *_item("arithmetic", f"+{arithmetic['percent']:.1f} %: {added} on the tower's {rest}, for {clip}"),
    ]
    if stream := report["stream"]:
        kept = f"{_bytes(stream['bytes'])} in {stream['dtype']}, for {stream['positions']} positions a frame"
        lines += [
            *_item("stream", f"keeps {kept} and a window of {stream['window']} frames"),
            *_item("", f"({stream['formula']})"),
        ]
    for warning in report["warnings"]:
        lines += ["", *_item("warning", warning)]
    return lines


def table(blocks: list[InspectedBlock]) -> list[str]:
    """A row for each run of blocks that differ in nothing but their index."""

    def kind(numbered: tuple[int, InspectedBlock]) -> tuple[object, ...]:
        position, block = numbered
        pattern = _pattern(block)
        return block["index"] - position, pattern, block["width"], block["heads"], block["parameters"]

    rows = [("block", "added before", "width", "heads", "parameters")]
    for _, group in itertools.groupby(enumerate(blocks), kind):
        run = [block for _, block in group]
        first, last, block = run[0]["index"], run[-1]["index"], run[0]
        index = str(first) if first == last else f"{first}-{last}"
        count = f"{block['parameters']:,}" + ("" if first == last else f" x {len(run)}")
        hook = block["hook"] if first == last else _pattern(block)
        rows.append((index, hook, str(block["width"]), str(block["heads"]), count))
    total = sum(block["parameters"] for block in blocks)
    rows.append((f"{len(blocks)} in all", "", "", "", f"{total:,}"))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return [
        "  ".join(
            c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _pattern(block: InspectedBlock) -> str:
    """The hook's path with a star for the block's index."""
    parts = block["hook"].split(".")
    return ".".join("*" if part == str(block["index"]) else part for part in parts)


def _item(name: str, text: str) -> list[str]:
    return textwrap.wrap(text, LINE, initial_indent=f"{name:<12}", subsequent_indent=" " * 12, break_long_words=False)


def _bytes(number: int) -> str:
    return f"{number / 2**20:,.1f} MiB"


def _millions(count: int) -> str:
    return f"{count:,}" if count < 1e5 else f"{count / 1e6:,.1f} M"


def _operations(gflop: float) -> str:
    return f"{gflop / 1000:.2f} TFLOP" if gflop >= 100 else f"{gflop:.3g} GFLOP"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %"


def _rope(config: Mapping[str, object]) -> str:
    return "none" if config["rope_theta"] is None else f"{config['rope_theta']:g}"
