"""The whole demo, in its quick size: clips on disk, all methods, saved adapter, new process, report."""

import dataclasses
import html
import json
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases import randomize
from click.testing import CliRunner

from sta_adapter import STAConfig, inject_sta, load_sta
from sta_adapter.cli import cli
from sta_adapter.demo import report
from sta_adapter.demo.clips import LABELS, PAIRS
from sta_adapter.demo.methods import METHODS, DemoSettings, equal_rank
from sta_adapter.demo.model import attend_frames_at_once, tiny_model
from sta_adapter.demo.reader import DESCRIBE, ReaderSettings, frame_batch, write_reader
from sta_adapter.demo.run import answer_inputs
from sta_adapter.demo.scores import compared
from sta_adapter.errors import ConfigError
from sta_adapter.evaluation import EvaluationResult, Prediction, wilson
from sta_adapter.loading import load_model, load_processor, saved_frame_settings
from sta_adapter.tiny_base import TINY_BASE, TINY_BASE_FRAMES
from sta_adapter.visualization import temporal_attention

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The quick demo's folder, and what it printed in it as printed.txt."""
    out = tmp_path_factory.mktemp("demo")
    outcome = CliRunner().invoke(
        cli, ["demo", "--out", str(out), "--quick", "--seed", "3", "--lora-language"], catch_exceptions=False
    )
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
    assert load_sta(tiny_model(folder / "base"), folder / "adapter").num_parameters() > 0


@pytest.mark.slow
def test_the_adapter_says_on_what_frames_it_was_trained(folder):
    assert saved_frame_settings(folder / "adapter") == TINY_BASE_FRAMES


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


def test_what_a_run_scored_is_counted_over_both_of_its_stages(monkeypatch):
    from sta_adapter.demo import scores

    said = {
        "ordered": ["left", " right\n", "up", "left", "nothing"],  # of the right pair are the first four, and right two
        "shuffled": ["right", "left", "down", "up", "nothing"],
    }
    answers, asked = ["left", "left", "up", "right", "up"], []

    def evaluate(model, test, *, frame_order, **how):
        asked.append((model, test, how["max_new_tokens"]))
        pairs = zip(said[frame_order], answers, strict=True)
        return EvaluationResult(
            [Prediction(i, "", "pair", answer, word, word == answer) for i, (word, answer) in enumerate(pairs)]
        )

    monkeypatch.setattr(scores, "evaluate", evaluate)
    history = [{"step": 4, "eval_accuracy": 0.2}, {"step": 5, "loss": 1.0}]
    stages = {
        "1": {"history": history, "steps": 10, "seconds": 1.26, "trainable_parameters": 5},
        "2": {"history": history, "steps": 20, "seconds": 2.5, "trainable_parameters": 7},
    }
    found = scores.measure(SimpleNamespace(model="model", stages=stages), "test")
    assert asked == [("model", "test", 4)] * 2
    assert [found[order]["overall"]["correct"] for order in ("ordered", "shuffled")] == [2, 1]
    assert "predictions" not in found["ordered"] | found["shuffled"]
    assert found["answers"] == said["ordered"]
    assert found["curve"] == [(4, 0.2), (14, 0.2)]
    assert (found["trainable_parameters"], found["seconds"], found["within_pair"]) == (7, 3.8, 0.5)
    assert scores.within_pair([Prediction(0, "", None, "left", "up", False)]) is None


def score(correct, total):
    low, high = wilson(correct, total)
    return {"correct": correct, "total": total, "accuracy": correct / total, "low": low, "high": high}


@pytest.fixture
def two_seeds():
    """Made-up results of two seeds."""
    runs = [
        {
            "method": method,
            "seed": seed,
            "ordered": {
                "overall": score(9 - place, 10),
                "categories": {"left/right": score(3 - place, 4), "up/down": score(6, 6)},
            },
            "shuffled": {"overall": score(1 + place, 10)},
            "answers": [f"{method} {seed} said {clip}" for clip in range(2)],
            "curve": [(100, 0.25), (200, (seed + place) / 10)],
            "trainable_parameters": 1000 + place,
            "seconds": 10.0 * seed,
        }
        for seed in (3, 4)
        for place, method in enumerate(METHODS)
    ]
    about = {
        "settings": dataclasses.asdict(DemoSettings()),
        "reader": {"steps": 7},
        "versions": {"torch": "2.0"},
        "seeds": [3, 4],
    }
    return {**about, "runs": runs, "reloaded": {"clips": 2, "bit_equal": True, "logits": [2, 5]}, "seconds": 12.6}


