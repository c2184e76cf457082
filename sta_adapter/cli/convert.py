"""`sta-adapter convert`: weights of the published STAVEQ2 code as an adapter, or back."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

import click

from sta_adapter.cli.options import Grouped, option
from sta_adapter.config import STAConfig
from sta_adapter.errors import ConfigError

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from sta_adapter.integrations.staveq2.conversion import Order

    class Options(TypedDict):
        """What reading takes, and writing knows itself."""

        order: Order | None
        backbone: str | None
        config: str | None
        heads: int | None


HELP = """\b
Example: sta-adapter convert STAVEQ2-2B my-adapter
         sta-adapter convert my-adapter staveq2.safetensors --to-published

Turns a published STAVEQ2 checkpoint into an adapter, or back.

SOURCE is a folder with config.json and safetensors files, or one such
file. Only STA's tensors are read and written, bit for bit; the base
model's and LoRA's stay where they are.
"""


@click.command(cls=Grouped, help=HELP)
@click.argument("source", type=click.Path())
@click.argument("out", type=click.Path())
@option("What", "--order", type=click.Choice(["after_spatial", "before_spatial"]), help="Place of the branch, which weights don't tell. [default: after_spatial]")  # fmt: skip
@option("What", "--backbone", metavar="NAME", help="Backbone, if the tensors' names fit several.")
@option("What", "--config", metavar="FILE", help="The model's config.json. [default: the one beside the weights]")
@option("What", "--heads", type=click.IntRange(1), help="The encoder's heads, if no config.json tells them.")
@option("What", "--overwrite", is_flag=True, help="Replace the adapter, LoRA and run in OUT.")
@option("Back", "--to-published", is_flag=True, help="Write the adapter SOURCE under the published names.")
@option("Back", "--prefix", metavar="TEXT", help="Text before 'blocks.0'. [default: as published]")
def command(
    source: str, out: str, to_published: bool, prefix: str | None, overwrite: bool, **options: Unpack[Options]
) -> None:
    """Turn a published checkpoint into an adapter, or back."""
    from sta_adapter.integrations.staveq2.conversion import convert_published, convert_to_published

    if to_published:
        given = [f"--{name}" for name, value in options.items() if value is not None]
        if given:
            raise ConfigError(f"{', '.join(given)} and --to-published exclude each other: the adapter knows it itself.")
        click.echo(f"wrote {convert_to_published(source, out, prefix=prefix, overwrite=overwrite)}")
        return
    if prefix is not None:
        raise ConfigError("--prefix goes with --to-published; reading takes any prefix.")
    found = convert_published(source, out, overwrite=overwrite, **options)
    encoder, config = found["encoder"], STAConfig.from_dict(found["config"])
    blocks = encoder["depth"] if config.layers == "all" else len(config.layers)
    click.echo(
        f"wrote {out}: {found['backbone']}, {blocks} of {encoder['depth']} blocks, {encoder['num_heads']} "
        f"head{'s' * (encoder['num_heads'] != 1)} of {encoder['head_dim']}, order={config.order}, token_order={config.token_order}"
    )
