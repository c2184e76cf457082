"""Samples to other training tools' records and back."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from sta_adapter.cli import cli
from sta_adapter.data.conversation import parse_sample
from sta_adapter.data.samples import read_samples
from sta_adapter.errors import ConfigError, DataError
from sta_adapter.integrations.convert_data import convert_data
from sta_adapter.integrations.records import TOOLS, as_ours, settings_lost, to_record

OTHERS = [tool for tool in TOOLS if tool != "sta-adapter"]
WORDS = st.text("abc é?\n", min_size=1, max_size=8).filter(str.strip)
PATHS = st.sampled_from(["/v/a.mp4", "/v/b c.mp4"])
SETTINGS = st.sampled_from([{}, {"nframes": 4}, {"fps": 2.0, "min_pixels": 64}, {"video_start": 1.0, "video_end": 2.0}])


@st.composite
def records(draw, settings=SETTINGS, pairs=st.booleans()):
    messages = [{"role": "system", "content": [{"type": "text", "text": draw(WORDS)}]}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        parts = [{"type": "video", "video": draw(PATHS), **draw(settings)} for _ in range(draw(st.integers(0, 2)))]
        parts += [{"type": "image", "image": "/v/i.png"}] if draw(st.booleans()) else []
        parts += [{"type": "text", "text": draw(WORDS)}]
        answer = {"role": "assistant", "content": [{"type": "text", "text": draw(WORDS)}]}
        messages += [{"role": "user", "content": parts}, answer | draw(st.sampled_from([{}, {"loss": False}]))]
    return {
        "messages": messages,
        **({"rejected": draw(WORDS)} if draw(pairs) else {}),
        "category": draw(st.sampled_from(["x", None])),
    }


@pytest.mark.parametrize("tool", TOOLS)
@given(data=st.data())
def test_there_and_back(tool, data):
    record = data.draw(records(pairs=st.just(False)) if tool == "axolotl" else records())
    sample = parse_sample(record)
    if settings_lost(sample, tool):
        return
    theirs = json.loads(json.dumps(to_record(sample, tool)))
    again = parse_sample(as_ours(theirs))
    assert [flat(m) for m in again.messages] == [flat(m) for m in sample.messages]
    assert again.extra.get("rejected") == sample.extra.get("rejected")
    assert again.category == sample.category


def flat(message):
    """White space at the ends of a text is lost where a clip stands between; the rest is not."""
    return {
        **message,
        "content": [p | ({"text": p["text"].strip()} if p["type"] == "text" else {}) for p in message["content"]],
    }


@given(record=records(), tool=st.sampled_from(TOOLS))
def test_ours_is_left_as_it_is(record, tool):
    sample = parse_sample(record)
    assert parse_sample(as_ours(record)).messages == sample.messages


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ask(**video):
    return {
        "role": "user",
        "content": [{"type": "video", "video": "a.mp4", **video}, {"type": "text", "text": "What?"}],
    }


SAID = {"role": "assistant", "content": "up"}


def test_each_tools_form(tmp_path):
    source = write(tmp_path / "in.jsonl", {"messages": [ask(), SAID]})
    clip = str(tmp_path / "a.mp4")
    plain = [{"role": "user", "content": "<video>What?"}, SAID]
    text = [{"type": "text", "text": "up"}]
    expected = {
        "ms-swift": {"messages": plain, "videos": [clip]},
        "llamafactory": {"messages": plain, "videos": [clip]},
        "trl": {"messages": [ask(video=clip), {"role": "assistant", "content": text}], "images": []},
        "axolotl": {
            "messages": [
                {"role": "user", "content": [{"type": "video", "path": clip}, {"type": "text", "text": "What?"}]},
                {"role": "assistant", "content": text},
            ]
        },
    }
    for tool in OTHERS:
        done = convert_data(source, tmp_path / f"{tool}.jsonl", to=tool)
        assert (done.samples, done.clips, done.left_out) == (1, 1, {})
        assert json.loads(done.path.read_text()) == expected[tool], tool


def test_fields_of_ones_own_stay_ours(tmp_path):
    choice = {"question": "Which way?", "options": ["left", "up"], "answer": "up", "video": "a.mp4"}
    source = write(tmp_path / "in.jsonl", {**choice, "question_type": "way", "category": "x"})
    done = convert_data(source, tmp_path / "out.jsonl", to="sta-adapter")
    (was,), (now,) = read_samples(source), read_samples(done.path)
    assert (now.extra, now.options, now.category) == (was.extra, was.options, was.category)
    assert now.extra == {"question_type": "way", "option_texts": ["left", "up"]}
    write(source, {"messages": [ask(), SAID], "chat_template_kwargs": {"enable_thinking": False}})
    assert (
        "chat_template_kwargs" not in convert_data(source, done.path, to="sta-adapter", overwrite=True).path.read_text()
    )


def test_pairs(tmp_path):
    source = write(tmp_path / "in.jsonl", {"messages": [ask(), SAID], "rejected": "down"})
    swift = json.loads(convert_data(source, tmp_path / "swift.jsonl", to="ms-swift").path.read_text())
    assert swift["rejected_response"] == "down"
    factory = json.loads(convert_data(source, tmp_path / "lf.jsonl", to="llamafactory").path.read_text())
    assert (factory["chosen"], factory["rejected"]) == (SAID, {"role": "assistant", "content": "down"})
    info = json.loads((tmp_path / "dataset_info.json").read_text())["lf"]
    assert info["ranking"] is True
    assert info["columns"] == {"messages": "messages", "videos": "videos", "chosen": "chosen", "rejected": "rejected"}
    trl = json.loads(convert_data(source, tmp_path / "trl.jsonl", to="trl").path.read_text())
    assert [len(trl[name]) for name in ("prompt", "chosen", "rejected", "images")] == [1, 1, 1, 0]
    answers = [[{"role": "assistant", "content": [{"type": "text", "text": word}]}] for word in ("up", "down")]
    assert [trl["chosen"], trl["rejected"]] == answers
    with pytest.raises(DataError, match=r"in\.jsonl, line 1: axolotl's preference training takes no clips"):
        convert_data(source, tmp_path / "ax.jsonl", to="axolotl")
    write(source, {"messages": [ask(), SAID], "rejected": "down"}, {"messages": [ask(), SAID]})
    with pytest.raises(DataError, match="1 of 2 samples have a 'rejected' answer, expected all or none"):
        convert_data(source, tmp_path / "trl.jsonl", to="trl", overwrite=True)


def test_pairs_of_whole_conversations(tmp_path):
    """As ms-swift also takes them: what is said before the answers stands in both."""
    worse, talk = {"role": "assistant", "content": "down"}, {"messages": [ask(), SAID]}
    source = write(tmp_path / "in.jsonl", {**talk, "rejected_messages": [ask(), worse]})
    done = convert_data(source, tmp_path / "out.jsonl", to="sta-adapter")
    assert json.loads(done.path.read_text())["rejected"] == "down"
    for record, message in (
        ({"rejected_messages": [ask(), SAID, ask(), worse]}, "differs from 'messages' in more than the last answer"),
        ({"rejected_messages": []}, "differs from 'messages' in more than the last answer"),
        ({"rejected": "down", "rejected_videos": ["b.mp4"]}, "gives the worse answer clips of its own"),
    ):
        write(source, {**talk, **record})
        with pytest.raises(DataError, match=message):
            convert_data(source, tmp_path / "out.jsonl", to="sta-adapter", overwrite=True)


def test_what_no_setting_of_a_tool_says_is_to_be_dropped(tmp_path):
    source = write(
        tmp_path / "in.jsonl", {"messages": [ask(), {**SAID, "loss": False}, ask(), SAID], "rejected": "down"}
    )
    for tool in ("trl", "ms-swift", "llamafactory"):  # of a pair the last answer alone counts
        with pytest.raises(DataError, match=r"no place for: loss \(1 samples\)\. Leave it out here with --drop loss\."):
            convert_data(source, tmp_path / "out.jsonl", to=tool)
        assert convert_data(source, tmp_path / f"{tool}.jsonl", to=tool, drop=["loss"]).left_out == {"loss": 1}
    write(source, {"messages": [ask(nframes=4), SAID]})
    with pytest.raises(DataError, match=r"nframes \(1 samples\)\. Leave it out here with --drop nframes\."):
        convert_data(source, tmp_path / "out.jsonl", to="axolotl")


def test_what_would_be_lost_is_an_error(tmp_path):
    source = write(tmp_path / "in.jsonl", {"messages": [ask(nframes=4), {**SAID, "loss": False}, ask(nframes=4), SAID]})
    with pytest.raises(
        DataError, match=r"no place for: loss \(1 samples\), nframes \(1 samples\).*video_maxlen.*--drop loss,nframes"
    ):
        convert_data(source, tmp_path / "lf.jsonl", to="llamafactory")
    assert not (tmp_path / "lf.jsonl").exists()
    done = convert_data(source, tmp_path / "lf.jsonl", to="llamafactory", drop=["loss", "nframes"])
    assert done.left_out == {"loss": 1, "nframes": 1}
    swift = json.loads(convert_data(source, tmp_path / "swift.jsonl", to="ms-swift").path.read_text())
    assert swift["chat_template_kwargs"] == {"nframes": 4}
    trl = json.loads(convert_data(source, tmp_path / "trl.jsonl", to="trl").path.read_text())
    for kept in (swift, trl):
        assert [turn.get("loss") for turn in kept["messages"]] == [None, False, None, None]
    write(source, {"messages": [ask(nframes=4), SAID, ask(nframes=8), SAID]})
    with pytest.raises(DataError, match=r"ms-swift has no place for: nframes \(1 samples\).*FPS_MAX_FRAMES"):
        convert_data(source, tmp_path / "again.jsonl", to="ms-swift")


def test_an_entry_beside_others_in_dataset_info(tmp_path):
    (tmp_path / "dataset_info.json").write_text('{"mine": {"file_name": "mine.json"}}')
    source = write(tmp_path / "in.jsonl", {"messages": [ask(), SAID]})
    convert_data(source, tmp_path / "clips.jsonl", to="llamafactory")
    text = (tmp_path / "dataset_info.json").read_text()
    info = json.loads(text)
    assert text == json.dumps(info, indent=2) + "\n"  # which people read and edit
    assert list(info) == ["mine", "clips"]
    assert info["clips"]["columns"] == {"messages": "messages", "videos": "videos"}
    (tmp_path / "dataset_info.json").write_text("{")
    with pytest.raises(DataError, match=r"dataset_info\.json is not JSON"):
        convert_data(source, tmp_path / "clips.jsonl", to="llamafactory", overwrite=True)
    (tmp_path / "dataset_info.json").write_text("[]")
    with pytest.raises(DataError, match=r"dataset_info\.json holds a list"):
        convert_data(source, tmp_path / "clips.jsonl", to="llamafactory", overwrite=True)


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": "user", "content": "<video>What?"}, SAID], "videos": ["a.mp4"]},
        {"conversations": [{"from": "human", "value": "<video>What?"}, {"from": "gpt", "value": "up"}], "videos": ["a.mp4"]},
        {"query": "<video>What?", "response": "up", "videos": ["a.mp4"]},
        {"instruction": "<video>What?", "input": "", "output": "up", "videos": ["a.mp4"]},
        {"prompt": [ask()], "completion": [SAID]},
        {"messages": [{"role": "user", "content": [{"type": "video", "path": "a.mp4"}, {"type": "text", "text": "What?"}]}, SAID]},
        {"messages": [{"role": "user", "content": [{"type": "video", "url": "a.mp4", "text": None}, {"type": "text", "text": "What?", "video": None}], "loss": None}, SAID]},
    ],
    ids=["messages", "sharegpt", "query", "alpaca", "completion", "path", "nulls"],
)  # fmt: skip
def test_theirs_to_ours(record, tmp_path):
    done = convert_data(write(tmp_path / "in.jsonl", record), tmp_path / "ours.jsonl", to="sta-adapter")
    (sample,) = read_samples(done.path)
    assert sample.messages[0]["content"] == ask(video=str(tmp_path / "a.mp4"))["content"]
    assert sample.answer == "up"


@pytest.mark.parametrize(
    "pair",
    [
        {"messages": [ask(), SAID], "rejected_response": "down"},
        {"messages": [ask()], "chosen": SAID, "rejected": {"role": "assistant", "content": "down"}},
        {"conversations": [{"from": "human", "value": "<video>What?"}], "videos": ["a.mp4"], "chosen": {"from": "gpt", "value": "up"}, "rejected": {"from": "gpt", "value": "down"}},
        {"prompt": [ask()], "chosen": [SAID], "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "down"}]}]},
        {"query": "<video>What?", "response": "up", "rejected_response": "down", "videos": ["a.mp4"]},
    ],
    ids=["ms-swift", "llamafactory", "sharegpt", "trl", "query"],
)  # fmt: skip
def test_their_pairs_to_ours(pair, tmp_path):
    done = convert_data(write(tmp_path / "in.jsonl", pair), tmp_path / "ours.jsonl", to="sta-adapter")
    (sample,) = read_samples(done.path)
    assert (sample.answer, sample.extra["rejected"]) == ("up", "down")


def test_history_comes_before():
    sample = parse_sample(as_ours({"query": "c", "response": "d", "history": [["a", "b"]]}))
    assert [m["content"][0]["text"] for m in sample.messages] == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": [ask(video="https://a.b/c.mp4"), SAID]}, "line 1: video 'https://a.b/c.mp4' is no file; download"),
        ({"messages": [ask(), SAID], "rejected": ""}, "line 1: 'rejected' is '', expected one answer"),
        ({"messages": [ask(), SAID], "rejected": [SAID, SAID]}, "line 1: 'rejected' is .*expected one answer"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "line 1: message 0 has the role 'tool'"),
        ({"text": "x"}, "line 1: a record of no known format"),
        ({"query": "c", "response": "d", "history": [["a"]]}, "line 1: 'history' is .*expected a list of pairs"),
        ({"query": "c", "response": "d", "history": "ab"}, "line 1: 'history' is 'ab', expected a list of pairs"),
        (["x"], "entry 1: found a text, expected an object"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "say <video>"}]}, SAID]}, "line 1: a text contains <video>"),
    ],
    ids=["url", "empty", "two", "role", "unknown", "half", "words", "list", "tag"],
)  # fmt: skip
def test_records_that_are_none(record, message, tmp_path):
    with pytest.raises(DataError, match=message):
        convert_data(write(tmp_path / "in.jsonl", record), tmp_path / "out.jsonl", to="ms-swift")
    assert not (tmp_path / "out.jsonl").exists()


def test_files_that_are_none(tmp_path):
    with pytest.raises(ConfigError, match="to='xtuner': expected one of ms-swift"):
        convert_data(tmp_path / "in.jsonl", tmp_path / "out.jsonl", to="xtuner")
    with pytest.raises(DataError, match=r"can't read the data file .*gone\.jsonl"):
        convert_data(tmp_path / "gone.jsonl", tmp_path / "out.jsonl", to="trl")
    with pytest.raises(DataError, match="shards hold their clips inside"):
        convert_data(tmp_path / "a.tar", tmp_path / "out.jsonl", to="trl")
    (tmp_path / "in.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no sample in it"):
        convert_data(tmp_path / "in.jsonl", tmp_path / "out.jsonl", to="trl")
    (tmp_path / "in.jsonl").write_text("{\n")
    with pytest.raises(DataError, match="line 1: not JSON"):
        convert_data(tmp_path / "in.jsonl", tmp_path / "out.jsonl", to="trl")


def test_the_command(tmp_path):
    source = write(tmp_path / "in.jsonl", {"messages": [ask(nframes=4), SAID]})
    out = str(tmp_path / "lf.jsonl")
    done = CliRunner().invoke(cli, ["convert-data", str(source), out, "--to", "llamafactory", "--drop", "nframes, fps"])
    assert done.exit_code == 0, done.output
    assert done.output == f"wrote {out}: 1 samples with 1 clips and images\nleft out: nframes (1 samples)\n"
    done = CliRunner().invoke(cli, ["convert-data", str(source), out, "--to", "llamafactory", "--overwrite"])
    assert isinstance(done.exception, DataError)


def test_path_names_the_plug_in():
    done = CliRunner().invoke(cli, ["path", "ms-swift"])
    file = Path(done.output.strip())
    assert "import sta_adapter.integrations.ms_swift" in file.read_text()
    beside = {path.stem for path in file.parent.iterdir()}  # ms-swift puts this folder in front of Python's path
    assert not beside & {"trl", "peft", "swift", "axolotl", "llamafactory", "transformers"}


@pytest.mark.parametrize("name", ["in.jsonl", "lf.jsonl"])
def test_no_file_is_replaced_without_being_told(tmp_path, name):
    source = write(tmp_path / "in.jsonl", {"messages": [ask(), SAID]})
    (tmp_path / "lf.jsonl").write_text("mine")
    before = (tmp_path / name).read_bytes()
    words = ["convert-data", str(source), str(tmp_path / name), "--to", "llamafactory"]
    assert f"holds {name}, which would be lost" in str(CliRunner().invoke(cli, words).exception)
    assert (tmp_path / name).read_bytes() == before
    assert not (tmp_path / "dataset_info.json").exists()
    CliRunner().invoke(cli, [*words, "--overwrite"], catch_exceptions=False)
    assert (tmp_path / name).read_bytes() != before
