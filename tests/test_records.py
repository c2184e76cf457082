"""What people have: records of other tools, tables, and files with something wrong in them. Nothing in them is left out silently."""

import json
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sta_adapter.data.bad_sample import BadSample
from sta_adapter.data.conversation import parse_sample
from sta_adapter.data.samples import read_samples, scan_samples
from sta_adapter.errors import DataError

ANSWER = {"role": "assistant", "content": "It falls."}
TALK = {"messages": [{"role": "user", "content": "What happens?"}, ANSWER]}
ASKED = {"messages": [{"role": "user", "content": "<video>What happens?"}, ANSWER]}
QUESTION = {"video": "a.mp4", "question": "What happens?", "answer": "It falls."}
CHOICE = {"video": "a.mp4", "question": "Which?", "options": ["left", "right"], "answer": "right"}
SSV2 = {"id": 7, "template": "Holding [something]"}


def llava(text, **beside):
    return {
        "id": "x1",
        "conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "It falls."}],
        **beside,
    }


def parts(sample):
    return [(part["type"], part[part["type"]]) for part in sample.messages[0]["content"]]


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


# ---- records of other tools


@pytest.mark.parametrize(
    "record",
    [
        llava("<video>\nWhat happens?", video="a.mp4"),
        llava("<image>\nWhat happens?", video="a.mp4"),  # as LLaVA-Video's files have it
        llava("<video>\nWhat happens?", video=["a.mp4"]),
        llava("<image>\nWhat happens?", video="a.mp4", system=None, image=None, videos=None),
        {**ASKED, "video": "a.mp4"},
        QUESTION,
        {**QUESTION, "question": "<video> What happens?"},
    ],
    ids=["llava", "llava_image_token", "list", "nulls", "messages", "question", "question_with_a_place"],
)
def test_a_clip_beside_the_words(record):
    sample = parse_sample(record, folder="/v")
    assert parts(sample)[0] == ("video", "/v/a.mp4")
    assert "".join(text for kind, text in parts(sample)[1:]).strip() == "What happens?"
    assert len(sample.messages[0]["content"]) == 2
    assert sample.answer == "It falls."


@pytest.mark.parametrize(
    "record",
    [
        {**QUESTION, "video": Path("a.mp4")},
        {**QUESTION, "video": Path("a.mp4"), "fps": 2},
        {**ASKED, "videos": [Path("a.mp4")]},
        {"messages": [{"role": "user", "content": [{"type": "video", "video": Path("a.mp4")}]}, ANSWER]},
        {**QUESTION, "video": [Path("a.mp4"), "b.png"], "folder_fps": 2},
    ],
    ids=["question", "settings", "videos", "part", "pictures"],
)
def test_a_path_of_pathlib_is_one(record):
    found = parse_sample(record, folder="/v").visuals[0]["video"]
    assert found in ("/v/a.mp4", ["/v/a.mp4", "/v/b.png"])


def test_a_picture_beside_the_words():
    sample = parse_sample(llava("<image>\nWhat?", image="a.png", max_pixels=64), folder="/v")
    assert sample.messages[0]["content"][0] == {"type": "image", "image": "/v/a.png", "max_pixels": 64}
    both = parse_sample(llava("<image>, then <video>: what?", image="a.png", video="b.mp4"), folder="/v")
    assert [part for part in parts(both) if part[0] != "text"] == [("image", "/v/a.png"), ("video", "/v/b.mp4")]


@pytest.mark.parametrize(
    "record", [QUESTION, {**ASKED, "video": "a.mp4"}, CHOICE], ids=["question", "messages", "choice"]
)
def test_settings_beside_a_single_clip_are_its(record):
    sample = parse_sample({**record, "fps": 2, "max_frames": 8, "start": 1, "end": 2.5}, folder="/v")
    expected = {"fps": 2, "max_frames": 8, "video_start": 1, "video_end": 2.5}
    assert sample.messages[0]["content"][0] == {"type": "video", "video": "/v/a.mp4", **expected}


