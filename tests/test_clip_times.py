"""What models are told of time: seconds of a temporal step, and times in the prompt, are those at which frames begin."""

import re

import numpy as np
import pytest
import tiny_bases
import torch
from hypothesis import given
from hypothesis import strategies as st
from make_videos import write

from sta_adapter.data import FrameSettings, VideoDataset, visual_processing
from sta_adapter.data.conversation import parse_sample
from sta_adapter.data.visual_processing import step_seconds, told_seconds
from sta_adapter.video import ClipMetadata, read_clip

AS_IS = FrameSettings(min_tokens=None, max_tokens=None)
SPURT = [
    *range(0, 60, 20),
    *range(60, 90, 3),
    *range(90, 200, 10),
]  # twentieths of a second: 1, 6.7 and 2 frames a second


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("times")
    write(folder / "even.mp4", count=200, options={"g": "20"})  # 20 seconds
    write(folder / "film.mkv", count=96, rate="24000/1001", options={"g": "24"})
    write(folder / "uneven.mp4", count=len(SPURT), rate=20, ticks=SPURT)
    write(folder / "uneven.mkv", count=len(SPURT), rate=20, ticks=SPURT)
    return folder


def processor_of(name, folder):
    if not tiny_bases.takes_clips(name):
        pytest.skip("not in this release of transformers, or not with clips")
    return tiny_bases.make_processor(name, folder / name)


def encoded(processor, folder, *parts):
    content = [{"type": "video", **part, "video": str(folder / part["video"])} for part in parts]
    record = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "x"}]}
    return VideoDataset([parse_sample(record)], processor, frames=AS_IS, on_bad_sample="error")[0]


def begins(folder, part):
    """Seconds at which the clip's frames begin, the last one again where two make a step."""
    names = {"nframes": "num_frames", "video_start": "start", "video_end": "end"}
    how = {names.get(key, key): value for key, value in part.items() if key != "video"}
    times = read_clip(folder / part["video"], **how).timestamps
    return np.append(times, times[-1:]) if len(times) % 2 else times


PARTS = {
    "whole": {"video": "even.mp4"},
    "quick": {"video": "even.mp4", "fps": 4, "max_frames": 100},
    "cut": {"video": "even.mp4", "fps": 4, "video_start": 10, "video_end": 14},
    "few": {"video": "even.mp4", "nframes": 5, "video_start": 3},
    "most": {"video": "even.mp4", "fps": 2, "max_frames": 8},
    "least": {"video": "even.mp4", "video_end": 1.5, "min_frames": 6},
    "film": {"video": "film.mkv", "fps": 8, "video_start": 1},
    "uneven": {"video": "uneven.mp4", "nframes": 8},
    "uneven_cut": {"video": "uneven.mkv", "fps": 5, "video_start": 3, "video_end": 4.5},
    "every_frame": {"video": "uneven.mp4", "fps": 100, "max_frames": 100},
}
EXPECTED = {"whole": 2.0, "quick": 0.5, "cut": 0.5, "most": 5.0, "few": 6.8}


@pytest.mark.parametrize("name", list(PARTS))
def test_seconds_of_a_step(folder, name):
    part = PARTS[name]
    found = encoded(processor_of("qwen2_5_vl", folder), folder, part)["second_per_grid_ts"].tolist()
    assert found == pytest.approx([np.diff(begins(folder, part)[::2]).mean()], rel=1e-5)
    assert found[0] == pytest.approx(EXPECTED.get(name, found[0]), rel=1e-5)


@pytest.mark.parametrize(
    ("indices", "frames", "expected"),
    [([0, 1, 10, 11], 2, 1.0), ([0, 5, 10], 3, 1.5), ([4], 1, 1.0), ([4, 4], 2, 1.0), ([0, 10, 30], 1, 1.5)],
    ids=["two uneven steps", "one step", "one frame", "one frame twice", "frame by frame"],
)
def test_seconds_of_a_step_in_numbers(indices, frames, expected):
    assert step_seconds({"frames_indices": indices, "fps": 10.0}, frames) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("release", "told"), [("4.51.3", 0), ("4.57.6", 1), ("5.0.0", 1), ("5.17.0", 1), ("5.18.0", 0), ("5.24.0", 0)]
)
def test_steps_that_transformers_rounds_are_told_of_once(monkeypatch, caplog, release, told):
    monkeypatch.setattr("transformers.__version__", release)
    visual_processing._say_that_they_are_rounded.cache_clear()
    encoded = {"second_per_grid_ts": torch.zeros(1), "input_ids": torch.zeros(1)}
    told_seconds(encoded, [2.0])
    told_seconds({}, [0.5])
    assert not caplog.records
    for _ in range(2):
        found = told_seconds(encoded, [0.5, 2.0])
        assert {name: value.tolist() for name, value in found.items()} == {"second_per_grid_ts": [0.5, 2.0]}
    visual_processing._say_that_they_are_rounded.cache_clear()
    assert [f"transformers {release} rounds the seconds" in record.message for record in caplog.records] == [
        True
    ] * told


