"""Files of a run are read as from anybody: numbers in their ranges, words that are neither code nor markup, or an error."""

import contextlib
import json
import os
import warnings

import pytest
from cases import make_qwen2_vl_tower, seeded
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_model_card import FRAMES, RESULTS, SETTINGS, STAGE, card, write_results

from sta_adapter import inject_sta
from sta_adapter.adapter.format import read_description
from sta_adapter.adapter.model_card import read_run
from sta_adapter.adapter.push import push_folder
from sta_adapter.adapter.run_file import read_about, read_results, read_run_file, read_stage
from sta_adapter.data import FrameSettings
from sta_adapter.errors import CheckpointError, ConfigError, STAWarning
from sta_adapter.loading import saved_frame_settings, saved_positions

FILES = ("run.json", "results.json", "stage1/result.json")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    inject_sta(seeded(make_qwen2_vl_tower)).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(adapter, tmp_path):
    for path in adapter.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "stage1").mkdir()
    for name, content in zip(FILES, ({**SETTINGS, "frames": FRAMES}, RESULTS, STAGE), strict=True):
        (tmp_path / name).write_text(json.dumps(content))
    write_results(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "value"),
    [("nframes", 10**9), ("nframes", 0), ("nframes", 4.0), ("nframes", True), ("nframes", "os.system('id')"), ("fps", 0),
     ("fps", float("nan")), ("fps", "2"), ("fps", 10**400), ("max_frames", None), ("max_frames", -1), ("min_frames", [4]),
     ("min_tokens", 10**12), ("max_tokens", 0), ("backend", 3)],
)  # fmt: skip
def test_frames_out_of_range(folder, name, value):
    with pytest.raises(ConfigError, match=f"{name} is .*, expected"):
        FrameSettings(**{name: value})
    (folder / "run.json").write_text(json.dumps({"frames": {name: value}}))
    with pytest.raises(CheckpointError, match=r"run\.json"):
        saved_frame_settings(folder)
    with pytest.raises(CheckpointError, match=r"run\.json"):
        read_run(folder)


@pytest.mark.parametrize(("value", "told"), [("differ", True), ("unknown", True), (["differ"], False), ("<b>", False)])
def test_that_records_differ_travels_along(folder, value, told):
    (folder / "run.json").write_text(json.dumps({**SETTINGS, "frames": FRAMES, "frames_of_records": value}))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert saved_frame_settings(folder) == FRAMES
    assert [w.category for w in said] == [STAWarning] * told
    push_folder(folder, "user/name", dry_run=True)
    assert ("frames_of_records" in read_run(folder)["settings"]) is told


def test_frames_of_a_published_adapter(folder):
    (folder / "run.json").unlink()
    path = folder / "sta_config.json"
    description = json.loads(path.read_text())
    path.write_text(json.dumps({**description, "frames": {"nframes": 10**9}}))
    with pytest.raises(CheckpointError, match=r"sta_config\.json: frames: nframes is"):
        saved_frame_settings(folder)
    path.write_text(json.dumps({**description, "frames": FRAMES}))
    assert saved_frame_settings(folder) == {key: value for key, value in FRAMES.items() if key != "backend"}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' * 40 + "1" + "}" * 40, '{"a": ' + "9" * 5000 + "}", '{"a": 1e999}', "[]",
                                  '{"a": NaN}', '{"a": 100000000000000000000}', "\x00"],
                         ids=["deep", "deep object", "digits", "infinite", "list", "nan", "large", "bytes"])  # fmt: skip
