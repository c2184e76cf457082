"""The docs stay true: their code runs, their commands exist, their error messages are ours, their figures are the script's.

In a page, `<!-- run first ... -->` holds code that a reader doesn't need to see, and `<!-- not run: reason -->` in front
of a block is for code that one process can't run.
"""

import ast
import re
import shlex
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from sta_adapter import backbone
from sta_adapter.cli import COMMANDS, cli
from sta_adapter.demo import TINY_BASE

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = {path.relative_to(DOCS).as_posix(): path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md"))}
HUB_ID = "Qwen/Qwen2-VL-2B-Instruct"
CODE = re.compile(
    r"^<!-- run first\n(?P<hidden>.*?)^-->$|^(?P<skip><!-- not run: .+ -->\n)?```python[^\n]*\n(?P<shown>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
sys.path.insert(0, str(ROOT / "scripts"))


def code_of(page):
    """(first line, code, whether it is run) of each block."""
    for match in CODE.finditer(PAGES[page]):
        kind = "hidden" if match["hidden"] is not None else "shown"
        yield PAGES[page].count("\n", 0, match.start(kind)), match[kind], not match["skip"]


def commands_of(page):
    """The words after `sta-adapter` of each command line in the page's blocks, also behind a launcher."""
    fences = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    blocks = [body for kind, body in fences.findall(PAGES[page]) if kind in ("", "bash", "sh", "console")]
    blocks += re.findall(r"(?:^ {4}.*\n)+", fences.sub("", PAGES[page]), re.MULTILINE)
    for line in "".join(blocks).replace("\\\n", " ").splitlines():
        if re.match(r"\s*(\$ )?(sta-adapter|accelerate launch .* sta-adapter) ", line):
            words = shlex.split(line, comments=True)
            yield words[words.index("sta-adapter") + 1 :]


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any(True for _ in code_of(page))])
def test_code_runs(page, tmp_path, monkeypatch):
    pytest.importorskip("transformers", minversion="5")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(
        backbone, "_REGISTRY", {name: backbone.get_backbone(name) for name in backbone.list_backbones()}
    )
    names = {"__name__": "docs"}
    for line, code, runs in code_of(page):
        compiled = compile("\n" * line + code.replace(HUB_ID, str(TINY_BASE)), f"docs/{page}", "exec")
        if runs:
            exec(compiled, names)


@pytest.mark.parametrize(
    ("page", "words"),
    [pytest.param(page, w, id=f"{page}: {' '.join(w)[:50]}") for page in PAGES for w in commands_of(page)],
)
def test_commands_parse(page, words):
    name, *rest = [word for word in words if word != "..."]
    command = cli.get_command(click.Context(cli), name)
    assert command is not None, f"docs/{page} has the command {name!r}; there are {', '.join(COMMANDS)}"
    if {"-h", "--help"}.isdisjoint(rest):
        command.make_context(name, rest)  # raises for an unknown option, a missing one, a wrong value


@pytest.fixture(scope="module")
def messages():
    """Every text in the source, with one character in place of what is filled in."""
    texts = set()
    for folder in ("sta_adapter", "backbones"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.add(node.value)
                elif isinstance(node, ast.JoinedStr):
                    texts.add("".join(v.value if isinstance(v, ast.Constant) else "\0" for v in node.values))
    return texts


QUOTED = re.findall(r"^### `(.+)`$", PAGES["troubleshooting.md"], re.MULTILINE)


@pytest.mark.parametrize("quoted", QUOTED, ids=lambda quoted: quoted[:60])
def test_messages_are_still_ours(quoted, messages):
    pattern = re.compile(".*?".join(re.escape(part) for part in re.split(r"…|%[rs]", quoted)), re.DOTALL)
    assert any(pattern.search(text) for text in messages), quoted


def test_each_message_is_explained_once():
    assert len(QUOTED) == len(set(QUOTED)) > 30


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


@pytest.mark.parametrize("name", COMMANDS)
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