def test_seconds_of_several_clips(folder):
    found = encoded(processor_of("qwen2_5_vl", folder), folder, *(PARTS[name] for name in ("cut", "whole", "most")))
    assert found["second_per_grid_ts"].tolist() == pytest.approx([0.5, 2.0, 5.0])


@pytest.mark.parametrize("frames", [1, 2])
def test_one_step_has_no_next(folder, frames):
    part = {"video": "even.mp4", "nframes": frames, "video_start": 10, "video_end": 14}
    found = encoded(processor_of("qwen2_5_vl", folder), folder, part)["second_per_grid_ts"].tolist()
    assert found == [1.0 if frames == 1 else 4.0]


@pytest.mark.parametrize("name", list(PARTS))
def test_times_in_the_prompt_of_qwen3(folder, name):
    processor = processor_of("qwen3_vl", folder)
    text = processor.tokenizer.decode(encoded(processor, folder, PARTS[name])["input_ids"])
    times = begins(folder, PARTS[name])
    assert re.findall(r"<([\d.]+) seconds>", text) == [f"{time:.1f}" for time in (times[::2] + times[1::2]) / 2]


@pytest.mark.parametrize("name", list(PARTS))
def test_times_in_the_prompt_of_glm(folder, name):
    processor = processor_of("glm4v", folder)
    text = processor.tokenizer.decode(encoded(processor, folder, PARTS[name])["input_ids"])
    assert re.findall(r"end_of_image\|>(\d+)", text) == [str(int(time)) for time in begins(folder, PARTS[name])[::2]]


@pytest.mark.parametrize("name", list(PARTS))
@pytest.mark.parametrize("family", ["glm46v", "glm5_next"])
def test_times_in_the_prompt_of_later_glm(folder, family, name):
    processor = processor_of(family, folder)
    text = processor.tokenizer.decode(encoded(processor, folder, PARTS[name])["input_ids"])
    told = [float(time) for time in re.findall(r"end_of_image\|>(\d+\.\d) seconds", text)]
    assert told == pytest.approx(begins(folder, PARTS[name])[::2], abs=0.05001)  # rounded to tenths


@pytest.mark.parametrize("name", ["cut", "uneven", "uneven_cut"])
def test_times_in_the_prompt_of_video_llama(folder, name):
    processor = processor_of("video_llama_3", folder)
    text = processor.tokenizer.decode(encoded(processor, folder, PARTS[name])["input_ids"])
    times = begins(folder, PARTS[name])
    assert re.findall(r"Time ([\d.]+)s:", text) == [f"{time:.1f}" for time in times]


@given(
    st.lists(st.integers(1, 5000), min_size=2, max_size=30),
    st.data(),
)
def test_transformers_tells_the_times_at_which_frames_begin(gaps, data):
    times = np.cumsum([0, *gaps]) / 1000
    total, duration = len(times), float(times[-1] + gaps[-1] / 1000)
    chosen = sorted(data.draw(st.sets(st.integers(0, total - 1), min_size=1)))
    begin = tuple(times[chosen].tolist())
    clip = ClipMetadata("a", total, total / duration, duration, 8, 8, 0, "pyav", "", tuple(chosen), begin)
    told = clip.for_transformers()
    assert all(isinstance(index, int) for index in told["frames_indices"])
    np.testing.assert_allclose(np.array(told["frames_indices"]) / told["fps"], begin, atol=1e-6)
    assert told["total_num_frames"] / told["fps"] == pytest.approx(duration, abs=1e-5)


def test_an_even_file_keeps_its_own_numbers(folder):
    told = read_clip(folder / "even.mp4", num_frames=4, start=10).metadata.for_transformers()
    assert told["frames_indices"] == [100, 125, 150, 175]
    assert (told["fps"], told["total_num_frames"]) == (10, 200)
