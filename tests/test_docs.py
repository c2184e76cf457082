"""The docs stay true: their code runs, their commands exist, their error messages are ours, their figures are the script's.

In a page, `<!-- run first ... -->` holds code that a reader doesn't need to see, and `<!-- not run: reason -->` in front
of a block is for code that one process can't run.
"""

import ast
import importlib
import re
import shlex
import sys
from pathlib import Path

import click
import pytest

from sta_adapter.cli import COMMANDS, cli
from sta_adapter.demo import TINY_BASE
from sta_adapter.injection import registry

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
        registry, "_REGISTRY", {name: registry.get_backbone(name) for name in registry.list_backbones()}
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


def test_settings_files_are_taken():
    import yaml

    from sta_adapter.training import TrainingConfig

    blocks = re.findall(r"^```yaml\n(.*?)^```$", PAGES["train.md"], re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        TrainingConfig.from_dict(yaml.safe_load(block))  # raises for an unknown name


@pytest.mark.parametrize("place", ["training.config.TrainingConfig", "video.frame_settings.FrameSettings"])
def test_each_setting_has_a_meaning_and_its_choices(place):
    from sta_adapter.training.config import CHOICES

    rows = importlib.import_module("docs_hooks").settings_table(place).splitlines()[2:]
    names = [row.split("`")[1] for row in rows]
    module, _, cls = place.rpartition(".")
    fields = getattr(importlib.import_module(f"sta_adapter.{module}"), cls).__dataclass_fields__
    assert names == list(fields)
    for name, row in zip(names, rows, strict=True):
        meaning = row.split("|")[3].strip()
        assert len(meaning) > 10, row
        if place.startswith("training"):
            assert all(f"`{choice!r}`" in meaning for choice in CHOICES.get(name, ())), row


@pytest.mark.parametrize("page", PAGES)
def test_pages_are_filled_in(page):
    made = importlib.import_module("docs_hooks").prepared(PAGES[page], page)
    assert not re.search("<!-- (include|run first|not run)", made)
    assert ".svg)" not in made


def test_a_section_that_is_gone_is_an_error():
    hooks = importlib.import_module("docs_hooks")
    with pytest.raises(ValueError, match=r"README\.md has no section 'Gone'; it has sta-adapter, Install"):
        hooks.prepared("<!-- include: README Gone -->", "index.md")
    with pytest.raises(ValueError, match=r"index\.md links to \.\./gone\.py, which is not there"):
        hooks.prepared("[gone](../gone.py)", "index.md")


def test_links_out_of_the_docs():
    prepared = importlib.import_module("docs_hooks").prepared
    source = "[the class](../../sta_adapter/injection/handle.py#L1)"
    assert prepared(source, "api/index.md") == "the class: `sta_adapter/injection/handle.py`"
    assert (
        prepared(source, "api/index.md", "https://a.b/c/")
        == "[the class](https://a.b/c/blob/main/sta_adapter/injection/handle.py#L1)"
    )
    assert "[Training on many GPUs and many nodes](multi-node.md)" in prepared(
        "<!-- include: README Tests -->", "index.md"
    )


def test_pages_load_nothing_from_elsewhere():
    hooks = importlib.import_module("docs_hooks")
    page = type("Page", (), {"file": type("File", (), {"src_uri": "index.md"})})
    for bad in (
        '<script src="https://a.b/c.js">',
        '<link href="//a.b" rel="stylesheet">',
        '<img alt="" src=http://a.b/c.png>',
    ):
        with pytest.raises(ValueError, match=r"index\.md loads something from elsewhere: <"):
            hooks.on_post_page(bad, page)
    fine = '<a href="https://a.b">x</a><script src="../bundle.js"></script><link rel="canonical" href="https://a.b">'
    assert hooks.on_post_page(fine, page) == fine


def test_the_drawing_is_the_scripts():
    script = importlib.import_module("draw_sta_block")
    assert script.FILE.read_text(encoding="utf-8") == script.draw()


def test_the_reference_has_every_public_name():
    import sta_adapter

    named = set(re.findall(r"^::: (\S+)", "\n".join(PAGES.values()), re.MULTILINE))
    assert {f"sta_adapter.{name}" for name in sta_adapter.__all__} <= named
    for path in named - {"sta_adapter.errors"}:
        module, _, name = path.rpartition(".")
        assert hasattr(importlib.import_module(module), name), path


def test_the_sums_of_the_mutants_are_those_of_their_table():
    page, table = PAGES["reliability.md"], (ROOT / "scripts" / "mutation_results.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w/]+)` \| \d+ \| (\d+) \| (\d+) \|", table, re.MULTILINE)
    modules = {module for module, _, _ in rows}
    assert len(modules) == len(rows)
    gone = [m for m in modules if not any((ROOT / place / f"{m}.py").exists() for place in ("", "sta_adapter"))]
    assert not gone
    drawn, killed = (sum(int(row[place]) for row in rows) for place in (1, 2))
    assert f"Of {drawn:,} mutants in {len(rows)} modules {killed:,} ({killed / drawn:.0%})".replace("%", " %") in page


def holds(text, parts):
    """Whether all parts stand in a text, one after the other."""
    place = 0
    for part in parts:
        place = text.find(part, place)
        if place < 0:
            return False
        place += len(part)
    return True


QUOTED = re.findall(r"^### `(.+)`$", PAGES["troubleshooting.md"], re.MULTILINE)


@pytest.mark.parametrize("quoted", QUOTED, ids=lambda quoted: quoted[:60])
def test_messages_are_still_ours(quoted, messages):
    parts = [part for part in re.split(r"…|%[rs]", quoted) if part]
    assert any(holds(text, parts) for text in messages), quoted


def test_each_message_is_explained_once():
    assert len(QUOTED) == len(set(QUOTED)) > 30
