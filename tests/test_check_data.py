import json

import pytest
from click.testing import CliRunner
from tiny_qwen import make_processor, write_samples

from sta_adapter.cli import cli
from sta_adapter.cli.check_data import describe
from sta_adapter.data import FrameSettings
from sta_adapter.data import clip_reader as clips
from sta_adapter.data.check import check_data
from sta_adapter.errors import ConfigError, DataError
from sta_adapter.video import read_clip

AS_IS = FrameSettings(min_tokens=None, max_tokens=None)


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return make_processor(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def spoilt(tmp_path):
    """Eight samples: missing file, no video, no JSON, empty answer, no answer, and three that are fine."""
    file = write_samples(tmp_path, 8)
    (tmp_path / "1.mp4").unlink()
    (tmp_path / "2.mp4").write_text("no video")
    lines = file.read_text().splitlines()
    lines[3] = lines[3][:-1]
    for number, turns in ((4, [{"role": "assistant", "content": " "}]), (5, [])):
        record = json.loads(lines[number])
        lines[number] = json.dumps({**record, "messages": [record["messages"][0], *turns]})
    file.write_text("\n".join(lines))
    return file


@pytest.mark.parametrize("workers", [0, 2], ids=["here", "workers"])
def test_every_problem_is_found(spoilt, processor, workers):
    report = check_data(spoilt, processor=processor, frames=AS_IS, num_workers=workers)
    found = {p["source"].rsplit(" ", 1)[1]: (p["kind"], p["reason"]) for p in report.problems}
    kinds = {line: kind for line, (kind, _) in found.items()}
    assert kinds == {"2": "missing", "3": "unreadable", "4": "record", "5": "record", "6": "record"}
    assert "not JSON" in found["4"][1]
    assert "is an empty answer" in found["5"][1]
    assert found["6"][1].startswith("no message with role 'assistant'")
    assert "1.mp4" in found["2"][1]
    assert report.samples == 8
    assert report.categories == {"left": 3, "right": 3}
    assert report.seconds == [1.0] * 4
    assert report.frames == [4] * 4
    assert report.tokens == [42] * 3


def test_long_samples(tmp_path, processor):
    file = write_samples(tmp_path, 2)
    assert not check_data(file, processor=processor, frames=AS_IS, max_length=42, num_workers=0).problems
    report = check_data(file, processor=processor, frames=AS_IS, max_length=41, num_workers=0)
    assert [p["kind"] for p in report.problems] == ["length"] * 2
    assert report.problems[0]["reason"].startswith("42 tokens, more than the 41 allowed")


def test_the_tokenizers_limit_holds(tmp_path, processor, monkeypatch):
    file = write_samples(tmp_path, 1)
    monkeypatch.setattr(processor.tokenizer, "model_max_length", 40)
    report = check_data(file, processor=processor, frames=AS_IS, num_workers=0)
    assert "more than the 40 allowed" in report.problems[0]["reason"]


def test_hanging_decoders_are_found(tmp_path, monkeypatch):
    def reading(path, **options):
        if path.endswith("1.mp4"):
            __import__("time").sleep(3600)
        return read_clip(path, **options)

    monkeypatch.setattr(clips, "read_clip", reading)
    report = check_data(write_samples(tmp_path, 3), frames=AS_IS, num_workers=1, decode_timeout=3)
    assert [p["kind"] for p in report.problems] == ["unreadable"]
    assert "1.mp4: not done after 3 s" in report.problems[0]["reason"]
    assert len(report.seconds) == 2


def test_images_that_cannot_be_read(tmp_path):
    (tmp_path / "a.png").write_text("no image")
    record = {
        "messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "x"}],
        "images": ["a.png"],
    }
    (tmp_path / "data.jsonl").write_text(json.dumps(record))
    report = check_data(tmp_path / "data.jsonl", num_workers=0)
    assert report.problems[0]["kind"] == "unreadable"


def test_command(spoilt, tmp_path):
    line = ["check-data", str(spoilt), "--num-workers", "0"]
    done = CliRunner().invoke(cli, line)
    assert done.exit_code == 1
    assert done.output.splitlines()[0] == "8 samples, 5 of them bad"
    assert "seconds a clip: 1 to 1, median 1" in done.output
    assert "       3  left" in done.output
    as_json = CliRunner().invoke(cli, [*line, "--json"])
    assert as_json.exit_code == 1
    assert json.loads(as_json.output)["bad"] == 5
    fine = CliRunner().invoke(cli, ["check-data", str(write_samples(tmp_path / "fine", 2)), "--num-workers", "0"])
    assert fine.exit_code == 0
    assert fine.output.startswith("2 samples, 0 of them bad")


def test_command_with_a_model_and_settings(tmp_path, processor, monkeypatch):
    from sta_adapter import loading

    monkeypatch.setattr(loading, "load_processor", lambda name, **options: processor)
    settings = tmp_path / "run.yaml"
    settings.write_text("model: x\nmax_length: 41\nframes: {min_tokens: null, max_tokens: null}\n")
    file = write_samples(tmp_path, 1)
    line = ["check-data", str(file), "--model", "x", "--num-workers", "0", "--config", str(settings)]
    done = CliRunner().invoke(cli, line)
    assert done.exit_code == 1
    assert "42 tokens, more than the 41 allowed" in " ".join(done.output.split())
    assert CliRunner().invoke(cli, [*line, "--max-length", "42"]).exit_code == 0


def test_how_the_data_is_read_is_that_of_the_training(tmp_path):
    file = write_samples(tmp_path / "data", 1).rename(tmp_path / "moved.jsonl")
    settings = tmp_path / "run.yaml"
    settings.write_text(f"videos: {tmp_path / 'data'}\nformat: conversations\n")
    line = ["check-data", str(file), "--num-workers", "0"]
    assert CliRunner().invoke(cli, line).exit_code == 1
    assert CliRunner().invoke(cli, [*line, "--config", str(settings)]).output.startswith("1 sample, 0 of them bad")
    settings.write_text("videos: 5\n")
    done = CliRunner().invoke(cli, [*line, "--config", str(settings)])
    assert "videos is 5, expected a text" in str(done.exception)


@pytest.mark.parametrize("words", [["--max-length", "9"], ["--revision", "main"], ["--trust-remote-code"]], ids=str)
def test_options_of_a_model_that_is_not_given(tmp_path, words):
    done = CliRunner().invoke(cli, ["check-data", str(write_samples(tmp_path, 1)), *words])
    assert isinstance(done.exception, ConfigError)
    assert f"{words[0]} has no effect without --model" in str(done.exception)


def test_files_that_are_no_data(tmp_path):
    with pytest.raises(DataError, match="can't read the data file"):
        check_data(tmp_path / "none.jsonl")


def test_long_reports_are_cut():
    problem = {"source": "data.jsonl, line 1", "kind": "missing", "reason": "words " * 40}
    names = {f"class {number}": 1 for number in range(25)}
    lines = describe({"samples": 30, "bad": 30, "problems": [problem] * 30, "categories": names})
    assert "    ... and 5 more; --json lists all" in lines
    assert lines[-1] == "    ... and 10 more; --json lists all"
    assert max(map(len, lines)) <= 80
    assert lines[lines.index(next(line for line in lines if line.startswith("missing: "))) + 1].startswith("    words")


def test_a_misspelt_setting_is_refused(tmp_path):
    settings = tmp_path / "run.yaml"
    settings.write_text("model: x\nmax_lenght: 41\n")
    done = CliRunner().invoke(cli, ["check-data", str(write_samples(tmp_path, 1)), "--config", str(settings)])
    assert "unknown setting 'max_lenght'. Did you mean 'max_length'?" in str(done.exception)
