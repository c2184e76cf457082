"""What may sign a release installs nothing that is not pinned; every command that takes a Hub id takes a revision."""

import re
from pathlib import Path

import click
import pytest
import yaml

from sta_adapter.cli import COMMANDS, cli

ROOT = Path(__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
WORKFLOWS = [
    yaml.safe_load(file.read_text(encoding="utf-8")) for file in sorted((ROOT / ".github/workflows").glob("*.yml"))
]
SIGNING = [job for flow in WORKFLOWS for job in flow["jobs"].values() if "id-token" in job.get("permissions", {})]
RULES = {
    name: (needs.split(), recipe)
    for name, needs, recipe in re.findall(r"^([^#\s:=]+):(?!=)([^\n]*)\n((?:\t[^\n]*\n)*)", MAKEFILE, re.MULTILINE)
}


def recipes(target):
    """What a make target runs, that of what it needs included."""
    needs, recipe = RULES.get(target, ((), ""))
    return recipe + "".join(recipes(need) for need in needs)


def test_there_are_jobs_that_sign():
    assert len(SIGNING) == 2
    assert not any("id-token" in (flow.get("permissions") or {}) for flow in WORKFLOWS)


@pytest.mark.parametrize("job", SIGNING, ids=lambda job: job["steps"][0].get("id", "build"))
def test_what_signs_installs_nothing_unpinned(job):
    for step in job["steps"]:
        assert "run" in step or re.search(r"@[0-9a-f]{40}$", step["uses"]), step
        assert re.fullmatch(r"make( \w+)+", step.get("run", "make x")), step
        for target in step.get("run", "").split()[1:]:
            run = recipes(target)
            assert run, target
            assert all("--constraint " in line for line in run.splitlines() if "pip install" in line), run
            assert "-m build" not in run or "-m build --no-isolation" in run


@pytest.mark.parametrize("name", ["lock.txt", "tools.txt"])
def test_locks_pin_each_version(name):
    lines = [
        line for line in (ROOT / "requirements" / name).read_text().splitlines() if line and not line.startswith("#")
    ]
    assert len(lines) > 20
    assert all(re.match(r"[\w.-]+==[\w.+!-]+( ;|$)", line) for line in lines)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_hub_id_takes_a_revision(name):
    command = cli.get_command(click.Context(cli), name)
    options = {option for parameter in command.params for option in parameter.opts}
    assert "--revision" in options or not options & {"--model", "model", "repo_id"}
    assert "--adapter-revision" in options or "--adapter" not in options


def test_readmes_links_work_on_the_package_index():
    """Where the project lives is told by a variable; with it no link and no picture of README is relative any more."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("project_setup", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    text = setup.description("https://a.b/c")
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert len(targets) > 10
    assert all(target.startswith(("https://", "#")) for target in targets)
    assert "(https://a.b/c/raw/main/docs/figures/app.jpg)" in text
    assert "(https://a.b/c/blob/main/docs/publish.md)" in text
    assert setup.description("") == (ROOT / "README.md").read_text(encoding="utf-8")
    assert setup.project_urls("https://a.b/c")["Issues"] == "https://a.b/c/issues"
    assert setup.project_urls("") == {}
    assert any(
        step.get("env", {}).get("STA_REPOSITORY_URL")
        for flow in WORKFLOWS
        for job in flow["jobs"].values()
        for step in job["steps"]
    )
