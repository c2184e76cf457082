"""Benchmarks from tiny copies in their published layouts."""

import json

import make_benchmarks as make
import numpy as np
import pytest

from sta_adapter import STAConfig, inject_sta
from sta_adapter.data import FrameSettings, VideoDataset
from sta_adapter.demo import TINY_BASE
from sta_adapter.errors import ConfigError, DataError, MissingExtraError, VideoError
from sta_adapter.evaluation import BENCHMARKS, evaluate, load_benchmark
from sta_adapter.evaluation.benchmarks.base import read_annotations
from sta_adapter.evaluation.option_matching import named_option
from sta_adapter.loading import load_model, load_processor
from sta_adapter.video import read_folder

AS_IS = FrameSettings(nframes=4, min_tokens=None, max_tokens=None)
PARQUET = ("hub", "videomme")


def copy_of(name, folder, layout=None):
    if layout in PARQUET or name == "videomme":
        pytest.importorskip("pyarrow")
    build = getattr(make, name.replace("-", "_"))
    return build(folder / name, *([layout] if layout else []))


LAYOUTS = [
    ("mvbench", "first"), ("mvbench", "segments"), ("vitatecs", "repository"), ("vitatecs", "hub"),
    ("tempcompass", "repository"), ("tempcompass", "hub"), ("videomme", None), ("ssv2-t10", None),
]  # fmt: skip


@pytest.fixture(scope="module")
def tiny():
    model = load_model(TINY_BASE, device="cpu")
    inject_sta(model, STAConfig())
    return model, load_processor(TINY_BASE)


@pytest.mark.parametrize(("name", "layout"), LAYOUTS, ids=["-".join(filter(None, pair)) for pair in LAYOUTS])
def test_every_layout_is_asked(tiny, tmp_path, name, layout):
    model, processor = tiny
    found = load_benchmark(name, copy_of(name, tmp_path, layout))
    dataset = VideoDataset(found.samples, processor, frames=AS_IS, on_bad_sample="error")
    result = evaluate(model, dataset, choose="generate", max_new_tokens=3)
    assert len(result.predictions) == len(found.samples) > 1
    assert set(result.categories) == {sample.category for sample in found.samples}
    for sample in found.samples:
        texts, right = sample.extra["option_texts"], sample.options.index(sample.answer)
        for said in (sample.answer, *texts[right : right + 1]):
            assert named_option(said, sample.options, texts) == right


def test_mvbench_seconds_pictures_and_missing_clips(tiny, tmp_path):
    found = load_benchmark("mvbench", copy_of("mvbench", tmp_path, "first"))
    samples = {sample.category: sample for sample in found.samples}
    assert list(samples) == ["action_antonym", "action_sequence", "episodic_reasoning"]
    clip, text = samples["action_sequence"].prompt[0]["content"]
    assert (clip["video_start"], clip["video_end"]) == (2.0, 5.0)
    assert text["text"] == (
        "Question:What came first?\nOption:\n(A) Sat down.\n(B) Stood up.\n(C) Left.\nOnly give the best option.\n"
    )
    assert samples["action_sequence"].answer == "B"
    assert samples["action_antonym"].prompt[0]["content"][0]["video"].endswith("7.mp4")
    assert (
        found.notes[0] == "fine_grained_pose: 2 questions left out, as there is no folder nturgbd or nturgbd_convert."
    )
    assert found.notes[1].startswith("No annotations of action_count, action_localization, ")
    dataset = VideoDataset(found.samples, tiny[1], frames=AS_IS, on_bad_sample="error")
    grey = {s.category: dataset.encoder.visuals(s.prompt, 0)[0][0].pixels[:, 0, 0, 0] for s in found.samples}
    assert np.abs(grey["action_sequence"].astype(int) - [40, 40, 60, 80]).max() < 6  # seconds 2 to 5
    assert grey["episodic_reasoning"].tolist() == [30, 40, 60, 70]  # six pictures: those of seconds 1 and 2


def test_clips_cut_already_have_no_seconds(tmp_path):
    found = load_benchmark("mvbench", copy_of("mvbench", tmp_path, "segments"))
    assert all(set(s.prompt[0]["content"][0]) == {"type", "video"} for s in found.samples)