def test_the_table_adds_up_the_seeds(two_seeds, capsys):
    heads, rows = report.table(two_seeds)
    assert heads == [
        "",
        "accuracy %",
        "left/right %",
        "up/down %",
        "shuffled frames %",
        "parameters",
        "training s",
    ]
    low, high = (100 * bound for bound in wilson(18, 20))
    shuffled = [100 * bound for bound in wilson(2, 20)]
    assert rows[0] == [
        "STA + LoRA",
        f"90.0\n{low:.1f} to {high:.1f}",
        "75.0",
        "100.0",
        f"10.0\n{shuffled[0]:.1f} to {shuffled[1]:.1f}",
        "1,000",
        "35",
    ]
    assert [row[0] for row in rows] == ["STA + LoRA", "LoRA, both", "LoRA, language"]
    report.print_table(two_seeds)
    printed = capsys.readouterr().out
    assert "clips never trained on, 2 seed(s)" in printed
    assert all(cell in printed for row in rows for cell in row[2:4] + row[5:])
    assert "proves nothing" not in printed
    report.print_table({**two_seeds, "settings": dataclasses.asdict(DemoSettings.quick())})
    assert "proves nothing" in capsys.readouterr().out


@pytest.fixture
def drawn(monkeypatch):
    """Figures that the report has made."""
    found, make = [], report.new_figure
    monkeypatch.setattr(
        report, "new_figure", lambda *size, **options: found.append(make(*size, **options)) or found[-1]
    )
    return found