def test_what_is_beside_the_question_is_kept():
    record = {**QUESTION, "question_id": 3, "duration": 9.5, "category": "falling", "system": "Be brief.", "answer": 4}
    sample = parse_sample(record)
    assert (sample.answer, sample.category, sample.options) == ("4", "falling", None)
    assert sample.extra == {"question_id": 3, "duration": 9.5}
    assert sample.messages[0] == {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}


@pytest.mark.parametrize(
    "columns",
    [{"choices": ["left", "right"]}, {"A": "left", "B": "right"}, {"a0": "left", "a1": "right"}],
    ids=["choices", "letters", "numbers"],
)
def test_other_names_of_the_options(columns):
    record = {**{key: value for key, value in CHOICE.items() if key != "options"}, **columns}
    assert parse_sample(record) == parse_sample(CHOICE)


@pytest.mark.parametrize("word", ["<image>", "<video>"])
def test_places_in_an_answer_are_words(word):
    turns = [{"from": "human", "value": "<image>\nWhich tag?"}, {"from": "gpt", "value": f"The {word} tag."}]
    sample = parse_sample({"video": "a.mp4", "conversations": turns})
    assert sample.answer == f"The {word} tag."
    assert [part["type"] for part in sample.messages[0]["content"]] == ["video", "text"]


def test_words_about_a_place_stay_words_beside_a_clip():
    asked = [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "Is a <video> tag shown?"}]
    assert (
        parts(parse_sample({"messages": [{"role": "user", "content": asked}, ANSWER]}))[1][1]
        == "Is a <video> tag shown?"
    )


def test_an_index_in_a_table_of_numbered_options(tmp_path):
    rows = "video,question,answer,a0,a1,a2\na.mp4,Which?,2,left,right,up\na.mp4,How many?,1,0,1,2\na.mp4,How many?,1,1,2,3\n"
    right, same, doubtful = scan_samples(write(tmp_path / "nextqa.csv", rows))
    assert (right.answer, same.answer) == ("C", "B")
    assert "could mean several options" in doubtful.reason


def test_a_clip_in_an_answer_that_is_not_learned():
    shown = {
        "role": "assistant",
        "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "Here."}],
        "loss": False,
    }
    sample = parse_sample({"messages": [TALK["messages"][0], shown, *TALK["messages"]]}, folder="/v")
    assert sample.messages[1]["content"][0] == {"type": "image", "image": "/v/a.png"}


# ---- nothing without effect

