import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_qwen import make_processor, moving_square, write_video

from sta_adapter.data import FrameSettings, VideoDataset
from sta_adapter.data.bad_sample import BadSample
from sta_adapter.data.conversation import parse_sample
from sta_adapter.data.formats import FORMATS, recognise
from sta_adapter.data.samples import read_samples, scan_samples
from sta_adapter.errors import ConfigError, DataError

HOLDING = {
    "id": "74225",
    "label": "holding potato next to vicks vaporub bottle",
    "template": "Holding [something] next to [something]",
    "placeholders": ["potato", "vicks vaporub bottle"],
}
ROLLING = {"id": "7", "label": "a ball rolling", "template": "[Something] rolling on a flat surface", "placeholders": ["a ball"]}  # fmt: skip
CLASSES = {"Holding something next to something": "0", "Something rolling on a flat surface": "1"}
CHOICE = {"video": "a.mp4", "question": "Which way?", "options": ["left", "right", "up"], "answer": "right"}


def write(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def text_of(message):
    return "".join(part.get("text", f"<{part['type']}>") for part in message["content"])


# ---- Something-Something v2


@pytest.mark.parametrize("format", [None, "ssv2"], ids=["recognised", "named"])
@pytest.mark.parametrize(
    ("split", "labels"),
    [("train.json", "labels.json"), ("something-something-v2-validation.json", "something-something-v2-labels.json")],
    ids=["new_names", "old_names"],
)
def test_official_label_files(tmp_path, format, split, labels):
    videos = tmp_path / "20bn-something-something-v2"
    videos.mkdir()
    write(tmp_path / labels, CLASSES)
    samples = read_samples(write(tmp_path / split, [HOLDING, ROLLING]), format=format, videos=videos)
    first, second = samples
    assert first.messages[0]["content"][0] == {"type": "video", "video": str(videos / "74225.webm")}
    assert text_of(first.messages[0]) == "<video>Which action does the video show? Say 'something' for every object."
    assert [s.answer for s in samples] == [s.category for s in samples] == list(CLASSES)
    assert (first.extra["class"], second.extra["class"]) == (0, 1)
    assert first.extra["placeholders"] == ["potato", "vicks vaporub bottle"]
    assert first.source.endswith(f"{split}, entry 1")


def test_videos_lie_beside_the_file_unless_said_otherwise(tmp_path):
    sample = read_samples(write(tmp_path / "train.json", [HOLDING]))[0]
    assert sample.messages[0]["content"][0]["video"] == str(tmp_path / "74225.webm")
    assert "class" not in sample.extra


def test_webm_clips_are_read(tmp_path):
    write_video(tmp_path / "74225.mp4", moving_square("left")).rename(tmp_path / "74225.webm")
    processor = make_processor(tmp_path / "tokenizer")
    frames = FrameSettings(nframes=4, min_tokens=None, max_tokens=None)
    file = write(tmp_path / "train.json", [HOLDING])
    item = VideoDataset(file, processor, frames=frames, on_bad_sample="error")[0]
    assert item["video_grid_thw"].tolist() == [[2, 4, 4]]


@pytest.mark.parametrize(
    ("name", "content", "format", "error"),
    [
        ("test.json", [{"id": "1"}], None, "a record of no known format. Keys: id. Expected one of: .*ssv2: 'id' and"),
        ("test.json", [{"id": "1"}], "ssv2", "entry 1: no 'template' to learn .the official test.json has none"),
        ("labels.json", CLASSES, None, r"no known format. Keys: Holding something next to something, .*Expected one"),
        ("labels.json", json.dumps(CLASSES, indent=1), None, r"entry 1: a record of no known format"),
        ("train.json", [{**HOLDING, "id": True}], None, "'id' is True, expected the video's number"),
        ("train.json", [{**HOLDING, "template": "[Something] else"}], None, "the class 'Something else' is not among the 2"),
        ("train.json", [ROLLING, 3], None, "train.json, entry 2: found a number, expected an object"),
    ],
    ids=["test", "test_named", "labels", "labels_in_lines", "id", "class", "number"],
)  # fmt: skip
def test_label_files_that_do_not_fit(tmp_path, name, content, format, error):
    write(tmp_path / "labels.json", CLASSES)
    with pytest.raises(DataError, match=error):
        read_samples(write(tmp_path / name, content), format=format)


def test_damaged_class_list(tmp_path):
    write(tmp_path / "labels.json", ["Holding"])
    with pytest.raises(DataError, match=r"labels.json is no list of classes; expected an object of names and numbers"):
        read_samples(write(tmp_path / "train.json", [HOLDING]))


# ---- multiple choice


@pytest.mark.parametrize(
    "answer",
    ["right", "B", "b", "(B)", "B.", "b)", "B. right", "(B) right", 1],
    ids=lambda answer: f"{type(answer).__name__}_{answer}",
)
@pytest.mark.parametrize(
    "options",
    [
        ["left", "right", "up"],
        ["A. left", "B. right", "C. up"],
        ["(A) left", "(B) right", "(C) up"],
        {"A": "left", "B": "right", "C": "up"},
    ],
    ids=["texts", "lettered", "brackets", "object"],
)
def test_ways_of_writing_options_and_answer(answer, options):
    sample = parse_sample({**CHOICE, "options": options, "answer": answer}, folder="/v")
    assert sample.messages[0]["content"][0] == {"type": "video", "video": "/v/a.mp4"}
    assert text_of(sample.messages[0]) == (
        "<video>Which way?\nA. left\nB. right\nC. up\nAnswer with the letter of the right option alone."
    )
    assert (sample.answer, sample.options) == ("B", ["A", "B", "C"])
    assert sample.extra == {"option_texts": ["left", "right", "up"]}


@given(st.lists(st.text("abcdefghij ", min_size=2).filter(lambda t: len(t.strip()) > 1), min_size=2, max_size=26, unique_by=str.strip), st.data())  # fmt: skip
def test_every_option_is_found_by_text_letter_and_index(options, data):
    index = data.draw(st.integers(0, len(options) - 1))
    letter = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[index]
    answers = {
        parse_sample({**CHOICE, "options": options, "answer": a}).answer for a in (options[index], letter, index)
    }
    assert answers == {letter}


def test_fields_beside_the_question():
    record = {
        **{key: value for key, value in CHOICE.items() if key != "options"},
        "candidates": CHOICE["options"],
        "category": "direction",
        "start": 1.5,
        "end": 3,
        "nframes": 8,
        "question_id": 17,
    }
    sample = parse_sample(record, folder="/v")
    part = {"type": "video", "video": "/v/a.mp4", "video_start": 1.5, "video_end": 3, "nframes": 8}
    assert sample.messages[0]["content"][0] == part
    assert (sample.category, sample.extra["question_id"]) == ("direction", 17)


def test_several_clips_and_places_in_the_question():
    videos = {"videos": ["a.mp4", {"video": "b.mp4", "nframes": 4}], "images": ["c.png"]}
    record = {key: value for key, value in {**CHOICE, **videos}.items() if key != "video"}
    assert text_of(parse_sample(record).messages[0]).startswith("<video><video><image>Which way?")
    placed = {**record, "question": "First <video>, then <video>, and <image>?"}
    content = parse_sample(placed, folder="/v").messages[0]["content"]
    assert [part.get(part["type"]) for part in content[:6]] == [
        *("First ", "/v/a.mp4", ", then ", "/v/b.mp4", ", and ", "/v/c.png"),
    ]


@pytest.mark.parametrize("key", ["nframes", "min_frames", "max_frames", "min_pixels", "max_pixels", "fps"])
def test_settings_beside_the_question_are_the_clips(key):
    sample = parse_sample({**CHOICE, key: 4}, folder="/v")
    assert sample.messages[0]["content"][0] == {"type": "video", "video": "/v/a.mp4", key: 4}
    assert sample.extra == {"option_texts": ["left", "right", "up"]}


def test_a_picture_alone():
    record = {**{key: value for key, value in CHOICE.items() if key != "video"}, "image": "c.png"}
    sample = parse_sample(record, folder="/v")
    assert sample.messages[0]["content"][0] == {"type": "image", "image": "/v/c.png"}
    assert sample.extra == {"option_texts": ["left", "right", "up"]}
    sized = parse_sample({**record, "max_pixels": 784}, folder="/v")
    assert sized.messages[0]["content"][0] == {"type": "image", "image": "/v/c.png", "max_pixels": 784}


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"answer": "down"}, r"'answer' is 'down', which is none of the options \['left', 'right', 'up'\]; expected a letter"),
        ({"answer": "D"}, "'answer' is 'D', which is none of the options"),
        ({"answer": 3}, "'answer' is 3, expected a letter up to C, an index from 0 to 2, or an option's text"),
        ({"answer": None}, "'answer' is None, expected a letter"),
        ({"answer": True}, "'answer' is True, expected a letter"),
        ({"answer": "1"}, "'answer' is '1', which is none of the options"),
        ({"options": ["B", "A"], "answer": "A"}, "'answer' is 'A', which could mean several options"),
        ({"options": ["up", "up"], "answer": "up"}, "'answer' is 'up', which could mean several options"),
        ({"options": ["1", "2", "3"], "answer": 2}, r"'answer' is 2, which could mean several options \['1', '2', '3'\]"),
        ({"options": ["up"]}, "expected a list of 2 to 26 texts"),
        ({"options": ["up", 3]}, "expected a list of 2 to 26 texts"),
        ({"options": {"B": "up", "A": "down"}}, "'options' has the keys B, A, expected A, B, ... in order"),
        ({"question": " "}, "'question' is ' ', expected a text"),
        ({"videos": ["b.mp4"]}, "both 'video' and 'videos' are given"),
        ({"video": None, "videoID": "a", "url": "https://a.org/a"}, "there is no 'video' and no 'image' that the question"),
        ({"fps": 0}, "'fps' is 0, expected a positive number"),
    ],
    ids=["other", "letter", "index", "none", "bool", "digit", "letters_as_options", "twice", "index_or_text", "one", "number", "order", "question", "both", "blind", "fps"],
)  # fmt: skip
def test_choices_that_do_not_fit(change, error):
    with pytest.raises(DataError, match=error):
        parse_sample({**CHOICE, **change})


