"""The examples of docs/data.md are samples, each of the format that it stands under."""

import json
import re
from pathlib import Path

import pytest

from sta_adapter.data.conversation import parse_sample
from sta_adapter.data.formats import recognise
from sta_adapter.data.samples import read_samples

PAGE = (Path(__file__).parent.parent / "docs" / "data.md").read_text(encoding="utf-8")
SECTIONS = [section.partition("\n") for section in re.split(r"^## ", PAGE, flags=re.MULTILINE)]
BLOCK = re.compile(r"^```json\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EXAMPLES = {title: json.loads(block) for title, _, text in SECTIONS for block in BLOCK.findall(text)}
PLAIN = re.compile(r"^```\n(\{.*?|video,.*?)^```$", re.MULTILINE | re.DOTALL)
FORMATS = {
    "Conversations": ("conversations", ["video", "image", "text"], "No, the cup stays up."),
    "Conversations with placeholders": ("conversations", ["video", "video", "text"], "They are equally long."),
    "Multiple choice": ("multiple-choice", ["video", "text"], "B"),
    "Something-Something v2": ("ssv2", ["video", "text"], "Holding something next to something"),
    "Tar shards": ("conversations", ["video", "text"], "It falls."),
}


def test_every_example_is_tested():
    assert EXAMPLES.keys() == FORMATS.keys()
    assert PAGE.count("```json") == len(FORMATS)


@pytest.mark.parametrize("title", FORMATS)
def test_example(tmp_path, title):
    name, parts, answer = FORMATS[title]
    record = EXAMPLES[title]
    assert recognise(record) == name
    sample = parse_sample(record, folder=tmp_path)
    assert [part["type"] for part in sample.messages[0]["content"]] == parts
    assert sample.answer == answer
    file = tmp_path / "data.json"
    file.write_text(json.dumps([record]))
    assert read_samples(file, format=name)[0].messages == sample.messages


def test_files_of_other_tools(tmp_path):
    llava, question, table = PLAIN.findall(PAGE)
    for text, name, words in (
        (llava, "a.json", ["What happens?"]),
        (question, "b.jsonl", ["What happens?"]),
        (table, "c.csv", ["A. left", "B. right"]),
    ):
        (tmp_path / name).write_text(text)
        (sample,) = read_samples(tmp_path / name)
        video, asked = sample.messages[0]["content"]
        assert video["video"] == str(tmp_path / "clips/1.mp4")
        assert all(part in asked["text"] for part in words)