@pytest.mark.parametrize("layout", ["first", "segments"])
def test_clips_of_mvbench_that_were_added_later_are_found_beside_the_others(tmp_path, layout):
    """data0613.zip holds clips that the archives of star and clevrer have not, in folders of the same names."""
    folder = copy_of("mvbench", tmp_path, layout)
    file = folder / "json/action_sequence.json"
    row = json.loads(file.read_text())[0]
    make.write_json(file, [row, {**row, "video": "B2.mp4"}, {**row, "video": "gone.mp4"}])
    videos, star = (folder / "video", "Charades_v1_480") if layout == "first" else (folder, "Charades_segment")
    added = make.clip(videos / "data0613/star" / star / "B2.mp4", seconds=6)
    found = [
        s.prompt[0]["content"][0] for s in load_benchmark("mvbench", folder).samples if s.category == "action_sequence"
    ]
    clips = [part["video"] for part in found]
    assert clips == [
        str(path) for path in (videos / "star" / star / "A1.mp4", added, videos / "star" / star / "gone.mp4")
    ]
    assert all(("video_end" in part) == (layout == "first") for part in found)


def test_vitatecs_has_the_true_caption_as_answer(tmp_path):
    for sample in load_benchmark("vitatecs", copy_of("vitatecs", tmp_path, "repository")).samples:
        right = sample.extra["option_texts"][sample.options.index(sample.answer)]
        side = "left" if "MSRVTT" in sample.prompt[0]["content"][0]["video"] else "right"
        assert right == f"A man moves to the {side}."
        assert f"({sample.answer}) {right}" in sample.prompt[0]["content"][1]["text"]


def test_vitatecs_draws_the_right_letter_of_each_pair_as_published(tmp_path):
    """By a seed made of the captions' characters, so that every copy of the benchmark asks alike."""
    folder = copy_of("vitatecs", tmp_path, "repository")
    file = folder / "data/Direction.jsonl"
    row = json.loads(file.read_text().splitlines()[0])
    pairs = [("a man moves to the left", "a man moves to the right"), ("b", "c"), ("c", "b")]
    rows = [{**row, "caption": true, "counterfactual": false} for true, false in pairs]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [s for s in load_benchmark("vitatecs", folder).samples if s.category == "Direction"]
    assert [s.answer for s in found] == ["A", "B", "B"]
    assert [s.extra["option_texts"] for s in found[1:]] == [["C.", "B."], ["B.", "C."]]


def test_tempcompass_leaves_captioning_to_a_judge(tmp_path):
    found = load_benchmark("tempcompass", copy_of("tempcompass", tmp_path, "repository"))
    assert found.notes == ["captioning: 2 questions left out, as scoring them takes a language model as judge."]
    first = {sample.extra["kind"]: sample for sample in found.samples if sample.extra["aspect"] == "direction"}
    assert first["multi-choice"].options == ["A", "B", "C"]
    assert first["caption_matching"].options == ["Option 1", "Option 2"]
    assert first["caption_matching"].answer == "Option 2"
    assert first["yes_no"].answer == "yes"
    assert first["yes_no"].category == "yes_no: direction"


def test_videomme_keeps_its_groups(tmp_path):
    found = load_benchmark("videomme", copy_of("videomme", tmp_path))
    assert {s.category for s in found.samples} == {"Temporal Reasoning", "Action Recognition"}
    assert {s.extra["duration"] for s in found.samples} == {"short", "long"}
    assert found.samples[1].extra["option_texts"] == ["Left.", "Right.", "Up.", "Down."]
    assert found.notes == ["Asked without subtitles."]
    assert found.samples[1].prompt[0]["content"][1]["text"].splitlines()[1:] == [
        *("Which way?", "A. Left.", "B. Right.", "C. Up.", "D. Down.", "The best answer is:")
    ]


@pytest.mark.parametrize("answer", ["E", "AB", "a"])
def test_videomme_has_one_letter_as_answer_and_clips_in_videos(tmp_path, answer):
    folder = copy_of("videomme", tmp_path)
    (folder / "data").rename(folder / "videos")
    rows = read_annotations(folder / "videomme/test-00000-of-00001.parquet")
    make.write_parquet(folder / "videomme/test-00000-of-00001.parquet", [{**rows[0], "answer": answer}, rows[1]])
    found = load_benchmark("videomme", folder)
    assert [s.answer for s in found.samples] == ["B"]
    assert f"the answer {answer!r} is none of the letters A, B, C, D." in " ".join(found.notes)


def test_ssv2_t10_asks_ten_classes(tmp_path):
    found = load_benchmark("ssv2-t10", copy_of("ssv2-t10", tmp_path))
    assert [s.category for s in found.samples] == ["Picking something up", "Something falling like a rock"]
    assert found.samples[0].answer == "The action happening in this video is: Picking [something] up"
    assert [part["type"] for part in found.samples[0].prompt[0]["content"]] == ["text", "video", "text"]
    assert found.notes == [
        "The official validation clips of the ten classes; the published split can't be drawn again.",
    ]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_folder_without_the_benchmark(tmp_path, name):
    with pytest.raises(DataError, match=r"holds no .*expected"):
        load_benchmark(name, tmp_path)
    with pytest.raises(DataError, match="there is no folder"):
        load_benchmark(name, tmp_path / "none")


