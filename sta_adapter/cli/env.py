"""`sta-adapter env`: what this machine has, for bug reports and the first minutes on it."""

from __future__ import annotations

import json

import click

from sta_adapter.cli.options import Grouped, option

HELP = """\b
Example: sta-adapter env

Shows versions, devices, the attention kernel that each device and dtype
would get and why, video decoders, backbones and where they come from,
what looks otherwise than tested, and settings of the Hub (no secrets).
Paste it into a bug report.
"""


@click.command(cls=Grouped, help=HELP)
@option("Result", "--json", "as_json", is_flag=True, help="Print JSON.")
def command(as_json: bool) -> None:
    """Print it."""
    from sta_adapter.cli.environment import describe_environment, format_environment

    found = describe_environment()
    click.echo(json.dumps(found, indent=2) if as_json else format_environment(found))