def test_the_reports_page_and_pictures_hold_the_results(made, two_seeds, drawn):
    folder, (_, test, _) = made
    handle = inject_sta(tiny_model(), STAConfig(head_scale=1.0))
    for index, module in enumerate(handle.blocks.values()):
        randomize(module, seed=index, std=0.1)
    page = html.unescape(report.write_report(folder, two_seeds, handle, test).read_text(encoding="utf-8"))
    assert [path.read_bytes()[:4] for path in (folder / "curves.png", folder / "attention.png")] == [b"\x89PNG"] * 2
    assert "same logits bit for bit on 2 clips" in page
    assert "took 13 seconds" in page
    assert "Seeds: 3, 4." in page
    assert "Versions: torch 2.0." in page
    assert "quick run" not in page
    for clip, sample in enumerate(test.samples):
        assert f"<b>{sample.answer}</b><br>STA + LoRA: sta 3 said {clip}" in page  # of the first seed
        source = sample.messages[0]["content"][0]["video"]
        assert f'src="{Path(source).relative_to(folder).as_posix()}"' in page
    curves, attention = drawn
    lines = {line.get_label(): line.get_xydata() for line in curves.axes[0].lines}
    np.testing.assert_allclose(lines["LoRA, both"], [[100, 25], [200, 45]])
    np.testing.assert_allclose(lines["chance"][:, 1], 10)
    assert (
        len(lines) == 3 * 3 + 1 + 1
    )  # of each method both seeds and their mean; chance; where the second stage begins
    colours = [line.get_color() for line in curves.axes[0].lines[:9]]
    assert colours == [report.COLOURS[method] for method in METHODS for _ in range(3)]
    assert curves.axes[0].get_ylim() == (0, 100)
    squares = [axes for axes in attention.axes if axes.images]
    for place, axes in enumerate(squares):
        weights = temporal_attention(handle, answer_inputs(test, place // 4))[place % 4]
        even = np.log2(weights.shape[-1] * weights.mean((0, 1)))
        np.testing.assert_allclose(axes.images[0].get_array(), even, rtol=1e-4, atol=1e-5)
        assert axes.get_title() == f"block {place % 4}"
        assert sum(axes.images[0].get_clim()) == 0  # even spread is in the middle of the colours
    assert [axes.get_ylabel() for axes in squares[::4]] == [
        f"{sample.answer!r}\nframe that looks" for sample in test.samples
    ]


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


@pytest.mark.parametrize(
    ("asked_for", "expected"), [({}, ["sta", "lora"]), ({"methods": list(METHODS)}, list(METHODS))]
)
def test_runs_of_each_method_and_seed_are_written_down(monkeypatch, tmp_path, asked_for, expected):
    from sta_adapter.demo import run as demo_run

    monkeypatch.setattr(demo_run, "make_clips", lambda folder, settings, seed: ("data", f"test {seed}", "curve"))
    handles = iter(["handle" if method == "sta" else None for method in expected] * 2)
    taught, begun = [], []
    monkeypatch.setattr(demo_run, "write_reader", lambda base, settings, seed, data, seen: taught.append((base, seed)))

    def train(*given):
        begun.append(given[-1])
        return SimpleNamespace(handle=next(handles))

    monkeypatch.setattr(demo_run, "train_method", train)
    monkeypatch.setattr(demo_run, "measure", lambda trained, test: {"on": test})
    monkeypatch.setattr(demo_run, "check_reload", lambda handle, folder, test, seed: [handle, test, seed])
    results, shown, asked = demo_run.run_demo(
        tmp_path, DemoSettings.quick(), ReaderSettings.quick(), [3, 4], **asked_for
    )
    assert results["runs"] == [{"method": m, "seed": s, "on": f"test {s}"} for s in (3, 4) for m in expected]
    assert compared(results) == expected
    assert (results["reloaded"], shown, asked) == (["handle", "test 3", 3], "handle", "test 3")
    assert taught == [(tmp_path / "base", 3), (tmp_path / "runs" / "base-4", 4)]
    assert begun == [base for base, _ in taught for _ in expected]  # all methods of a seed begin with the same reader
    assert 0 <= results["seconds"] < 60
    assert json.loads((tmp_path / "results.json").read_text()) == results


@pytest.mark.parametrize("methods", [("lora",), ("sta", "dora")])
def test_what_can_not_be_compared(methods, tmp_path):
    from sta_adapter.demo.run import run_demo

    with pytest.raises(ConfigError, match=r"methods are .*, expected 'sta' and others of sta, lora, lora_language"):
        run_demo(tmp_path, DemoSettings.quick(), ReaderSettings.quick(), [0], methods=methods)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with the clips of a comparison of the smallest size, and what was read of them."""
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


def test_a_frame_stands_where_it_does_in_its_clip():
    tokenizer = load_processor(TINY_BASE).tokenizer
    batch = frame_batch(tokenizer, DESCRIBE, ["12345", "67890"], torch.zeros(2, 16, 192), torch.tensor([0, 5]))
    start = (batch["input_ids"][0] == tokenizer.convert_tokens_to_ids("<|video_pad|>")).int().argmax().item()
    time, rows, columns = batch["position_ids"][:, 1, start : start + 4].sub(start).tolist()
    assert (time, rows, columns) == ([5] * 4, [0, 0, 1, 1], [0, 1, 0, 1])
    assert batch["position_ids"][:, 1, start + 4].tolist() == [start + 2] * 3
    assert tokenizer.decode(batch["input_ids"][0][batch["labels"][0] != -100]) == "12345<|im_end|>"


def test_a_reader_learns_above_an_encoder_that_stays(made, tmp_path):
    _, (data, _, _) = made
    base = write_reader(tmp_path, ReaderSettings.quick(), 0, data, [[f"{t}1234" for t in range(8)]] * len(data))
    before, after = (tiny_model(folder).state_dict() for folder in (TINY_BASE, base))
    changed = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    assert {name for name in before if "visual" in name and "merger" not in name}.isdisjoint(changed)
    assert {name for name in before if "language_model.layers" in name} <= changed


def test_an_adapter_reloaded_elsewhere_answers_alike_or_the_demo_ends(made, monkeypatch):
    from sta_adapter.demo import reload, run
    from sta_adapter.errors import STAError

    folder, (_, test, _) = made

    def here(command, check):
        monkeypatch.setattr("sys.argv", ["reload", *command[3:]])
        reload.main()

    monkeypatch.setattr(run.subprocess, "run", here)
    tiny_model().save_pretrained(folder / "base")
    handle = inject_sta(tiny_model())
    found = run.check_reload(handle, folder, test, 3)
    assert (found["clips"], found["bit_equal"], found["logits"][0]) == (2, True, 2)
    (folder / "runs" / run.LOGITS).unlink()
    monkeypatch.setattr(reload, "answer_logits", lambda model, test: run.answer_logits(model, test) + 1)
    with pytest.raises(STAError, match="loaded in a new process, gives other answers: the logits differ by up to 1"):
        run.check_reload(handle, folder, test, 3)
