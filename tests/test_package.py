"""What is installed, and what importing it costs."""

import json
import re
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import sta_adapter

ROOT = Path(__file__).parent.parent
HEAVY = [
    "transformers",
    "peft",
    "xformers",
    "decord",
    "av",
    "torchcodec",
    "matplotlib",
    "huggingface_hub",
    "accelerate",
]


def run(code, **options):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, **options)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_is_light():
    found = run(f"import sta_adapter, sys, json; print(json.dumps([m for m in {HEAVY} if m in sys.modules]))")
    assert json.loads(found) == []


def test_no_network_at_import():
    run(
        "import os, socket, sys\n"
        "def refuse(*a, **k):\n"
        "    sys.stderr.write(f'connect{a}')\n"
        "    sys.stderr.flush()\n"
        "    os._exit(3)\n"  # an exception could be swallowed, by the loader of plug-ins for one
        "socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse\n"
        "import sta_adapter; sta_adapter.list_backbones()"
    )


def test_public_names_exist():
    assert set(sta_adapter.__all__) <= set(dir(sta_adapter))
    assert all(hasattr(sta_adapter, name) for name in sta_adapter.__all__)
    for name in ("inject_sta", "load_sta", "get_sta", "STAConfig", "STAHandle", "Backbone", "register_backbone"):
        assert name in sta_adapter.__all__
        assert getattr(sta_adapter, name).__doc__


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("backbone", {"Backbone", "ClipSource", "EncoderCall", "LoRARecipe", "TextPositions"}),
        ("text_positions", {"rule_in_use", "use_positions"}),
        (
            "tiny_base",
            {"TINY_ADAPTER", "TINY_BASE", "TINY_BASE_FRAMES", "is_tiny_base", "model_and_adapter", "usual_frames"},
        ),
    ],
)
def test_public_modules_show_what_they_are_for(module, names):
    shown = {}
    exec(f"from sta_adapter.{module} import *", shown)
    assert shown.keys() - {"__builtins__"} == names


def test_names_that_are_imported_when_they_are_asked_for():
    assert run("import sta_adapter; print(sta_adapter.video.__name__)").strip() == "sta_adapter.video"
    with pytest.raises(AttributeError, match="module 'sta_adapter' has no attribute 'inject'"):
        _ = sta_adapter.inject


def test_every_backbone_is_short_enough_to_read_in_one_sitting():
    lengths = {path.name: len(path.read_text().splitlines()) for path in (ROOT / "backbones").glob("*.py")}
    assert len(lengths) > len(sta_adapter.list_backbones())
    assert {name: length for name, length in lengths.items() if length >= 120} == {}


def test_version_is_told_once():
    assert metadata.version("sta-adapter") == sta_adapter.__version__


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A built wheel."""
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip("building needs setuptools 77")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(source)], check=True, capture_output=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        folder,
        source,
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_every_file(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    listed = subprocess.run(["git", "ls-files", "sta_adapter", "backbones"], cwd=ROOT, capture_output=True, text=True)
    for name in listed.stdout.split():
        place = name.replace("backbones/", "sta_adapter/backbones/", 1) if name.startswith("backbones/") else name
        assert place in names, f"{place} is not in the wheel"
    assert not [n for n in names if n.startswith(("backbones/", "tests/"))]


@pytest.mark.slow
def test_the_wheel_works_from_another_folder(wheel, tmp_path):
    target = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(target)
    code = (
        f"import sys; sys.path.insert(0, {str(target)!r})\n"
        "import sta_adapter, sta_adapter.backbones.qwen2_vl as q\n"
        f"assert sta_adapter.__file__.startswith({str(target)!r}), sta_adapter.__file__\n"
        f"assert q.__file__.startswith({str(target)!r}), q.__file__\n"
        "print('qwen2_vl' in sta_adapter.list_backbones())"
    )
    assert run(code, cwd=tmp_path).strip() == "True"


def test_the_command_line_starts():
    result = subprocess.run(
        [sys.executable, "-m", "sta_adapter.cli", "--help"], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert "Example: sta-adapter demo" in result.stdout
    assert all(len(line) <= 80 for line in result.stdout.splitlines())
    wrong = subprocess.run(
        [sys.executable, "-m", "sta_adapter.cli", "trian"], capture_output=True, text=True, timeout=120
    )
    assert wrong.returncode == 2
    assert "Did you mean 'train'?" in wrong.stderr


LOCK = (ROOT / "requirements" / "lock.txt").read_text()
LOCKED = re.findall(r"^([\w.-]+)==(\S+)(?: ; (.*))?$", LOCK, re.MULTILINE)


def test_the_lock_has_all_that_the_tests_install():
    needed = [Requirement(line) for line in metadata.requires("sta-adapter")]
    for requirement in needed:
        if requirement.marker is None or requirement.marker.evaluate({"extra": "dev"}):
            name = canonicalize_name(requirement.name)
            versions = [version for found, version, _ in LOCKED if canonicalize_name(found) == name]
            assert name == "sta-adapter" or versions, requirement
            assert all(requirement.specifier.contains(version) for version in versions), requirement


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
@pytest.mark.parametrize("package", ["torch", "torchvision", "transformers", "peft", "numpy", "pytest"])
def test_the_lock_has_one_version_of_a_package_for_each_python(python, package):
    here = {"python_version": python, "python_full_version": f"{python}.5", "sys_platform": "linux"}
    found = [v for name, v, marker in LOCKED if name == package and (not marker or Marker(marker).evaluate(here))]
    assert len(found) == 1
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "requirements" / "pins.txt").read_text(), re.MULTILINE))
    assert found[0] == pinned.get(package, found[0])


def test_the_floor_is_the_oldest_that_is_declared():
    lines = (ROOT / "requirements" / "floor.txt").read_text()
    pinned = {canonicalize_name(name): version for name, version in re.findall(r"^([\w.-]+)==([\d.]+)", lines, re.M)}
    for requirement in map(Requirement, metadata.requires("sta-adapter")):
        extras = ("", "train", "stream", "viz", "eval")  # what `make test-floor` installs
        bounds = [Version(bound.version).release for bound in requirement.specifier if bound.operator == ">="]
        if bounds and (
            not requirement.marker or any(requirement.marker.evaluate({"extra": extra}) for extra in extras)
        ):
            (oldest,) = bounds
            assert Version(pinned[canonicalize_name(requirement.name)]).release[: len(oldest)] == oldest, requirement


def test_readme_names_what_is_locked():
    text = (ROOT / "README.md").read_text()
    for package in ("torch", "torchvision", "peft", "xformers"):
        (version,) = [v for name, v, _ in LOCKED if name == package]
        assert f"{package} {version}" in text
    for version in [v for name, v, _ in LOCKED if name == "transformers"]:
        assert version in text


def test_the_tree_in_contributing_names_packages_and_files_that_exist():
    tree = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("```")[1]
    named = {match[1]: match[2].split() for match in re.finditer(r"^  (\w+)/ +(.*(?:\n {10,}.*)*)", tree, re.M)}
    package = ROOT / "sta_adapter"
    assert named.keys() == {folder.parent.name for folder in package.glob("*/__init__.py")}
    listed = [
        "attention",
        "adapter",
        "injection",
        "compatibility",
        "video",
        "data",
        "training",
        "evaluation",
        "visualization",
    ]
    missing = [
        f"{folder}/{name}"
        for folder in listed
        for name in named[folder]
        if name != "..." and not (package / folder / f"{name}.py").exists() and not (package / folder / name).is_dir()
    ]
    assert missing == []
