"""Several files in one run, of clips, pictures and text, each with a weight."""

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from tiny_qwen import make_model, make_processor, write_samples

from sta_adapter.data.samples import mixed_samples, weighted
from sta_adapter.errors import ConfigError, DataError
from sta_adapter.training import TrainingConfig, open_data, train


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Clips as conversations, pictures as LLaVA has them, questions in CSV about a folder of frames, and text."""
    folder = tmp_path_factory.mktemp("data")
    write_samples(folder, 4)
    (folder / "frames").mkdir()
    for index in range(4):
        Image.fromarray(np.full((16, 16, 3), 60 * index, np.uint8)).save(folder / "frames" / f"{index}.png")
    llava = [{"id": str(i), "image": "frames/1.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "up"}]} for i in range(2)]  # fmt: skip
    (folder / "llava.json").write_text(json.dumps(llava))
    (folder / "table.csv").write_text("video,folder_fps,question,answer\nframes,4,Which way?,down\n")
    text = {"conversations": [{"from": "human", "value": "Say left."}, {"from": "gpt", "value": "left"}]}
    (folder / "text.jsonl").write_text(json.dumps(text) + "\n")
    return folder


def test_weights():
    assert weighted("a.jsonl") == ("a.jsonl", 1.0)
    assert weighted("my data/a.jsonl:2") == ("my data/a.jsonl", 2.0)
    assert weighted("a:b.jsonl:0.25") == ("a:b.jsonl", 0.25)
    assert weighted("C:\\a.jsonl") == ("C:\\a.jsonl", 1.0)
    with pytest.raises(ConfigError, match=r"the weight of 'a\.jsonl' is 0, expected a number above 0"):
        weighted("a.jsonl:0")


def test_a_file_whose_name_ends_like_a_weight(tmp_path):
    (tmp_path / "a:2").write_text("")
    assert weighted(tmp_path / "a:2") == (f"{tmp_path}/a:2", 1.0)


def counts(samples):
    return Counter(sample.source.split("/")[-1].split(",")[0] for sample in samples)


def test_a_pass_has_each_file_as_often_as_its_weight_says(files):
    paths = [f"{files}/data.jsonl:1.5", f"{files}/llava.json:3", f"{files}/text.jsonl"]
    found = mixed_samples(paths, seed=1)
    assert counts(found) == {"data.jsonl": 6, "llava.json": 6, "text.jsonl": 1}
    assert [sample.source for sample in mixed_samples(paths, seed=1)] == [sample.source for sample in found]
    assert max(Counter(sample.source for sample in found if "data.jsonl" in sample.source).values()) == 2


def test_what_can_not_be_mixed(files, tmp_path):
    with pytest.raises(ConfigError, match=r"tar shards, which are read as a stream and can't be mixed"):
        mixed_samples([files / "data.jsonl", "train-{000..003}.tar"])
    with pytest.raises(ConfigError, match=r"the weight 0\.1 leaves none of the 1 samples"):
        mixed_samples([f"{files}/text.jsonl:0.1"])
    with pytest.raises(DataError, match=r"none\.jsonl"):
        mixed_samples([files / "data.jsonl", tmp_path / "none.jsonl"])


def test_clips_pictures_frames_and_text_train_together(files, tmp_path):
    processor = make_processor(tmp_path / "tokenizer")
    settings = {"frames": {"min_tokens": None, "max_tokens": None}, "report_to": "none", "num_workers": 0}
    config = TrainingConfig.from_dict({**settings, "batch_size": 4, "epochs": 1, "on_bad_sample": "error"})
    names = [f"{files}/{name}" for name in ("data.jsonl", "llava.json", "table.csv", "text.jsonl")]
    data = open_data(names, processor, config)
    assert len(data) == 8
    result = train(make_model(processor.tokenizer), data, output_dir=tmp_path / "out", config=config, progress=False)
    assert [result.stages[name]["steps"] for name in "12"] == [2, 2]
    assert result.bad_samples == []
