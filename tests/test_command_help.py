"""Every command's help fits a screen and starts with an example; what is mistyped gets a suggestion."""

import re

import click
import pytest
from click.testing import CliRunner

from sta_adapter.cli import COMMANDS, cli


def help_of(name):
    done = CliRunner().invoke(cli, [*([name] if name else []), "--help"])
    assert done.exit_code == 0, done.output
    return done.output.rstrip().split("\n")


@pytest.mark.parametrize("name", ["", *COMMANDS], ids=lambda name: name or "sta-adapter")
def test_help_fits_a_screen_and_starts_with_an_example(name):
    lines = help_of(name)
    examples = [number for number, line in enumerate(lines) if line.strip().startswith(f"Example: sta-adapter {name}")]
    assert examples == [2] if name else examples
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "path"])  # which has none
def test_wrong_options_get_a_suggestion(name):
    command = cli.get_command(click.Context(cli), name)
    option = max((o for p in command.params for o in p.opts if o.startswith("--")), key=len)
    done = CliRunner().invoke(cli, [name, option[:-2] + option[-1]])
    assert done.exit_code == 2
    assert option in re.search(r"No such option.*(?:Did you mean|Possible options)(.*)", done.output)[1]


@pytest.mark.parametrize("name", COMMANDS)
def test_wrong_commands_get_a_suggestion(name):
    done = CliRunner().invoke(cli, [name[:-1] + "x"])
    assert done.exit_code == 2
    assert f"Did you mean {name!r}?" in done.output
