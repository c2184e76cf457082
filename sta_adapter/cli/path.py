"""`sta-adapter path`: where a file lies that another tool is to be given."""

from __future__ import annotations

from pathlib import Path

import click

from sta_adapter.cli.options import Grouped

FILES = {"ms-swift": "ms_swift/sta_plugin.py"}

HELP = """\b
Example: sta-adapter path ms-swift

Prints the path of the plug-in file for another tool:

\b
swift sft --external_plugins "$(sta-adapter path ms-swift)" \\
          --tuner_type sta ...
"""


@click.command(cls=Grouped, help=HELP)
@click.argument("tool", type=click.Choice(list(FILES)))
def command(tool: str) -> None:
    """Print it."""
    import sta_adapter.integrations

    click.echo(Path(sta_adapter.integrations.__file__).parent / FILES[tool])
