"""`sta-adapter export`: an adapter in the form that vLLM takes."""

from __future__ import annotations

import click

from sta_adapter.cli.options import DTYPE, Grouped, base_model_of, option
from sta_adapter.errors import ConfigError

HELP = """\b
Example: sta-adapter export my-adapter served \\
             --merge-lora Qwen/Qwen2-VL-2B-Instruct

Writes what vLLM serves: with --merge-lora the folders OUT/base, the base
with the LoRA weights in it, and OUT/sta; else OUT with STA, and LoRA weights
as vLLM takes them.
"""


@click.command(cls=Grouped, help=HELP)
@click.argument("adapter")
@click.argument("out", type=click.Path())
@option("What", "--merge-lora", "base", metavar="BASE", help="Merge LoRA into this base.")
@option(
    "What", "--dtype", type=DTYPE, metavar="TYPE", default="auto", help="Of the merged base: auto, bf16, fp16 or fp32."
)
@option("What", "--adapter-revision", metavar="NAME", help="The adapter's branch, tag or commit on the Hub.")
@option("What", "--any-base", is_flag=True, help="Accept another base, if the adapter fits it.")
@option("What", "--revision", metavar="NAME", help="The base's branch, tag or commit on the Hub.")
@option("What", "--overwrite", is_flag=True, help="Replace what is in OUT.")
def command(
    adapter: str,
    out: str,
    base: str | None,
    dtype: str,
    adapter_revision: str | None,
    revision: str | None,
    any_base: bool,
    overwrite: bool,
) -> None:
    """Write it, and say how it is served."""
    from sta_adapter.integrations.vllm.export import export_adapter, export_merged

    if base is not None:
        of_base = {"dtype": dtype, "revision": revision, "base_model": base_model_of(any_base)}
        export_merged(adapter, out, base, adapter_revision=adapter_revision, overwrite=overwrite, **of_base)
        click.echo(f"wrote {out}: sta-adapter serve --model {out}/base --adapter {out}/sta")
        return
    given = {"--revision": revision is not None, "--dtype": dtype != "auto", "--any-base": any_base}
    idle = [name for name, is_given in given.items() if is_given]
    if idle:
        raise ConfigError(f"{idle[0]} applies to the base, and has no effect without --merge-lora.")
    has_lora = export_adapter(adapter, out, revision=adapter_revision, overwrite=overwrite)
    beside = ", with LoRA weights beside STA" if has_lora else ""
    click.echo(f"wrote {out}{beside}: sta-adapter serve --model BASE --adapter {out}")
