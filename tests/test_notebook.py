"""The notebook runs, cell after cell, in its quick size."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

FILE = Path(__file__).parents[1] / "examples/first_quarter_hour.ipynb"
NOTEBOOK = json.loads(FILE.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_every_cell(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    shown, display = [], ModuleType("IPython.display")
    display.Image, display.display = (lambda content, width: content), shown.append
    ipython = ModuleType("IPython")
    ipython.version_info, ipython.get_ipython = (9, 0), lambda: None  # which matplotlib asks for
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setenv("STA_NOTEBOOK_QUICK", "1")
    monkeypatch.setenv("STA_NOTEBOOK_FOLDER", str(tmp_path))
    names = {}
    for cell in NOTEBOOK["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), FILE.name, "exec"), names)
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("base ", "adapter ", "frames shuffled", "STA off"))
    assert [content[:4] for content in shown] == [b"\x89PNG"] * 2
    assert (tmp_path / "adapter" / "sta_adapter.safetensors").is_file()


def test_what_is_shown_is_small_and_tells_no_folder():
    text = FILE.read_text(encoding="utf-8")
    assert len(text) < 300_000
    assert "/home/" not in text
    assert "/tmp/" not in text