def test_unknown_benchmarks_and_damaged_files(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="expected one of mvbench, "):
        load_benchmark("mmbench", tmp_path)
    for name, text in (("a.json", "{"), ("b.json", "{}"), ("c.jsonl", '{"a": 1}\nx')):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=rf"{name}.* (can't be read as json|holds no list of records)"):
            read_annotations(tmp_path / name)
    (tmp_path / "d.csv").write_text("a,b\n1,2\n")
    assert read_annotations(tmp_path / "d.csv") == [{"a": "1", "b": "2"}]
    (tmp_path / "e.parquet").write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'sta-adapter\[eval\]'"):
        read_annotations(tmp_path / "e.parquet")


def test_annotations_that_do_not_add_up(tmp_path):
    folder = copy_of("mvbench", tmp_path, "first")
    file = folder / "json/action_antonym.json"
    row = json.loads(file.read_text())[0]
    whole = {key: value for key, value in row.items() if key != "video"}
    make.write_json(file, [{**row, "answer": "up"}, row, whole])
    found = load_benchmark("mvbench", folder)
    assert [s.source for s in found.samples if s.category == "action_antonym"] == [f"{file}, entry 2"]
    assert found.notes[0].startswith("2 left out, as their annotations don't add up. The first: ")
    assert found.notes[0].endswith("entry 1: the answer 'up' is none of the candidates ['left', 'right'].")
    for task in ("action_sequence", "episodic_reasoning"):
        (folder / f"json/{task}.json").unlink()
    make.write_json(file, [whole])
    with pytest.raises(
        DataError, match=r"no question .* can be asked.*entry 1 has no 'video'; its fields: question, cand"
    ):
        load_benchmark("mvbench", folder)


ODD = [3, 2.5, True, ["left"], {"a": 1}, [["left", "right"]], "", None]
FIELDS = {
    "mvbench": ("json/action_antonym.json", ("question", "candidates", "answer", "video")),
    "vitatecs": ("data/Direction.jsonl", ("caption", "counterfactual", "src_dataset", "video_name")),
    "tempcompass": ("questions/yes_no.json", ("question", "answer")),
    "videomme": ("test.json", ("question", "options", "answer", "videoID", "task_type", "domain")),
    "ssv2-t10": ("labels/validation.json", ("id",)),
}


def rows_of(name, folder):
    """(the annotations, one record of them, a function that writes other records in its place)."""
    file = folder / FIELDS[name][0]
    if name == "videomme":  # without pyarrow
        (folder / "data").mkdir(parents=True)
        rows = [
            {
                "question": "Which?",
                "options": ["A. left", "B. right"],
                "answer": "A",
                "videoID": "a",
                "task_type": "t",
                "domain": "d",
            }
        ]
        make.write_json(file, rows)
    else:
        copy_of(name, folder.parent, None if name == "ssv2-t10" else "first" if name == "mvbench" else "repository")
    if file.suffix == ".jsonl":
        row = json.loads(file.read_text().splitlines()[0])
        return row, lambda rows: file.write_text("\n".join(map(json.dumps, rows)))
    found = json.loads(file.read_text())
    if isinstance(found, dict):  # clip, aspect, questions
        clip, aspects = next(iter(found.items()))
        aspect, asked = next(iter(aspects.items()))
        return asked[0], lambda rows: make.write_json(file, {clip: {aspect: rows}})
    return found[0], lambda rows: make.write_json(file, rows)


@pytest.mark.parametrize("name", list(FIELDS))
def test_fields_of_other_types_are_left_out(tmp_path, name):
    """Each field of each odd value: a note that names the field, and the good record stays."""
    row, write = rows_of(name, tmp_path / name)
    for field in FIELDS[name][1]:
        fine = {"candidates": (["left"],), "options": (["left"],), "id": (3,), "domain": ("", None)}.get(field, ())
        for odd in ODD:
            if any(type(odd) is type(value) and odd == value for value in fine):
                continue
            write([{**row, field: odd}, row])
            found = load_benchmark(name, tmp_path / name)
            assert any(f"'{field}'" in note and "1 left out" in note for note in found.notes), (field, odd, found.notes)


@pytest.mark.parametrize(("start", "end"), [("0", 1), (0, "x"), (-1, 2), (2, 1), (0, 1e300), ([0], 1), (True, 2)])
def test_seconds_that_are_none(tmp_path, start, end):
    folder = copy_of("mvbench", tmp_path, "first")
    file = folder / "json/action_sequence.json"
    row = json.loads(file.read_text())[0]
    make.write_json(file, [{**row, "start": start, "end": end}, row])
    notes = load_benchmark("mvbench", folder).notes
    assert any(
        "1 left out" in note and ("expected seconds" in note or "is not after 'start'" in note) for note in notes
    )


