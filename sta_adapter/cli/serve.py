"""`sta-adapter serve`: an adapter behind vLLM's HTTP server, with clips read as in training."""

from __future__ import annotations

import os
import shlex
import sys

import click

from sta_adapter.cli.options import Grouped, adapter_options, option
from sta_adapter.errors import MissingExtraError

HELP = """\b
Example: sta-adapter serve --model Qwen/Qwen2-VL-2B-Instruct \\
             --adapter my-adapter -- --port 8000

Prints and runs `vllm serve` with STA, and with the frames and pixels that
the adapter was trained with. What follows -- goes to vLLM.
"""


class _Serve(Grouped):
    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """An option that is not ours may be vLLM's, which has to follow `--`."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            said = f"{error.message} Options of vLLM follow --, at the end: ... -- --port 8000."
            raise click.NoSuchOption(error.option_name, said, error.possibilities, error.ctx) from None


@click.command(cls=_Serve, help=HELP)
@click.argument("extra", nargs=-1, type=click.UNPROCESSED)
@option("Run", "--model", metavar="ID", required=True, help="Base on the Hub, or its folder.")
@option("Run", "--adapter", metavar="ID", required=True, help="Adapter on the Hub, or its folder.")
@option("Run", "--revision", metavar="NAME", help="The base's branch, tag or commit on the Hub.")
@option("Run", "--own-frames", is_flag=True, help="Let vLLM sample frames in its own way.")
@option("Run", "--print", "only_print", is_flag=True, help="Print the command; run nothing.")
@adapter_options
def command(
    model: str,
    adapter: str,
    revision: str | None,
    adapter_revision: str | None,
    own_frames: bool,
    only_print: bool,
    any_base: bool,
    extra: tuple[str, ...],
) -> None:
    """Print the line, and run it."""
    from sta_adapter.integrations.vllm.serve_line import check_plugins, serve_line, trained_reader

    reader = None if own_frames else trained_reader(model, adapter, adapter_revision, model_revision=revision)
    extra = extra if revision is None else ("--revision", revision, *extra)
    line = serve_line(model, adapter, revision=adapter_revision, any_base=any_base, reader=reader, extra=extra)
    click.echo(shlex.join(line))
    if only_print:
        return
    check_plugins(os.environ.get("VLLM_PLUGINS"))
    program = os.path.join(os.path.dirname(sys.executable), line[0])
    if not os.path.exists(program):
        raise MissingExtraError("serving needs vLLM beside sta-adapter: pip install 'sta-adapter[vllm]'.")
    # in this process's place, so that signals reach the server, which would outlive it in one of its own
    os.execv(program, [program, *line[1:]])
