"""Every command's help fits a screen and starts with an example; what is mistyped gets a suggestion."""

import re
import subprocess
import sys

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
def test_every_option_says_what_it_is_for(name):
    command = cli.get_command(click.Context(cli), name)
    assert [p.name for p in command.params if isinstance(p, click.Option) and not p.help] == []


def test_the_list_of_commands_has_a_sentence_for_each():
    said = {}
    for row in help_of("")[help_of("").index("Commands:") + 1 :]:
        if row[2:3].strip():
            name = row.split()[0]
            said[name] = row[2 + len(name) :].strip()
        else:
            said[name] += f" {row.strip()}"
    assert list(said) == list(COMMANDS)
    assert all(text[0].isupper() and text[1].islower() and text.endswith(".") for text in said.values()), said


@pytest.mark.parametrize("name", COMMANDS)
def test_wrong_commands_get_a_suggestion(name):
    done = CliRunner().invoke(cli, [name[:-1] + "x"])
    assert done.exit_code == 2
    assert f"Did you mean {name!r}?" in done.output


HEAVY = ("torch", "transformers", "numpy", "peft", "accelerate", "PIL", "av", "matplotlib", "gradio")
LIGHT = f"""
import sys
from click.testing import CliRunner
from sta_adapter.cli import COMMANDS, cli
for words in [["--version"], ["--help"], *([name, "--help"] for name in COMMANDS)]:
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    heavy = [name for name in {HEAVY} if name in sys.modules]
    assert not heavy, (words, heavy)
"""


def test_help_and_version_import_nothing_that_takes_seconds():
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_rules_of_text_positions_are_those_there_are():
    from sta_adapter.cli.options import RULES
    from sta_adapter.injection.text_positions import CHOICES

    assert RULES == CHOICES
