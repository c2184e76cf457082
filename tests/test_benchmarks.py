"""The benchmarks' own tools: variants in turn, ratios, the page that is written from JSON; and the baseline's arithmetic."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.fixture
def bench(monkeypatch):
    """Imports a module of benchmarks/, as its commands do."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(ROOT / "benchmarks") in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_variants_take_turns(bench):
    calls = []
    found = bench("common").measure_in_turn({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3)
    assert calls == ["a", "b"] * 4
    assert {name: len(seconds) for name, seconds in found.items()} == {"a": 3, "b": 3}


def test_ratios_are_taken_round_by_round(bench, tmp_path):
    report = bench("common").Report("x", "A title", out=tmp_path)
    report.add("T = 8", {"untouched": [1.0, 10.0, 1.0], "STA": [2.0, 20.0, 2.0]})
    report.note("T = 9", "xformers", "no GPU")
    record = json.loads(report.finish().read_text())
    assert [row.get("ratio") for row in record["rows"]] == [1.0, 2.0, None]
    assert record["rows"][1]["median"] == 2.0
    assert record["rows"][2]["skipped"] == "no GPU"
    assert record["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert (tmp_path / "x-cpu.png").stat().st_size > 1000
    page = bench("make_page")
    text = page.with_tables(f"before{page.BEGIN}old", tmp_path)
    assert "| T = 8 | STA | 2 s [2, 11] | 2.000 [2.000, 2.000] |" in text
    assert "\nNot measured: xformers (T = 9): no GPU\n" in text
    assert "old" not in text
    assert text.startswith("before\n## Results\n\n### A title\n")


def test_the_main_ratios_come_first(bench, tmp_path):
    report = bench("common").Report("forward", "A title", out=tmp_path)
    report.add("T = 8", {"untouched": [1.0, 1.0], "STA": [1.5, 1.5]})
    report.finish()
    assert "\n| forward | cpu | 1.500 [1.500, 1.500] | 1.12 |\n\n### A title\n" in bench("make_page").with_tables(
        "", tmp_path
    )


def test_the_page_agrees_with_the_json(bench):
    page = bench("make_page")
    text = page.PAGE.read_text()
    assert page.with_tables(text, page.RESULTS) == text


@pytest.mark.parametrize("clips", [[(3, 2, 4)], [(2, 2, 2), (2, 2, 2)], [(3, 2, 2), (2, 2, 4)]])
def test_the_baseline_computes_what_the_package_does(bench, clips):
    towers = bench("towers")
    plain = towers.tower(2, "cpu", torch.float32, width=64, heads=4)
    ours, published = towers.with_sta(plain), towers.with_sta(plain, like_published=True)
    names = {"norm": "norm", "to_qkv": "qkv", "to_out": "proj"}
    with torch.no_grad():
        for block, other in zip(ours.blocks, published.blocks, strict=True):
            for name, theirs in names.items():
                getattr(other.sta, theirs).load_state_dict(getattr(block.sta, name).state_dict())
    arguments = towers.inputs(clips, plain)
    expected = towers.forward(ours, arguments)
    assert not torch.allclose(expected, towers.forward(plain, arguments), atol=1e-3)
    assert torch.allclose(towers.forward(published, arguments), expected, atol=1e-4)
