"""`sta-adapter check-data`: what would be a bad sample in training, found before it."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import click

from sta_adapter.cli.options import Grouped, data_options, option, read_run
from sta_adapter.errors import ConfigError

SHOWN = 20  # problems, and categories, in the printed report; --json has all
LINE = 80

HELP = """\b
Example: sta-adapter check-data train.jsonl \\
             --model Qwen/Qwen2-VL-2B-Instruct

Decodes every clip as training does and reports missing and unreadable
files, empty answers, samples that are too long, categories and lengths.
Takes tar shards as well. Ends with exit code 1 if anything is wrong.
"""


@click.command(cls=Grouped, needs={"train": ("PIL", "tqdm", "yaml")}, help=HELP)
@click.argument("file")
@data_options
@option("Run", "--model", metavar="ID", help="Also count tokens, with this model's processor.")
@option("How", "--config", metavar="FILE.yaml", help="Settings of the training that this data is for.")
@option(
    "How",
    "--max-length",
    type=click.IntRange(1),
    metavar="N",
    help="Longest sample, in tokens. [default: the tokenizer's]",
)
@option(
    "How",
    "--num-workers",
    type=click.IntRange(0),
    metavar="N",
    default=2,
    help="Processes that decode clips. [default: 2]",
)
@option("How", "--decode-timeout", type=float, metavar="SECONDS", help="Longest decoding of a sample. [default: 60]")
@option("How", "--revision", metavar="NAME", help="The model's branch, tag or commit on the Hub.")
@option("How", "--trust-remote-code", is_flag=True, help="Run Python code that comes with the model.")
@option("Result", "--json", "as_json", is_flag=True, help="Print JSON, with every problem.")
def command(
    file: str,
    model: str | None,
    config: str | None,
    as_json: bool,
    format: str | None,
    videos: str | None,
    max_length: int | None,
    num_workers: int,
    decode_timeout: float | None,
    revision: str | None,
    trust_remote_code: bool,
) -> None:
    """Check and print what was found."""
    from sta_adapter.data.check import check_data
    from sta_adapter.data.clip_reader import ClipReader
    from sta_adapter.loading import load_processor
    from sta_adapter.training.settings_check import check_sizes

    of_model = {"max-length": max_length, "revision": revision, "trust-remote-code": trust_remote_code}
    idle = [name for name, value in of_model.items() if value]
    if idle and not model:
        raise ConfigError(
            f"--{idle[0]} has no effect without --model, whose processor counts tokens; add it, or leave --{idle[0]} out."
        )
    own = {
        "model": model,
        "format": format,
        "videos": videos,
        "max_length": max_length,
        "decode_timeout": decode_timeout,
    }
    run, settings = read_run(config, (), own, needed=())
    processor = load_processor(model, revision=revision, trust_remote_code=trust_remote_code) if model else None
    if processor is not None:
        check_sizes(ClipReader.of(processor, settings.frames))
    report = check_data(
        file,
        processor=processor,
        format=run["format"],
        videos=run["videos"],
        frames=settings.frames,
        max_length=settings.max_length,
        batch_size=settings.device_batches()[0],
        num_workers=num_workers,
        decode_timeout=settings.decode_timeout,
        progress=sys.stderr.isatty(),
    ).to_dict()
    click.echo(json.dumps(report, indent=1) if as_json else "\n".join(describe(report)))
    if report["bad"]:
        sys.exit(1)


def describe(report: Mapping[str, Any]) -> list[str]:
    """The report as lines of at most 80 columns, but for long paths."""
    lines = [f"{report['samples']} sample{'s' * (report['samples'] != 1)}, {report['bad']} of them bad"]
    for name, words in (("clip_seconds", "seconds a clip"), ("clip_frames", "frames a clip"), ("tokens", "tokens")):
        if name in report:
            low, middle, high = (f"{report[name][key]:.5g}" for key in ("least", "median", "largest"))
            lines.append(f"{words}: {low} to {high}, median {middle}")
    categories = list(report["categories"].items())
    if categories:
        lines += ["", f"{len(categories)} categories", *(f"{count:>8}  {name}" for name, count in categories[:SHOWN])]
        lines += _more(categories)
    if report["problems"]:
        lines.append("")
    for problem in report["problems"][:SHOWN]:
        text = f"{problem['kind']}: {problem['source']}: {problem['reason']}"
        lines += textwrap.wrap(text, LINE, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
    return lines + _more(report["problems"])


def _more(items: Sequence[object]) -> list[str]:
    return [f"    ... and {len(items) - SHOWN} more; --json lists all"] if len(items) > SHOWN else []