def test_an_index_that_is_its_options_text_too():
    record = {**CHOICE, "options": ["0", "1", "2"], "answer": 1}
    assert parse_sample(record).answer == parse_sample({**record, "answer": "1"}).answer == "B"


# ---- files


@pytest.mark.parametrize("as_array", [True, False], ids=["array", "lines"])
def test_formats_are_told_apart_record_by_record(tmp_path, as_array):
    talk = {
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "ho"}],
        "template": "x",
        "id": 1,
    }
    records = [talk, CHOICE, HOLDING]
    text = json.dumps(records, indent=1) if as_array else "\n".join(map(json.dumps, records))
    assert [s.answer for s in read_samples(write(tmp_path / "data.json", text))] == ["ho", "B", "Holding something next to something"]  # fmt: skip
    assert [recognise(record) for record in records] == list(FORMATS)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    (tmp_path / "data.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(CHOICE).encode())
    assert read_samples(tmp_path / "data.jsonl")[0].answer == "B"


def test_one_record_over_several_lines(tmp_path):
    assert read_samples(write(tmp_path / "data.json", json.dumps(CHOICE, indent=2)))[0].answer == "B"


def test_a_named_format_holds_for_every_record(tmp_path):
    file = write(tmp_path / "data.json", [CHOICE, HOLDING])
    with pytest.raises(DataError, match=r"entry 2: 'question' is None, expected a text"):
        read_samples(file, format="multiple-choice")
    with pytest.raises(ConfigError, match=r"format is 'csv', expected one of conversations, multiple-choice, ssv2"):
        read_samples(file, format="csv")
    with pytest.raises(DataError, match=r"the folder of videos .*nowhere' is not there"):
        read_samples(file, videos=tmp_path / "nowhere")


def test_scan_goes_past_bad_records(tmp_path):
    lines = [json.dumps(CHOICE), "{", json.dumps({**CHOICE, "answer": "Z"}), json.dumps(HOLDING)]
    found = scan_samples(write(tmp_path / "data.jsonl", "\n".join(lines)))
    assert [isinstance(item, BadSample) for item in found] == [False, True, True, False]
    assert found[1].source.endswith("data.jsonl, line 2")
    assert found[1].reason.startswith("not JSON (Expecting property name")
    assert found[2].reason.startswith("'answer' is 'Z', which is none of")
