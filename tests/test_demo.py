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


@pytest.mark.parametrize("method", METHODS)
def test_settings_of_each_method(monkeypatch, tmp_path, method):
    """STA and LoRA are trained for as many steps, with the ranks that make them comparable."""
    from sta_adapter.demo import methods

    trained = []
    monkeypatch.setattr(methods, "train", lambda model, data, **how: trained.append((data, how)))
    monkeypatch.setattr(methods, "equal_rank", lambda settings: 11)
    settings = DemoSettings()
    methods.train_method(method, settings, 3, "data", "curve", tmp_path)
    [(data, how)] = trained
    config = how["config"]
    rank = 11 if method == "lora" else 8
    assert (config.lora_rank, config.lora_alpha, config.seed, config.on_bad_sample) == (rank, rank, 3, "error")
    assert (config.sta, how["stage"]) == ((True, "both") if method == "sta" else (False, "2"))
    assert config.lora_targets == ("language" if method == "lora_language" else "all")
    if method != "lora_language":
        assert (config.lora_qkv_rank, config.lora_qkv_alpha) == (2 * rank, 2 * rank)
    steps = [config.for_stage(stage).max_steps for stage in ("1", "2")] if method == "sta" else [config.max_steps]
    assert sum(steps) == settings.steps
    assert (data, how["output_dir"]) == ("data", tmp_path)


def test_runs_of_each_method_and_seed_are_written_down(monkeypatch, tmp_path):
    from types import SimpleNamespace

    from sta_adapter.demo import run as demo_run

    monkeypatch.setattr(demo_run, "make_clips", lambda folder, settings, seed: ("data", f"test {seed}", "curve"))
    handles = iter([None, "handle", None] * 2)
    monkeypatch.setattr(demo_run, "train_method", lambda *given: SimpleNamespace(handle=next(handles)))
    monkeypatch.setattr(demo_run, "measure", lambda trained, test: {"on": test})
    monkeypatch.setattr(demo_run, "check_reload", lambda handle, folder, test, seed: [handle, test, seed])
    results, shown, asked = demo_run.run_demo(tmp_path, DemoSettings.quick(), [3, 4])
    assert results["runs"] == [{"method": m, "seed": s, "on": f"test {s}"} for s in (3, 4) for m in METHODS]
    assert (results["reloaded"], shown, asked) == (["handle", "test 3", 3], "handle", "test 3")
    assert 0 <= results["seconds"] < 60
    assert json.loads((tmp_path / "results.json").read_text()) == results


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with the clips of a comparison of the smallest size, and what was read of them."""
    import dataclasses

    from sta_adapter.demo.run import make_clips

    out = tmp_path_factory.mktemp("made")
    (out / "runs").mkdir()
    return out, make_clips(
        out, dataclasses.replace(DemoSettings.quick(), train_clips=2, test_clips=2, curve_clips=1), 3
    )


def test_clips_are_read_as_they_are_trained_on(made):
    _, (data, test, curve) = made
    assert [len(dataset) for dataset in (data, test, curve)] == [2, 2, 1]
    assert {dataset.encoder.on_bad_sample for dataset in (data, test, curve)} == {"error"}
    assert {str(s.messages) for s in data.samples}.isdisjoint(str(s.messages) for s in test.samples)


def test_an_adapter_reloaded_elsewhere_answers_alike_or_the_demo_ends(made, monkeypatch):
    from sta_adapter import inject_sta
    from sta_adapter.demo import reload, run
    from sta_adapter.errors import STAError

    folder, (_, test, _) = made

    def here(command, check):
        monkeypatch.setattr("sys.argv", ["reload", *command[3:]])
        reload.main()

    monkeypatch.setattr(run.subprocess, "run", here)
    handle = inject_sta(tiny_model())
    found = run.check_reload(handle, folder, test, 3)
    assert (found["clips"], found["bit_equal"], found["logits"][0]) == (2, True, 2)
    (folder / "runs" / run.LOGITS).unlink()
    monkeypatch.setattr(reload, "answer_logits", lambda model, test: run.answer_logits(model, test) + 1)
    with pytest.raises(STAError, match="loaded in a new process, gives other answers: the logits differ by up to 1"):
        run.check_reload(handle, folder, test, 3)
