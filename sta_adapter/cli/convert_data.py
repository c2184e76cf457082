"""`sta-adapter convert-data`: a file of samples in the form of another training tool, or from theirs to ours."""

from __future__ import annotations

import click

from sta_adapter.cli.options import Grouped, data_options, option
from sta_adapter.integrations.records import TOOLS

HELP = """\b
Example: sta-adapter convert-data train.jsonl swift.jsonl --to ms-swift
         sta-adapter convert-data swift.jsonl ours.jsonl --to sta-adapter

Writes samples as another training tool reads them. What its records have
no place for, such as a clip's own number of frames, is an error that says
by which setting of the tool it is replaced; --drop leaves it out.
For LLaMA-Factory, dataset_info.json beside OUT gets an entry.
"""


@click.command(cls=Grouped, help=HELP)
@click.argument("file")
@click.argument("out", type=click.Path(dir_okay=False))
@option("Run", "--to", type=click.Choice(TOOLS), metavar="TOOL", required=True, help=f"{', '.join(TOOLS)}.")
@option("Run", "--drop", metavar="NAMES", default="", help="Fields to leave out, such as nframes,fps.")
@option("Run", "--overwrite", is_flag=True, help="Replace OUT if it is there.")
@data_options
def command(file: str, out: str, drop: str, to: str, overwrite: bool, format: str | None, videos: str | None) -> None:
    """Convert and say what was written."""
    from sta_adapter.integrations.convert_data import convert_data

    names = [name.strip() for name in drop.split(",") if name.strip()]
    done = convert_data(file, out, drop=names, to=to, overwrite=overwrite, format=format, videos=videos)
    click.echo(f"wrote {done.path}: {done.samples} samples with {done.clips} clips and images")
    if done.left_out:
        click.echo(
            "left out: " + ", ".join(f"{name} ({count} samples)" for name, count in sorted(done.left_out.items()))
        )
