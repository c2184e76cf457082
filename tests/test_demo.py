"""The whole demo, in its quick size: clips on disk, three methods, saved adapter, new process, report."""

import json
from html.parser import HTMLParser

import pytest
import torch
from click.testing import CliRunner

from sta_adapter import load_sta
from sta_adapter.cli import cli
from sta_adapter.demo.clips import LABELS, PAIRS
from sta_adapter.demo.methods import METHODS, DemoSettings, equal_rank
from sta_adapter.demo.model import attend_frames_at_once, tiny_model
from sta_adapter.loading import load_model

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The quick demo's folder, and what it printed in it as printed.txt."""
    out = tmp_path_factory.mktemp("demo")
    outcome = CliRunner().invoke(cli, ["demo", "--out", str(out), "--quick", "--seed", "3"], catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    (out / "printed.txt").write_text(outcome.output, encoding="utf-8")
    return out


@pytest.fixture(scope="module")
def results(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_results_of_every_method(results):
    assert [run["method"] for run in results["runs"]] == list(METHODS)
    settings = DemoSettings.quick()
    for run in results["runs"]:
        for order in ("ordered", "shuffled"):
            assert run[order]["overall"]["total"] == settings.test_clips
            assert run[order]["overall"]["low"] <= run[order]["overall"]["accuracy"] <= run[order]["overall"]["high"]
        assert list(run["ordered"]["categories"]) == ["/".join(pair) for pair in PAIRS]
        assert run["curve"][-1][0] == settings.steps
        assert len(run["answers"]) == len(LABELS)


@pytest.mark.slow
def test_the_baseline_has_as_many_parameters(results):
    sta, lora, language = (run["trainable_parameters"] for run in results["runs"])
    assert sta <= lora <= 1.15 * sta
    assert language < sta


@pytest.mark.slow
def test_adapter_is_the_same_to_the_bit_in_a_new_process_and_loads_here(folder, results):
    assert results["reloaded"]["bit_equal"] is True
    assert results["reloaded"]["clips"] == DemoSettings.quick().test_clips
    names = {path.name for path in (folder / "adapter").iterdir()}
    assert {"sta_adapter.safetensors", "sta_config.json", "adapter_config.json", "adapter_model.safetensors"} <= names
    assert load_sta(tiny_model(), folder / "adapter").num_parameters() > 0


class Links(HTMLParser):
    """The files that a page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("src", "href")]


@pytest.mark.slow
def test_page_refers_only_to_files_of_its_own_folder(folder):
    page = (folder / "index.html").read_text(encoding="utf-8")
    links = Links()
    links.feed(page)
    assert {"curves.png", "attention.png"} <= set(links.found)
    assert sum(link.endswith(".mp4") for link in links.found) == len(LABELS)
    for link in links.found:
        assert (folder / link).is_file(), link
    assert str(folder) not in page
    assert "$" not in page


@pytest.mark.slow
def test_the_page_says_that_it_is_quick_and_fits_a_phone(folder, tmp_path):
    from browser import chromium, find_chromium

    find_chromium()
    assert "This was a quick run" in (folder / "index.html").read_text(encoding="utf-8")
    with chromium(tmp_path / "profile") as browser:
        phone = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
        browser.get((folder / "index.html").as_uri())
        assert browser.execute_script("return document.documentElement.scrollWidth") == 390
        inner = "return [...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth).length"
        assert browser.execute_script(inner) == 0


@pytest.mark.slow
def test_table_is_printed(folder):
    printed = (folder / "printed.txt").read_text(encoding="utf-8")
    assert printed.count("proves nothing") == 2
    for words in ("accuracy", "shuffled frames", "parameters", *("/".join(pair) for pair in PAIRS)):
        assert words in printed


def test_equal_rank_is_the_smallest_that_is_enough():
    settings = DemoSettings()
    assert settings.rank < equal_rank(settings) < 2 * settings.rank


def test_attending_to_all_frames_at_once_changes_no_answer():
    model, pixels, grid = load_model_twice()
    expected, found = (encode(net, pixels, grid) for net in model)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def load_model_twice():
    from sta_adapter.demo import TINY_BASE

    plain, fast = (load_model(TINY_BASE, dtype="fp32", device="cpu") for _ in range(2))
    attend_frames_at_once(fast)
    generator = torch.Generator().manual_seed(0)
    return (plain, fast), torch.randn(2 * 3 * 16, 192, generator=generator), torch.tensor([[3, 4, 4], [3, 4, 4]])


def encode(model, pixels, grid):
    visual = model.visual if hasattr(model, "visual") else model.model.visual
    with torch.no_grad():
        out = visual(pixels, grid)
    return out if torch.is_tensor(out) else out.pooler_output


def test_seconds_of_a_row_are_those_of_one_seed():
    from sta_adapter.demo.scores import summary

    method = next(iter(METHODS))
    score = {"overall": {"correct": 1, "total": 2, "accuracy": 0.5}, "categories": {"a": {"correct": 1, "total": 2}}}
    runs = [
        {"method": method, "ordered": score, "shuffled": score, "trainable_parameters": 3, "seconds": seconds}
        for seconds in (10.0, 30.0)
    ]
    row = summary({"runs": runs}, method)
    assert row["seconds"] == 20
    assert row["ordered"]["total"] == 4