REFUSED = {
    "clip_without_place": ({**TALK, "video": "a.mp4"}, r"'video' holds 1 more than there are <video> in the text"),
    "picture_without_place": ({**TALK, "image": "a.png"}, r"'image' holds 1 more than there are <image> in the text"),
    "clips_without_place": ({**TALK, "videos": ["a.mp4"]}, r"'videos' holds 1 more than there are <video>"),
    "llava_too_few": (llava("<image>What?", video=["a.mp4", "b.mp4"]), "'video' holds 1 more than there are <video>"),
    "both": ({**ASKED, "video": "a.mp4", "videos": ["b.mp4"]}, "both 'video' and 'videos' are given"),
    "path": ({**TALK, "video_path": "a.mp4"}, "unknown key 'video_path'. Did you mean 'video'"),
    "url": ({**TALK, "image_url": "a.png"}, "unknown key 'image_url'. Did you mean 'image'"),
    "clip": ({**TALK, "clip": "a.mp4"}, "unknown key 'clip'. Did you mean 'video'"),
    "capitals": ({**TALK, "Videos": ["a.mp4"]}, "unknown key 'Videos'. Did you mean 'video"),
    "misspelt": ({**TALK, "vidoes": ["a.mp4"]}, "unknown key 'vidoes'. Did you mean 'videos'"),
    "system": ({**TALK, "sytem": "Be brief."}, "unknown key 'sytem'. Did you mean 'system'"),
    "system prompt": ({**TALK, "system_prompt": "Be brief."}, "unknown key 'system_prompt'. Did you mean 'system'"),
    "range": ({**TALK, "time_range": [1, 2]}, "unknown key 'time_range'. Did you mean 'video_start'"),
    "category": ({**TALK, "catgory": "x"}, "unknown key 'catgory'. Did you mean 'category'"),
    "option": ({**QUESTION, "option": ["left", "right"]}, "unknown key 'option'. Did you mean 'options'"),
    "audio": ({**TALK, "audios": ["a.wav"]}, "'audios' is not read"),
    "subtitle": ({**TALK, "subtitle": "Hi!"}, "'subtitle' is not read"),
    "rate_without_clip": ({**TALK, "fps": 2}, "'fps' beside the words belongs to no single 'video'"),
    "rate_of_several": ({**TALK, "videos": ["a.mp4", "b.mp4"], "nframes": 2}, "'nframes' beside the words belongs to no"),
    "start_of_several": ({**CHOICE, "video": ["a.mp4", "b.mp4"], "start": 2}, "'start' beside the words belongs to no"),
    "start_time": ({**QUESTION, "start_time": 2}, "unknown key 'start_time'. Did you mean 'video_start'"),
    "num_frames": ({**QUESTION, "num_frames": 2}, "unknown key 'num_frames'. Did you mean 'nframes'"),
    "start_frame": ({**QUESTION, "start_frame": 20}, "unknown key 'start_frame'. Did you mean 'video_start'"),
    "stop_timestamp": ({**QUESTION, "stop_timestamp": "0:04"}, "unknown key 'stop_timestamp'. Did you mean 'video_end'"),
    "end_in_milliseconds": ({**QUESTION, "clip_end_ms": 9}, "unknown key 'clip_end_ms'. Did you mean 'video_end'"),
    "time_start": ({**QUESTION, "time_start": 2}, "unknown key 'time_start'. Did you mean 'video_start'"),
    "rate_of_ms_swift": ({**QUESTION, "sample_fps": 2}, "unknown key 'sample_fps'. Did you mean 'fps'"),
    "most_frames_of_qwen": ({**QUESTION, "fps_max_frames": 2}, "unknown key 'fps_max_frames'. Did you mean 'max_frames'"),
    "most_frames_of_llamafactory": ({**QUESTION, "video_maxlen": 2}, "unknown key 'video_maxlen'. Did you mean 'max_frames'"),
    "pixels_of_llamafactory": ({**QUESTION, "video_max_pixels": 9}, "unknown key 'video_max_pixels'. Did you mean 'max_pixels'"),
    "pixels_of_qwen": ({**QUESTION, "total_pixels": 9}, "'total_pixels' is not read"),
    "size_of_qwen": ({**QUESTION, "resized_height": 28, "resized_width": 28}, "'resized_height' is not read"),
    "answers_not_learned": ({**TALK, "loss_mask": [0, 0]}, "'loss_mask' is not read"),
    "options_of_egoschema": ({**QUESTION, "option 0": "x", "option 1": "y"}, "unknown key 'option 0'. Did you mean 'options'"),
    "options_in_columns": ({**QUESTION, "choice_a": "x", "choice_b": "y"}, "unknown key 'choice_a'. Did you mean 'options'"),
    "two_starts": ({**QUESTION, "start": 2, "video_start": 2}, "both 'start' and 'video_start' are given"),
    "rate_of_a_picture": (llava("<image>?", image="a.png", fps=2), r"\(image\) has the unknown key 'fps'"),
    "two_talks": ({**TALK, "conversations": TALK["messages"]}, "both 'messages' and 'conversations' are given"),
    "question_beside": ({**TALK, "question": "Which?"}, "'question' has no effect in a record of this format"),
    "two_options": ({**CHOICE, "candidates": ["a", "b"]}, "'options' and 'candidates' are given, expected one"),
    "no_clip": ({"question": "What?", "answer": "x"}, "there is no 'video' and no 'image'"),
    "ssv2_clip": ({**SSV2, "video": "a.mp4"}, "names its clip by its 'id' alone"),
    "ssv2_category": ({**SSV2, "category": "x"}, "'category' has no effect in a record of this format"),
    "in_a_message": ({"messages": [{"role": "user", "content": "?", "video": "a.mp4"}, ANSWER]}, "message 0 has the unknown key 'video'. Known: role"),
    "in_an_answer": ({"messages": [TALK["messages"][0], {**ANSWER, "weight": 0}]}, "message 1 has the unknown key 'weight'"),
    "two_roles": ({"messages": [{"role": "user", "from": "gpt", "content": "?"}, ANSWER]}, "message 0 has both 'role' and 'from'"),
    "two_contents": ({"messages": [{"role": "user", "value": "?", "content": "?"}, ANSWER]}, "has both 'content' and 'value'"),
    "idle_limit": ({**QUESTION, "nframes": 8, "max_frames": 4}, "gives 'nframes', beside which 'max_frames' has no effect"),
    "limits": ({**QUESTION, "min_pixels": 80, "max_pixels": 40}, "'min_pixels' is above 'max_pixels'"),
    "kinds": ({**ASKED, "videos": [{"type": "image", "image": "a.png"}]}, "a <video> for which 'videos' holds a part of type 'image'"),
    "place_alone": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "<image>What is it?"}, {"type": "video", "video": "a.mp4"}]}, ANSWER]}, "a text contains <image> and no part is of type image, expected one with the path"),
    "place_beside": ({"messages": [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "<video>\nWhat?"}]}, ANSWER]}, "a text has <video> as if it stood for a part"),
    "place_behind": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "What?\n<image>"}, {"type": "image", "image": "a.png"}]}, ANSWER]}, "a text has <image> as if it stood for a part, and the parts are there by themselves"),
    "place_of_qwen_vl": ({"messages": [{"role": "user", "content": "Picture 1: <img>a.png</img>\nWhat is it?"}, ANSWER]}, "a text contains <img>a.png</img> and no part is of type image"),
    "place_of_videochat": ({"messages": [{"role": "user", "content": "<Video><VideoHere></Video> What is it?"}, ANSWER]}, "a text contains <Video> and no part is of type video"),
    "place_in_capitals": ({"messages": [{"role": "user", "content": "<IMAGE>What is it?"}, ANSWER]}, "a text contains <IMAGE> and no part is of type image"),
    "preferred": ({**TALK, "rejected_response": "It flies."}, "'rejected_response' is not read"),
    "preference": ({"messages": TALK["messages"][:1], "chosen": ANSWER, "rejected": ANSWER}, "'chosen' is not read"),
    "no_good_answer": ({**TALK, "label": False}, "'label' is not read"),
    "shown_in_an_answer": ({"messages": [*TALK["messages"][:1], {"role": "assistant", "content": [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "It falls."}]}]}, "message 1 is an answer with a video in it, expected words"),
    "begins_with_an_answer": ({"messages": [ANSWER, *TALK["messages"]]}, "message 0 is an answer, expected a question before it"),
    "web": ({**QUESTION, "video": "https://example.org/a.mp4"}, "'https://example.org/a.mp4' is an address, expected a file"),
    "pictures_of_an_unknown_rate": ({**TALK, "messages": [{"role": "user", "content": "<video>?"}, ANSWER], "videos": [["a.png", "b.png"]]}, "'video' is a list of pictures, which needs 'folder_fps'"),
    "pictures_from_the_web": ({**QUESTION, "video": ["a.png", "https://example.org/b.png"], "folder_fps": 2}, "b.png' is an address, expected a file"),
    "pictures_without_a_name": ({**QUESTION, "video": ["a.png", ""], "folder_fps": 2}, "'video' is empty, expected a path"),
    "bytes": ({**QUESTION, "video": None, "image": "data:image/png;base64,iVBORw0KGgo="}, "is an address, expected a file"),
    "gap_in_options": ({**QUESTION, "answer": "A", "A": "left", "B": "right", "D": "up"}, "the options A, B are followed by D, expected C"),
    "option_texts": ({**TALK, "options": ["It falls.", "No."], "option_texts": ["a", 3]}, "'option_texts' is .*, expected a list"),
    "option_count": ({**TALK, "options": ["It falls.", "No."], "option_texts": ["a", "b", "c"]}, "'option_texts' holds 3 texts"),
}  # fmt: skip