@pytest.mark.parametrize("options", [["a"], ["a"] * 27], ids=["one", "many"])
def test_numbers_of_options_that_have_no_letters(tmp_path, options):
    row, write = rows_of("mvbench", tmp_path / "mvbench")
    write([{**row, "candidates": options, "answer": "a"}, row])
    assert any("expected 2 to 26" in note for note in load_benchmark("mvbench", tmp_path / "mvbench").notes)


@pytest.mark.parametrize(
    "nested", [{"clip": 3}, {"clip": {"aspect": "x"}}, {"clip": {"aspect": [3]}}, {"clip": []}], ids=str
)
def test_tempcompass_nested_otherwise(tmp_path, nested):
    folder = copy_of("tempcompass", tmp_path, "repository")
    make.write_json(folder / "questions/yes_no.json", nested)
    with pytest.raises(DataError, match="'clip' holds no lists of questions by aspect"):
        load_benchmark("tempcompass", folder)


# ---- folders of pictures


def test_a_folder_of_pictures_is_sampled_by_time(tmp_path):
    make.pictures(tmp_path / "clip", 12)
    frames, times, metadata = read_folder(tmp_path / "clip", 3.0, fps=1.0, min_frames=1, start=1.0, end=4.0)
    assert frames[:, 0, 0, 0].tolist() == [30, 60, 90]
    assert times.tolist() == [1.0, 2.0, 3.0]
    assert metadata.for_transformers()["frames_indices"] == [3, 6, 9]


def test_folders_that_are_no_clip(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder of pictures"):
        read_folder(tmp_path / "none", 3.0)
    with pytest.raises(VideoError, match="holds no picture"):
        read_folder(tmp_path, 3.0)
    make.pictures(tmp_path / "clip", 4)
    from PIL import Image

    Image.new("RGB", (20, 16)).save(tmp_path / "clip/00009.png")
    with pytest.raises(VideoError, match="several sizes: 16x16, 20x16"):
        read_folder(tmp_path / "clip", 3.0, fps=3.0)
    with pytest.raises(VideoError, match="no frame begins from 9 s"):
        read_folder(tmp_path / "clip", 3.0, start=9.0)
    for rate in (0, -1.0, float("nan"), "2", None):
        with pytest.raises(ConfigError, match=r"rate is .*expected a finite number above 0"):
            read_folder(tmp_path / "clip", rate)


# ---- what an answer names


TWO = ["It moves left.", "It moves right."]


@pytest.mark.parametrize(
    ("said", "labels", "texts", "index"),
    [
        ("B", "AB", TWO, 1),
        ("b", "AB", TWO, 1),
        (" (B)\n", "AB", TWO, 1),
        ("B. It moves right.", "AB", TWO, 1),
        ("B) because", "AB", TWO, 1),
        ("A man moves", "AB", TWO, None),
        ("The answer is B.", "AB", TWO, 1),
        ("Best option: (A) It moves left.", "AB", TWO, 0),
        ("I think it moves right", "AB", TWO, 1),
        ("It moves left or it moves right", "AB", TWO, None),
        ("E", "AB", TWO, None),
        ("", "AB", TWO, None),
        ("yes, it does", ["yes", "no"], [], 0),
        ("No.", ["yes", "no"], [], 1),
        ("nothing", ["yes", "no"], [], None),
        ("left", ["turn left", "go right"], [], None),
        ("B", ["Option A of two", "Option B of two"], [], None),
        ("Sentence B: x", ["Sentence A", "Sentence B"], TWO, 1),
        ("2", ["Option 1", "Option 2"], TWO, 1),
        ("Option 2", ["Option 1", "Option 2"], TWO, 1),
        ("up then down", "AB", ["up", "up then down"], 1),
        ("Picking something up.", ["says: Picking [something] up", "says: up"], ["Picking [something] up", "Up [it]"], 0),
    ],
)  # fmt: skip
def test_named_option(said, labels, texts, index):
    assert named_option(said, labels, texts) == index


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", "[" * 100_000),
        ("a.jsonl", '{"a": ' + "9" * 5000 + "}"),
        ("a.csv", "a,b\n" + '"' + "x" * 200_000 + '",1'),
        ("a.parquet", "PAR1 and nothing of a table PAR1"),
    ],
)
def test_files_of_any_content_are_errors_of_ours(tmp_path, name, content):
    from sta_adapter.evaluation.benchmarks.base import read_file

    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=f"{name} can't be read as"):
        read_file(tmp_path / name)
