"""The command line: one click group; a sub-command's module is imported only when it is used."""

from __future__ import annotations

import importlib
import io
import logging
import re
import sys
import traceback
import warnings
from typing import TYPE_CHECKING, TextIO

import click

from sta_adapter._validate import suggestion
from sta_adapter.errors import ConfigError

DEBUG = "--debug"
UNREADABLE = "{!r} can't be read in the encoding of this locale, {}, and could be written into no file. Start in one of UTF-8: LC_ALL=C.UTF-8, or PYTHONUTF8=1."
WORDS = "sta_adapter.words"  # where the words of the command line are kept
COMMANDS = {
    "demo": "Train and compare STA on made clips, from nothing, in minutes.",
    "inspect": "Show where STA would go in a model, and what it costs.",
    "check-data": "Look for bad samples in your data before training.",
    "plan": "Show whether a training fits, and how long it takes.",
    "train": "Train STA, and LoRA beside it, on your clips.",
    "evaluate": "Measure a model with and without its adapter.",
    "visualize": "Draw what STA does with a clip.",
    "watch": "Watch a live video, and answer about it.",
    "app": "Ask base and adapter about a video in the browser, side by side.",
    "serve": "Serve an adapter over HTTP, by vLLM.",
    "export": "Write an adapter as vLLM takes it.",
    "push": "Publish an adapter on the Hugging Face Hub.",
    "convert": "Turn a checkpoint of the published STAVEQ2 code into an adapter, or back.",
    "convert-data": "Write samples as another training tool reads them, or back.",
    "path": "Print the path of the plug-in file for another tool.",
    "env": "Show versions, devices and kernels, for bug reports.",
}


class LazyGroup(click.Group):
    """A group whose commands live in `sta_adapter.cli.NAME`, as an object called `command`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keep the words, for commands that say how to go on."""
        ctx.meta[WORDS] = list(args)
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the workflow."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command."""
        if cmd_name not in COMMANDS:
            return None
        found: click.Command | None = importlib.import_module(f"sta_adapter.cli.{cmd_name.replace('-', '_')}").command
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Suggest the nearest command for an unknown one."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            raise click.UsageError(f"no command {args[0]!r}. {suggestion(args[0], COMMANDS)}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing any of them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="sta-adapter")
@click.option("-v", "--verbose", is_flag=True, help="Log what is going on.")
@click.option(DEBUG, is_flag=True, expose_value=False, help="Show where an error happened (in any position).")
def cli(verbose: bool) -> None:
    """Stacked temporal attention for video language models.

    Example: sta-adapter demo --out sta-demo
    """
    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", handlers=[_BesideBars()])


def _keep_warnings_of_other_packages_quiet() -> None:
    """What one package says to another's developers is not for users of a command; `python -W default` shows it."""
    if sys.warnoptions:
        return
    for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category)
        warnings.filterwarnings("default", category=category, module=r"sta_adapter(\.|$)")


if TYPE_CHECKING:  # before Python 3.11 it takes no argument
    _Handler = logging.StreamHandler[TextIO]
else:
    _Handler = logging.StreamHandler


class _BesideBars(_Handler):
    """Writes lines that stand by themselves while a bar is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        """One line, or several; none where a library writes its own, as huggingface_hub does."""
        logger: logging.Logger | None = logging.getLogger(record.name)
        while logger is not None and logger.parent is not None:
            if any(isinstance(handler, logging.StreamHandler) for handler in logger.handlers):
                return
            logger = logger.parent
        _write_line(self.format(record))


def _write_line(text: str) -> None:
    """Write to standard error, above the bars that are shown."""
    if "tqdm" in sys.modules:
        sys.modules["tqdm"].tqdm.write(text, file=sys.stderr)
    else:
        sys.stderr.write(f"{text}\n")


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning of ours in its words alone; any other as Python writes it."""
    ours = category.__module__.startswith("sta_adapter")
    plain = (
        f"warning: {message}" if ours else warnings.formatwarning(message, category, filename, lineno, line).rstrip()
    )
    _write_line(plain)


def _close_bars() -> None:
    """What is written next stands on a line of its own."""
    if "tqdm" in sys.modules:
        for bar in list(getattr(sys.modules["tqdm"].tqdm, "_instances", ())):
            bar.close()


def main() -> None:
    """Run the command line; any error ends it with one message and exit code 1, with --debug after its traceback."""
    _keep_warnings_of_other_packages_quiet()
    warnings.showwarning = _show_warning
    words = sys.argv[1:]
    debug = DEBUG in words
    encoding = sys.getfilesystemencoding()
    if getattr(sys.stdout, "errors", None) in ("strict", "surrogateescape") and isinstance(
        sys.stdout, io.TextIOWrapper
    ):
        sys.stdout.reconfigure(
            errors="backslashreplace"
        )  # an answer in letters that the terminal lacks ends no command
    try:
        if encoding != "utf-8" and (unreadable := [word for word in words if re.search("[\ud800-\udfff]", word)]):
            raise ConfigError(UNREADABLE.format(unreadable[0], encoding))
        cli([word for word in words if word != DEBUG], prog_name="sta-adapter")
    except Exception as error:
        from sta_adapter.cli.known_errors import in_one_line
        from sta_adapter.requirements import remove_empty

        _close_bars()
        remove_empty()
        if debug:
            traceback.print_exc()
        click.secho(f"error: {in_one_line(error)}", fg="red", err=True)
        sys.exit(1)
    finally:
        if "torch.distributed" in sys.modules:  # not imported for commands that don't need it
            from sta_adapter.distributed import end_processes

            end_processes()