@pytest.mark.parametrize(("record", "error"), REFUSED.values(), ids=REFUSED)
def test_a_key_that_would_have_no_effect_is_refused(record, error):
    with pytest.raises(DataError, match=error):
        parse_sample(record, folder="/v")


@pytest.mark.parametrize("key", ["id", "source", "video_id", "image_id", "question_type", "video_length", "label", "split", "duration", "data_source", "answer_index", "timestamps", "fps_of_the_file", "start_word", "frames_seen", "end_of_story", "option_count"])  # fmt: skip
def test_a_field_of_ones_own_is_kept_to_group_by(key):
    assert parse_sample({**TALK, key: "x"}).extra == {key: "x"}


# ---- wrong types and depths

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
deep = json.loads("[" * 300 + "]" * 300)


@settings(max_examples=300)
@given(st.sampled_from([TALK, ASKED, QUESTION, CHOICE, SSV2, llava("<video>?", video="a.mp4")]), st.data())
def test_any_value_in_any_place_is_a_sample_or_a_bad_one(record, data):
    record = json.loads(json.dumps(record))
    place = record
    while True:
        key = data.draw(st.sampled_from(list(place) if isinstance(place, dict) else range(len(place))))
        if not isinstance(place[key], (dict, list)) or data.draw(st.booleans()):
            place[key] = data.draw(json_values | st.just(deep))
            break
        place = place[key]
    assert outcome(record)