def test_json_that_no_run_leaves(folder, name, text):
    (folder / name).write_text(text)
    with pytest.raises(CheckpointError, match=name):
        read_run(folder)
    if name == "run.json":
        for read in (saved_frame_settings, saved_positions):
            with pytest.raises(CheckpointError, match=name):
                read(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_pipe_is_not_waited_for(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match="is no regular file"):
        read_run(folder)


EVIL = "x](javascript:a) <script>alert(1)</script> `id` $(id)\n# a"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run.json", {"schedule": EVIL}),
        ("run.json", {"learning_rate": [EVIL]}),
        ("results.json", {"benchmark": EVIL, "adapter": RESULTS["adapter"]}),
        ("results.json", {"adapter": {EVIL: {"overall": RESULTS["adapter"]["ordered"]["overall"]}}}),
        ("results.json", {"adapter": {"ordered": {"overall": {"accuracy": EVIL, "low": 0, "high": 1, "total": 1}}}}),
        ("stage1/result.json", {**STAGE, "steps": EVIL}),
        ("stage1/result.json", {**STAGE, "history": [{"loss": EVIL}]}),
        ("stage1/result.json", {**STAGE, "history": EVIL}),
        ("stage1/result.json", {"history": []}),
    ],
)
def test_text_where_numbers_or_words_belong_is_refused(folder, name, content):
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=name):
        read_run(folder)


def test_sentences_are_no_markup(folder):
    write_results(folder, reading=[EVIL, 3, ["x"]])
    text = card(folder)
    assert "<script>" not in text
    assert "](javascript" not in text
    assert "`id`" not in text
    assert "'id' $(id) # a" in text  # on one line
    assert "&lt;script&gt;" in text


def test_a_sentence_word_for_word(tmp_path):
    said = read_results({"reading": ['A](b) `c` d://e\n f & <g> "h"']}, tmp_path)["reading"]
    assert said == ["A] (b) 'c' d: //e f &amp; &lt;g&gt; \"h\""]


def test_a_stage_in_numbers(tmp_path):
    found = read_stage({**STAGE, "more": "x", "history": [{"loss": 2.5, "step": 1}, {"eval_loss": 3}]}, tmp_path)
    assert found == {"trainable_parameters": 13056, "steps": 40, "history": [{"loss": 2.5}]}
    assert read_stage({}, tmp_path) == {}


def test_names_of_a_description_stay_and_need_not_be_there(adapter):
    description = read_description(adapter)
    found = read_about(description)
    same = set(description) - {"encoder", "config"}
    assert {name: found[name] for name in same} == {name: description[name] for name in same}
    assert {name: found["config"][name] for name in description["config"]} == description["config"]
    assert read_about({**description, "backbone": None})["backbone"] == ""
    assert read_about({**description, "config": {}})["config"]["order"] == "after_spatial"
    with pytest.raises(CheckpointError, match=r"sta_config\.json: .*head_scale"):
        read_about({**description, "config": {"head_scale": "<b>"}})


def test_a_run_file_has_a_size(tmp_path):
    path = tmp_path / "run.json"
    for size, reason in ((64 << 20, "as JSON"), ((64 << 20) + 1, "bytes")):
        with path.open("wb") as file:
            file.truncate(size)
        with pytest.raises(CheckpointError, match=reason):
            read_run_file(path)


@pytest.mark.parametrize("fields", [{"sta_adapter_version": EVIL}, {"backbone": EVIL}, {"frames": {"fps": EVIL}}, {"frames": [1]}],
                         ids=["version", "backbone", "frames", "list"])  # fmt: skip
def test_a_description_with_text_of_others_is_not_pushed(folder, fields):
    path = folder / "sta_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    with pytest.raises(CheckpointError):
        push_folder(folder, "user/name", dry_run=True)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["loss", "overall", "accuracy", "fps"]), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
KEYS = [
    "frames",
    "schedule",
    "seed",
    "steps",
    "trainable_parameters",
    "history",
    "adapter",
    "base",
    "reading",
    "benchmark",
]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(FILES), content=st.dictionaries(st.sampled_from(KEYS), JSON, max_size=4))
def test_whatever_stands_in_a_file(folder, name, content):
    """A card or an error of ours, never another one."""
    before = (folder / name).read_bytes()
    (folder / name).write_text(json.dumps(content))
    with contextlib.suppress(CheckpointError):
        card(folder)
    (folder / name).write_bytes(before)
