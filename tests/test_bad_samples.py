"""Whatever one sample makes a library raise, wherever that is, is one bad sample with its reason, and the others go on."""

import json
import pickle
from dataclasses import replace

import pytest
import torch
from PIL import Image
from tiny_qwen import make_model, make_processor, write_samples

from sta_adapter.data import BadSample, FrameSettings, VideoDataset
from sta_adapter.data import chat_encoding as encoding
from sta_adapter.data import clip_reader as clips
from sta_adapter.data.chat_encoding import Loaded
from sta_adapter.data.check import check_data
from sta_adapter.data.collator import Collator
from sta_adapter.data.conversation import parse_sample
from sta_adapter.errors import CompatibilityError, DataError, MissingExtraError, TrainingStopped
from sta_adapter.evaluation import evaluate
from sta_adapter.training import TrainingConfig, train

AS_IS = FrameSettings(min_tokens=None, max_tokens=None)


class Panic(BaseException):
    """As code that is written in Rust panics: no Exception."""


RAISED = [
    ValueError("odd size"), KeyError("height"), RuntimeError("bad stride"), MemoryError(), RecursionError("deep"),
    AssertionError(), ZeroDivisionError("by zero"), OverflowError("too large"), Panic("unwrap on a None"),
]  # fmt: skip
PLACES = {"reading": (clips, "read_clip"), "resizing": (clips, "fit_frames"), "template": (encoding, "render"),
          "processor": (encoding, "process"), "encoding": (encoding, "join")}  # fmt: skip


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return make_processor(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four samples that other libraries can't take, between three that are fine."""
    path = tmp_path_factory.mktemp("data")
    good = [json.loads(line) for line in write_samples(path, 3).read_text().splitlines()]
    Image.new("RGB", (900, 2)).save(path / "banner.png")  # longer than 200 times its height
    bad = []
    for content in (picture("banner.png"), picture("a\0.png"), "cut emoji \ud83d", picture(".")):
        bad.append({"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "left"}]})
    records = [good[0], bad[0], bad[1], good[1], bad[2], bad[3], good[2], {"messages": good[0]["messages"][:1]}]
    (path / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    return path


def picture(name):
    return [{"type": "image", "image": name}, {"type": "text", "text": "Which?"}]


REASONS = {
    "2": "ValueError: absolute aspect ratio must be smaller than 200, got 450.0",
    "3": "embedded null byte",
    "5": r"the text holds '\ud83d' at character 10, which is half a character",
    "6": "Is a directory",
    "8": "no message with role 'assistant'; expected an answer",
}


def check_reasons(messages):
    found = {message.split(": ", 1)[0].rsplit(" ", 1)[1]: message for message in messages}
    assert found.keys() == REASONS.keys()
    assert all(REASONS[line] in message for line, message in found.items())


@pytest.mark.parametrize("workers", [0, 2], ids=["here", "workers"])
def test_check_data_goes_on(folder, processor, workers):
    report = check_data(folder / "data.jsonl", processor=processor, frames=AS_IS, num_workers=workers)
    check_reasons([f"{problem['source']}: {problem['reason']}" for problem in report.problems])
    assert len(report.tokens) == 3


def test_training_goes_on(folder, processor, tmp_path):
    config = TrainingConfig(batch_size=8, device_batch_size=8, max_steps=2, num_workers=0, frames=AS_IS)
    result = train(
        make_model(processor.tokenizer),
        folder / "data.jsonl",
        processor=processor,
        output_dir=tmp_path,
        stage="1",
        config=config,
        progress=False,
    )
    check_reasons(result.bad_samples)


def test_evaluation_goes_on(folder, processor, tmp_path):
    found = evaluate(
        make_model(processor.tokenizer),
        folder / "data.jsonl",
        processor=processor,
        frame_settings=AS_IS,
        max_new_tokens=1,
        predictions_file=tmp_path / "log.jsonl",
    )
    check_reasons(found.bad_samples)
    assert len(found.predictions) == 3


def test_an_option_that_no_tokenizer_takes_is_its_samples_fault(folder, processor):
    records = [{"question": "Which?", "options": ["left", "right"], "answer": "A", "video": "0.mp4", "nframes": 4}] * 2
    samples = [parse_sample(record, source=f"line {n}", folder=folder) for n, record in enumerate(records)]
    samples[0].options[1] = "half \udc00"
    how = {"frames": AS_IS, "on_bad_sample": "skip"}
    net = make_model(processor.tokenizer)
    found = evaluate(net, VideoDataset(samples, processor, **how))
    assert [p.index for p in found.predictions] == [1]
    assert found.bad_samples[0].startswith(r"line 0: the text holds '\udc00'")
    with pytest.raises(DataError, match=r"line 0: the text holds '\\udc00'"):
        evaluate(net, VideoDataset(samples, processor, **{**how, "on_bad_sample": "error"}))


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("place", PLACES)
def test_whatever_is_raised_is_about_the_sample(folder, processor, monkeypatch, place, error):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(*PLACES[place], fail)
    sample = VideoDataset(folder / "data.jsonl", processor).samples[0]
    item = VideoDataset([sample], processor)[0]
    assert isinstance(item, BadSample)
    assert item.source.endswith("data.jsonl, line 1")
    assert type(error).__name__ in item.reason
    assert str(error) in item.reason
    with pytest.raises(DataError, match=rf"data.jsonl, line 1: .*{type(error).__name__}"):
        VideoDataset([sample], processor, on_bad_sample="error")[0]


@pytest.mark.parametrize("error", [MissingExtraError("pip install x"), CompatibilityError("y"), KeyboardInterrupt()])
def test_what_is_about_no_sample_is_raised(folder, processor, monkeypatch, error):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(clips, "read_clip", fail)
    with pytest.raises(type(error)):
        VideoDataset(folder / "data.jsonl", processor)[0]


def test_what_errors_keep():
    error = DataError("torn", source="line 3")
    assert (str(error), error.source, error.reason) == ("line 3: torn", "line 3", "torn")
    assert (str(DataError("torn")), DataError("torn").source) == ("torn", None)
    stopped = TrainingStopped("saved", signal=15)
    assert (str(stopped), stopped.signal, stopped.checkpoint) == ("saved", 15, None)
    assert str(TrainingStopped()) == ""


def test_the_place_of_a_sample_is_told_once():
    assert BadSample.of("line 3", DataError("torn", source="line 3")) == ("line 3", "torn")
    assert BadSample.of("line 3", DataError("torn", source="a.mp4")) == ("line 3", "a.mp4: torn")


def test_an_error_that_names_no_file_gets_its_name(folder, processor, monkeypatch):
    monkeypatch.setattr(clips, "read_clip", lambda *args, **options: [][0])
    item = VideoDataset(folder / "data.jsonl", processor)[0]
    assert item.reason.endswith("0.mp4' can't be read as video: IndexError: list index out of range")


def test_a_record_that_is_none_is_a_bad_sample_of_every_run(folder, processor, tmp_path):
    lines = (folder / "data.jsonl").read_text().splitlines()[:1] * 2
    (folder / "records.jsonl").write_text("\n".join([lines[0], "{", '{"messages": [3]}', "[" * 9999, lines[1]]))
    file, net = folder / "records.jsonl", make_model(processor.tokenizer)
    log = tmp_path / "log.jsonl"
    found = evaluate(net, file, processor=processor, frame_settings=AS_IS, max_new_tokens=1, predictions_file=log)
    report = check_data(file, processor=processor, frames=AS_IS, num_workers=0)
    config = TrainingConfig(batch_size=5, device_batch_size=5, max_steps=1, num_workers=0, frames=AS_IS)
    how = {"processor": processor, "stage": "1", "progress": False}
    trained = train(net, file, output_dir=tmp_path / "a", config=config, **how)
    reasons = sorted(f"{problem['source']}: {problem['reason']}" for problem in report.problems)
    assert [reason.split(": ")[0].rsplit(" ", 1)[1] for reason in reasons] == ["2", "3", "4"]
    assert sorted(found.bad_samples) == sorted(trained.bad_samples) == reasons
    assert [p.index for p in found.predictions] == [0, 4]
    for use in (
        lambda: train(net, file, output_dir=tmp_path / "b", config=replace(config, on_bad_sample="error"), **how),
        lambda: evaluate(net, file, processor=processor, on_bad_sample="error"),
    ):
        with pytest.raises(DataError, match=r"records\.jsonl, line 2: not JSON"):
            use()
    (tmp_path / "none.txt").write_text("no data\n")
    with pytest.raises(DataError, match=r"none\.txt, line 1: not JSON"):
        train(net, tmp_path / "none.txt", output_dir=tmp_path / "c", config=config, **how)


# ---- batches


def encoded(source, shape, tokens=3):
    ids = torch.arange(tokens)
    return Loaded.of({"input_ids": ids, "labels": ids, "pixel_values": torch.zeros(shape)}, source)


def test_what_makes_no_batch_is_left_out():
    odd = encoded("odd", (4, 5))
    torn = Loaded.of({"input_ids": torch.arange(3), "labels": torch.arange(2)}, "torn")
    empty = Loaded.of({"labels": torch.arange(2)}, "empty")
    items = [odd, encoded("a", (2, 6)), torn, BadSample("gone", "missing"), encoded("b", (3, 6)), empty]
    batch = Collator(0)(items)
    assert batch["pixel_values"].shape == (5, 6)
    assert batch["input_ids"].shape == (2, 3)
    assert [said.split(":")[0] for said in batch["bad_samples"]] == ["odd", "torn", "gone", "empty"]
    assert (
        "odd: its pixel_values are of shape (5,) each, those of other samples in the batch of (6,)"
        in batch["bad_samples"][0]
    )
    with pytest.raises(DataError, match="odd: its pixel_values are of shape"):
        Collator(0, on_bad_sample="error")(items)


def test_unequal_shapes_that_can_be_joined_stay():
    class Padding(Collator):
        def _batch(self, items):
            return {"rows": len(items)}

    items = [encoded("a", (2, 6)), encoded("b", (2, 7))]
    assert Padding(0)(items) == {"bad_samples": [], "rows": 2}


def test_samples_know_their_source_across_processes(folder, processor):
    item = VideoDataset(folder / "data.jsonl", processor)[0]
    assert item.source.endswith("data.jsonl, line 1")
    assert pickle.loads(pickle.dumps(item)).source == item.source


def test_check_data_makes_batches(folder, processor, monkeypatch):
    odd = folder / "0.mp4"

    def encode(processor, messages, visuals):
        item = encoding.encode(processor, messages, visuals)
        is_odd = messages[0]["content"][0].get("video") == str(odd)
        return {**item, "pixel_values_videos": item["pixel_values_videos"][:, : 7 if is_odd else None]}

    monkeypatch.setattr("sta_adapter.data.check.encode", encode)
    file = write_samples(folder / "batches", 3)
    file.write_text(file.read_text().replace('"0.mp4"', json.dumps(str(odd))))
    report = check_data(file, processor=processor, frames=AS_IS, num_workers=0)
    assert [(p["source"].rsplit(" ", 1)[1], p["kind"]) for p in report.problems] == [("1", "batch")]
    assert "its pixel_values_videos are of shape (7,) each" in report.problems[0]["reason"]
    assert not check_data(file, processor=processor, frames=AS_IS, num_workers=0, batch_size=1).problems
