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


@pytest.mark.parametrize("name", sorted(file.stem for file in (ROOT / "benchmarks").glob("*.py")))
def test_each_module_fits_the_package(bench, name):
    """Nothing else imports them, so what the package has renamed or dropped would be missed on the day of a measurement."""
    module = bench(name)
    assert module.__doc__


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
    assert "\n| forward | cpu | 1.500 [1.500, 1.500] | at most 1.10 |\n\n### A title\n" in bench(
        "make_page"
    ).with_tables("", tmp_path)


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


@pytest.mark.parametrize("small", [True, False], ids=["rehearsal", "GPU"])
def test_each_part_of_the_gpu_run_is_a_command(bench, small):
    run = bench("gpu_run")
    options = run.arguments(["--rehearse"] if small else [])
    for part in run.PARTS.values():
        _, script, *rest = run.command_of(part, options, Path("out"))
        if script == "-m":
            continue
        bench(Path(script).stem).main.make_context(script, rest)  # raises for an unknown option or a wrong value


def test_a_gpu_run_goes_on_with_what_is_missing(bench, tmp_path, monkeypatch, capsys):
    run = bench("gpu_run")
    code = "import pathlib, sys; file = pathlib.Path(sys.argv[1]); ran = file.exists(); file.write_text('x'); print('said'); sys.exit(not ran)"
    scripts = {"first": ["pass"], "second": [code, str(tmp_path / "ran")], "third": ["pass"]}
    monkeypatch.setattr(
        run, "PARTS", {name: run.Part((name,)) for name in scripts} | {"none": run.Part((), needs="no_such_package")}
    )
    monkeypatch.setattr(run, "command_of", lambda part, *rest: [sys.executable, "-S", "-c", *scripts[part.line[0]]])
    line = ["--rehearse", "--out", str(tmp_path / "out")]
    assert run.main([*line, "--minutes", "0"]) == 1
    assert capsys.readouterr().out.count("no time left") == 4
    assert run.main(line) == 1
    page = (tmp_path / "out" / "page.md").read_text()
    assert "| first | done | " in page
    assert "## second: exit code 1\n\n```\nsaid\n```" in page
    assert "| none | left out: no_such_package is not installed | 0.0 |" in page
    capsys.readouterr()
    assert run.main(line) == 0
    said = capsys.readouterr().out
    assert "first: done before" in said
    assert "second: done  (" in said
    with pytest.raises(SystemExit, match="there is no part 'x'"):
        run.main([*line, "--only", "x"])


def test_a_part_that_takes_too_long_has_failed(bench, tmp_path, monkeypatch):
    run = bench("gpu_run")
    monkeypatch.setattr(run, "command_of", lambda *rest: [sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    (tmp_path / "parts").mkdir()
    found = run.run_part("a", run.Part(("a",)), run.arguments(["--rehearse"]), tmp_path, 0.2)
    assert (found["status"], found["why"]) == ("failed", "not done after 0 s")


def test_kernels_are_checked_against_float64(bench, monkeypatch):
    checks = bench("kernel_checks")
    for backend in ("auto", "sdpa", "eager"):
        for causal in (False, True):
            assert 0 < checks.check(backend, torch.float32, (2, 4, 2, 16), causal, "cpu") < 1e-5
    assert checks.check("xformers", torch.float32, (2, 4, 2, 16), False, "cpu").startswith(checks.REFUSED)
    monkeypatch.setattr(checks, "reference", lambda q, k, v, causal: q + k + v)
    assert checks.check("sdpa", torch.float32, (2, 4, 2, 16), False, "cpu") > 0.1


def test_generation_is_measured_with_sta_in_it(bench):
    generation = bench("generation")
    model = generation.full_model("cpu", 1, tiny=True)
    arguments = generation.prompt(model, 2, (2, 4, 4))
    plain, ours = (generation.generate(m, arguments, 3)() for m in (model, generation.with_sta(model)))
    assert plain.shape == ours.shape == (2, arguments["input_ids"].shape[1] + 3)