def outcome(record):
    """A sample; or the error's words, which name the place and are of bearable length."""
    try:
        return parse_sample(record, source="here").messages
    except DataError as error:
        return str(error).startswith("here: ") and len(str(error)) < 3000


@settings(max_examples=200)
@given(
    st.dictionaries(
        st.sampled_from([*QUESTION, *CHOICE, *TALK, *SSV2, "videos", "fps", "category", "system"]), json_values
    )
)
@example({"messages": [{"role": ["user"], "content": "x"}]})
@example({"messages": [{"role": "user", "content": [{"type": ["video"]}]}, ANSWER]})
@example({**QUESTION, "fps": float("nan")})
@example({**QUESTION, "nframes": 10**400})
@example({**QUESTION, "category": deep})
def test_any_record_is_a_sample_or_a_bad_one(record):
    assert outcome(record)


@pytest.mark.parametrize("key", ["fps", "video_start", "nframes", "max_pixels"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1, 10**400, True, "2", [2]], ids=repr)
def test_numbers_that_are_none(key, value):
    with pytest.raises(DataError, match=rf"'{key}' is .*expected a positive"):
        parse_sample({**QUESTION, key: value})


BAD_LINES = {
    "deep": ("[" * 100_000, r"nested too deeply"),
    "deep_object": ('{"a":' * 100_000, r"nested too deeply"),
    "digits": ('{"messages": ' + "9" * 5000 + "}", r"not JSON that can be read|'messages' is a number"),
    "twice": ('{"video": "a.mp4", "video": "b.mp4"}', "the key 'video' stands there twice"),
    "half": ('{"video": ', r"not JSON \(Expecting value at column 11\); expected one object"),
    "infinite": (json.dumps({**QUESTION, "fps": float("inf")}), "'fps' is inf, expected a positive number"),
    "a_number": ("3", "found a number, expected an object"),
}  # fmt: skip


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_one_bad_sample(tmp_path, line, reason):
    file = write(tmp_path / "d.jsonl", "\n".join([json.dumps(QUESTION), line, json.dumps(QUESTION)]))
    first, bad, last = scan_samples(file)
    assert isinstance(bad, BadSample)
    assert bad.source.endswith("d.jsonl, line 2")
    with pytest.raises(DataError, match=reason):
        raise DataError(bad.reason)
    assert first.messages == last.messages


