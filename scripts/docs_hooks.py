"""What the docs site takes from elsewhere, so that nothing is written down twice.

MkDocs calls the functions `on_*`. In a page, one line stands for what is made here:

    <!-- include: README Quick start -->    a section of README.md, without its heading ("README" alone: what stands above all)
    <!-- include: commands -->              the help of every command
    <!-- include: backbones -->             what each backbone declares
    <!-- include: settings NAME -->         name, default and comment of the fields of a class in sta_adapter
    ![What it shows](figures/block.svg)     the drawing itself, so that it follows the page's light or dark scheme
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
INCLUDE = re.compile(r"^<!-- include: (.+?) -->$", re.MULTILINE)
FOR_TESTS = re.compile(r"^<!-- (?:run first\n|not run: ).*?-->\n", re.MULTILINE | re.DOTALL)
DRAWING = re.compile(r"^!\[(.*?)\]\((figures/[^)]+\.svg)\)$", re.MULTILINE)
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
PICTURE = re.compile(r"!\[([^\]]*)\]\((docs/[^)\s]+)\)")  # of README.md
LOADING = re.compile(r"<(?:script|img|iframe|source|video|link)\b[^>]*>")
FOREIGN = re.compile(r"\b(?:src|href)=[\"']?(?:https?:)?//")
LINK_ONLY = re.compile(r"\brel=[\"']?(?:canonical|next|prev|alternate)\b")  # what browsers don't load


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Fill in what is included, draw the drawings, and mend links that lead out of `docs/`."""
    return prepared(markdown, page.file.src_uri, config.repo_url or "")


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Refuse a page that would load something from another machine."""
    for tag in LOADING.findall(output):
        if FOREIGN.search(tag) and not LINK_ONLY.search(tag):
            raise ValueError(f"{page.file.src_uri} loads something from elsewhere: {tag}")
    return output


def prepared(markdown: str, source: str, repo_url: str = "") -> str:
    """The Markdown of the page `source` as it is built."""
    markdown = FOR_TESTS.sub("", markdown)
    markdown = relinked(markdown, Path("docs", source).parent, source, repo_url)
    markdown = INCLUDE.sub(lambda match: included(match[1], source, repo_url), markdown)
    return DRAWING.sub(lambda match: drawing(match[2], match[1]), markdown)


def included(what: str, source: str, repo_url: str) -> str:
    """What stands behind one include line."""
    if what == "commands":
        return command_reference()
    if what == "backbones":
        return backbone_table()
    name, _, title = what.partition(" ")
    if name == "settings":
        return settings_table(title)
    if name != "README":
        raise ValueError(f"{source}: nothing to include is called {what!r}")
    section = PICTURE.sub(
        lambda m: f"![{m[1]}]({os.path.relpath(m[2], Path('docs', source).parent)})", readme_section(title)
    )
    return relinked(section, Path(), source, repo_url)


def readme_section(title: str) -> str:
    """The text below a heading of README.md; of no title, what stands below the first heading."""
    parts = re.split(r"^#{1,2} (.+)$", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    title = title or parts[1]
    if title not in sections:
        raise ValueError(f"README.md has no section {title!r}; it has {', '.join(sections)}")
    return sections[title].strip()


def relinked(markdown: str, folder: Path, source: str, repo_url: str) -> str:
    """Links as they must be on the page `source`, where `folder` is what they start from in the repository."""

    def link(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        if re.match(r"[a-z]+:", target):
            return match[0]
        place = Path(os.path.normpath(folder / target))
        if place.parts[0] == "docs":
            text = page_title(place) if text == str(place) else text
            return f"[{text}]({os.path.relpath(place, Path('docs', source).parent)}{anchor})"
        if not (ROOT / place).exists():
            raise ValueError(f"{source} links to {target}, which is not there")
        if repo_url:
            return f"[{text}]({repo_url.rstrip('/')}/blob/main/{place}{anchor})"
        return f"`{place}`" if text.strip("`").endswith(place.name) else f"{text}: `{place}`"

    fences = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else LINK.sub(link, part) for part in fences)


def page_title(place: Path) -> str:
    """The first heading of a page; where the page is missing, MkDocs says so."""
    lines = (ROOT / place).read_text(encoding="utf-8").splitlines() if (ROOT / place).is_file() else []
    return next((line[2:] for line in lines if line.startswith("# ")), str(place))


def drawing(file: str, label: str) -> str:
    """An SVG file as part of the page."""
    svg = (ROOT / "docs" / file).read_text(encoding="utf-8")
    return f'<figure class="drawing" markdown="0" aria-label="{label}">\n{svg.strip()}\n</figure>'


def command_reference() -> str:
    """A section for each command: its help as a terminal of 80 columns shows it."""
    from click.testing import CliRunner

    from sta_adapter.cli import COMMANDS, cli

    def help_text(*words: str) -> str:
        return f"```text\n{CliRunner().invoke(cli, [*words, '--help'], prog_name='sta-adapter').output.rstrip()}\n```"

    return "\n\n".join([help_text(), *(f"## {name}\n\n{help_text(name)}" for name in COMMANDS)])


def backbone_table() -> str:
    """A row for each backbone that this package registers: what it declares."""
    from sta_adapter.injection.registry import get_backbone, list_backbones

    rows, others = ["| backbone | encoder class | blocks | added in front of |", "|---" * 4 + "|"], []
    for name in list_backbones():
        spec = get_backbone(name)
        if not spec.layout.__module__.startswith("sta_adapter."):
            continue
        classes = "<br>".join(f"`{c}`" for c in spec.encoder_classes)
        rows.append(f"| `{name}` | {classes} | `{spec.blocks}` | `{spec.norm}` |")
        if spec.defaults:
            others.append(f"- `{name}`: " + ", ".join(f"`{k}={v!r}`" for k, v in spec.defaults.items()))
    return "\n".join([*rows, "", "Defaults that differ from `STAConfig`'s, unless the field is given:", "", *others])


def settings_table(place: str) -> str:
    """A row for each field of a class, "training.config.TrainingConfig" for one, with the comment behind it."""
    module, _, name = place.rpartition(".")
    text = (ROOT / "sta_adapter" / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
    lines = text.splitlines()
    node = next(n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ClassDef) and n.name == name)
    defaults = {f.name: f for f in dataclasses.fields(getattr(importlib.import_module(f"sta_adapter.{module}"), name))}
    choices = getattr(importlib.import_module(f"sta_adapter.{module}"), "CHOICES", {})
    rows = ["| setting | default | meaning |", "|---|---|---|"]
    for field in node.body:
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and field.target.id in defaults:
            comment = "".join(line.partition("  # ")[2] for line in lines[field.lineno - 1 : field.end_lineno])
            given = defaults[field.target.id]
            if field.target.id in choices:
                comment += f"; one of {', '.join(f'`{choice!r}`' for choice in choices[field.target.id])}"
            made = given.default_factory is not dataclasses.MISSING and given.default_factory is not dict
            default = (
                "see below" if made else "none" if given.default is dataclasses.MISSING else f"`{given.default!r}`"
            )
            rows.append(f"| `{field.target.id}` | {default} | {comment} |")
    return "\n".join(rows)