@pytest.mark.parametrize("text", ["[" * 100_000, '[{"a": 1, "a": 2}]'], ids=["deep", "twice"])
def test_a_bad_array_is_no_data(tmp_path, text):
    with pytest.raises(DataError, match=r"d\.json: not JSON that can be read \("):
        scan_samples(write(tmp_path / "d.json", text))


# ---- tables


def test_rows_are_records(tmp_path):
    table = 'video,question,answer,fps,start,id\na.mp4,"What, then?","It ""falls"".",2,,7\n\nb.mp4,"Two\nlines?",4,0.5,1.5,007\n'
    first, second = read_samples(write(tmp_path / "d.csv", "\ufeff" + table))
    assert first.messages == parse_sample({**QUESTION, "question": "What, then?", "answer": 'It "falls".', "fps": 2}, folder=tmp_path).messages  # fmt: skip
    assert second.messages[0]["content"][0] == {"type": "video", "video": str(tmp_path / "b.mp4"), "fps": 0.5, "video_start": 1.5}  # fmt: skip
    assert (second.messages[0]["content"][1]["text"], second.answer) == ("Two\nlines?", "4")
    assert [sample.extra for sample in (first, second)] == [{"id": "7"}, {"id": "007"}]
    assert [sample.source.rsplit(", ")[1] for sample in (first, second)] == ["line 2", "line 4"]


def test_tables_of_options_and_of_talk(tmp_path):
    rows = [["video", "question", "A", "B", "answer"], ["a.mp4", "Which?", "left", "right", "right"]]
    tabs = write(tmp_path / "d.tsv", "\n".join("\t".join(row) for row in rows))
    assert read_samples(tabs)[0].messages == parse_sample(CHOICE, folder=tmp_path).messages
    quoted = json.dumps(CHOICE["options"]).replace('"', '""')
    listed = write(tmp_path / "d.csv", f'video,question,options,answer\na.mp4,Which?,"{quoted}",B\n')
    assert read_samples(listed)[0].messages == parse_sample(CHOICE, folder=tmp_path).messages
    quoted = json.dumps(ASKED["messages"]).replace('"', '""')
    talk = write(tmp_path / "talk.csv", f'video,messages\na.mp4,"{quoted}"\n')
    assert read_samples(talk)[0].answer == "It falls."


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("a.mp4,What?", "2 cells, expected 4: video, question, answer, fps"),
        ("a.mp4,What?,x,2,3", "5 cells, expected 4"),
        ("a.mp4,What?,x,fast", "'fps' is 'fast', expected a number"),
        ("a.mp4,What?,,2", "a record of no known format. Keys: video, question, fps"),
        (",What?,x,", "there is no 'video' and no 'image'"),
        ('a.mp4,"What?,x,2', r"no row of a table \(unexpected end of data\)"),
        ("a.mp4," + "x" * 200_000 + ",x,2", "field larger than field limit"),
    ],
    ids=["few", "many", "number", "no_answer", "no_clip", "open_quote", "huge"],
)
def test_bad_rows_are_bad_samples(tmp_path, row, reason):
    found = scan_samples(write(tmp_path / "d.csv", f"video,question,answer,fps\na.mp4,What?,x,2\n{row}\n"))
    assert [isinstance(item, BadSample) for item in found] == [False, True]
    assert reason.replace("\\", "") in found[1].reason
    assert found[1].source.endswith("d.csv, line 3")


@pytest.mark.parametrize("text", ["video,,answer\n", "video,video\n", ""], ids=["no_name", "twice", "empty"])
def test_files_that_are_no_tables(tmp_path, text):
    with pytest.raises(DataError, match=r"expected a name for each column|no sample in it"):
        scan_samples(write(tmp_path / "d.csv", text))
