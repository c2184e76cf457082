import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_qwen import CHATML, make_processor, moving_square, write_samples, write_video

from sta_adapter.data import BadSample, Collator, FrameSettings, VideoDataset, fit_frames, read_samples
from sta_adapter.data.chat_encoding import IGNORE, encode, encode_answer, encode_prompt
from sta_adapter.data.clip_reader import ClipReader
from sta_adapter.data.conversation import parse_sample
from sta_adapter.data.fingerprint import fingerprint_clip
from sta_adapter.errors import ConfigError, DataError
from sta_adapter.evaluation import clips_of

AS_IS = FrameSettings(min_tokens=None, max_tokens=None)
NAMES = [f"{number}.png" for number in (7, 0, 3, 1, 5, 4, 3, 2)]
LISTED = {"type": "video", "video": NAMES, "folder_fps": 4, "fps": 2}
PART = "{% for part in m['content'] %}{{ part['text'] if part['type'] == 'text' else '<|' + part['type'] + '_pad|>' }}{% endfor %}"
TEMPLATES = {
    "chatml": CHATML,
    "turn_ends_without_newline": (
        "{{ '<|endoftext|>' }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '<|vision_end|>\n\n' }}"
        + PART
        + "{{ '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|vision_end|>\n\n' }}{% endif %}"
    ),
    "end_of_text_after_answers": (
        "{% for m in messages %}{{ 'USER: ' if m['role'] == 'user' else ' ASSISTANT: ' }}"
        + PART
        + "{% if m['role'] == 'assistant' %}{{ '<|endoftext|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ ' ASSISTANT: ' }}{% endif %}"
    ),
    "no_end_token": (
        "{% for m in messages %}{{ m['role'] + ': ' }}" + PART + "{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    ),
}
END = {
    "chatml": "<|im_end|>",
    "turn_ends_without_newline": "<|im_end|>",
    "end_of_text_after_answers": "<|endoftext|>",
    "no_end_token": "\n",
}


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return make_processor(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def template(processor):
    """Use another chat template for a while."""
    before = processor.chat_template

    def use(text):
        processor.chat_template = text

    yield use
    processor.chat_template = before


def chat(*turns):
    return [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]


def learned(processor, encoded):
    """The words that are learned, as runs of text."""
    runs, current = [], []
    for token, label in zip(encoded["input_ids"].tolist(), encoded["labels"].tolist(), strict=True):
        assert label in (IGNORE, token)
        if label == IGNORE and current:
            runs.append(processor.tokenizer.decode(current))
            current = []
        elif label != IGNORE:
            current.append(token)
    return [*runs, processor.tokenizer.decode(current)] if current else runs


def jsonl(path, *records):
    path.write_text("\n".join(record if isinstance(record, str) else json.dumps(record) for record in records))
    return path


def sample(content, answer="left", **extra):
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}], **extra}


# ---- which words are learned


@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_alone_are_learned(processor, template, name):
    template(TEMPLATES[name])
    messages = chat(("user", "Which way?"), ("assistant", "left"), ("user", "And now?"), ("assistant", "It went up."))
    encoded = encode(processor, messages, [[] for _ in messages])
    last = "\n<|im_end|>" if name == "no_end_token" else END[name]  # what has no end token gets the tokenizer's
    assert learned(processor, encoded) == ["left" + END[name], "It went up." + last]


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompt_is_what_comes_before_the_answer(processor, template, name):
    template(TEMPLATES[name])
    messages = chat(("user", "Which way?"), ("assistant", "right"))
    whole = encode(processor, messages, [[], []])["input_ids"]
    prompt = encode_prompt(processor, messages[:1], [[]])["input_ids"]
    answer = encode_answer(processor, messages[:1], "right")
    assert torch.equal(whole[: len(prompt) + len(answer)], torch.cat([prompt, answer]))


words = st.text(st.sampled_from("ab lerft\n.é漢"), min_size=1, max_size=12).map(lambda text: "x" + text)


@settings(max_examples=40)
@given(st.lists(st.tuples(words, words), min_size=1, max_size=4), st.sampled_from(list(TEMPLATES)[:3]))
def test_answers_of_any_conversation_are_learned(processor, turns, name):
    before, processor.chat_template = processor.chat_template, TEMPLATES[name]
    try:
        messages = chat(*(turn for q, a in turns for turn in (("user", q), ("assistant", a))))
        encoded = encode(processor, messages, [[] for _ in messages])
        text = processor.apply_chat_template(messages, tokenize=False)
    finally:
        processor.chat_template = before
    assert learned(processor, encoded) == [answer + END[name] for _, answer in turns]
    assert encoded["input_ids"].tolist() == processor.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_system_and_trailing_user_turns_are_not_learned(processor):
    messages = chat(("system", "Be brief."), ("user", "Which way?"), ("assistant", "up"), ("user", "Sure?"))
    encoded = encode(processor, messages, [[] for _ in messages])
    assert learned(processor, encoded) == ["up<|im_end|>"]
    assert "Sure" not in processor.tokenizer.decode(encoded["input_ids"])


@pytest.mark.parametrize(
    ("text", "turns", "error"),
    [
        (
            "{% for m in messages %}{{ 'old ' if not loop.last else 'new ' }}{{ m['content'][0]['text'] }}{% endfor %}",
            (("user", "a"), ("assistant", "b")),
            "rewrites earlier turns when a turn is added",
        ),
        (
            "{% if messages|length > 1 %}{{ raise_exception('roles must alternate') }}{% endif %}{{ messages[0]['content'][0]['text'] }}",
            (("user", "a"), ("assistant", "b")),
            r"can't render the roles \(user, assistant\): TemplateError: roles must alternate",
        ),
        (CHATML, (("user", "a"), ("assistant", "<|video_pad|>")), r"has 1 times <\|video_pad\|>, expected 0"),
        (CHATML, (("user", "<|image_pad|>"), ("assistant", "b")), r"has 1 times <\|image_pad\|>, expected 0"),
        (CHATML, (("user", "a"),), "no message with role 'assistant'"),
    ],
    ids=["rewriting", "refusing", "placeholder_in_text", "picture_in_text", "no_answer"],
)
def test_conversations_that_cannot_be_masked(processor, template, text, turns, error):
    template(text)
    with pytest.raises(DataError, match=error):
        encode(processor, chat(*turns), [[] for _ in turns])


def test_token_across_the_border_is_an_error(processor, template):
    template("{% for m in messages %}{{ 'le' if m['role'] == 'assistant' else 'q' }}{{ m['content'][0]['text'] }}{% endfor %}"
             "{% if add_generation_prompt %}le{% endif %}")  # fmt: skip
    with pytest.raises(DataError, match="a token straddles the border"):
        encode(processor, chat(("user", "a"), ("assistant", "ft")), [[], []])


# ---- clips


def test_several_clips_turns_and_images(processor, tmp_path):
    from PIL import Image

    write_video(tmp_path / "a.mp4", moving_square("left"))
    write_video(tmp_path / "b.mp4", moving_square("right", size=24))
    Image.fromarray(moving_square("left")[0]).save(tmp_path / "c.png")
    video = [{"type": "video", "video": name, "nframes": frames} for name, frames in (("a.mp4", 4), ("b.mp4", 6))]
    turns = [
        {"role": "user", "content": [*video, {"type": "text", "text": "Which?"}]},
        {"role": "assistant", "content": "both"},
        {"role": "user", "content": [{"type": "image", "image": "c.png"}, {"type": "text", "text": "And?"}]},
        {"role": "assistant", "content": "up"},
    ]
    file = jsonl(tmp_path / "data.jsonl", {"messages": turns})
    item = VideoDataset(file, processor, frames=AS_IS, on_bad_sample="error")[0]
    assert item["video_grid_thw"].tolist() == [[2, 4, 4], [3, 6, 6]]
    assert item["image_grid_thw"].tolist() == [[1, 4, 4]]
    assert item["pixel_values_videos"].shape[0] == 2 * 16 + 3 * 36
    ids = item["input_ids"].tolist()
    pads = [processor.tokenizer.convert_tokens_to_ids(f"<|{kind}_pad|>") for kind in ("video", "image")]
    assert [ids.count(pad) for pad in pads] == [2 * 4 + 3 * 9, 4]
    assert learned(processor, item) == ["both<|im_end|>", "up<|im_end|>"]
    if "mm_token_type_ids" in item:
        assert item["mm_token_type_ids"].tolist() == [2 * (i == pads[0]) + (i == pads[1]) for i in ids]


def test_later_clips_need_a_tokenizer_that_reads_their_turn_alike_on_its_own(tmp_path):
    from tokenizers.pre_tokenizers import ByteLevel

    processor = make_processor(tmp_path)
    processor.chat_template = TEMPLATES["no_end_token"]
    processor.tokenizer.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=True, use_regex=False)
    clip = {"type": "video", "video": str(write_video(tmp_path / "a.mp4", moving_square("left"))), "nframes": 4}
    turns = sample([clip])["messages"]
    assert learned(processor, VideoDataset([{"messages": turns}], processor, frames=AS_IS)[0])
    with pytest.raises(DataError, match=r"the tokenizer reads 'user: .*' differently on its own"):
        VideoDataset([{"messages": turns * 2}], processor, frames=AS_IS, on_bad_sample="error")[0]


def test_a_list_of_records_is_read_as_a_file_of_them(processor, tmp_path):
    path = write_video(tmp_path / "a.mp4", moving_square("left"))
    record = sample([{"type": "video", "video": str(path), "nframes": 4}])
    data = VideoDataset([record, parse_sample(record), {"video": str(path)}], processor, frames=AS_IS)
    of_file = VideoDataset(jsonl(tmp_path / "data.jsonl", record), processor, frames=AS_IS)[0]
    for item in (data[0], data[1]):
        assert all(torch.equal(item[name], of_file[name]) for name in of_file)
    assert data[2].source == "record 3"
    assert "a record of no known format. Keys: video" in data[2].reason
    with pytest.raises(DataError, match=r"record 2: found a text, expected an object"):
        VideoDataset([record, "a.mp4"], processor, on_bad_sample="error")


@pytest.mark.parametrize("count", [1, 3, 5, 8])
def test_model_sees_the_decoded_frames(processor, tmp_path, count):
    from sta_adapter.video import read_clip

    path = write_video(tmp_path / "a.mp4", moving_square("left"))
    content = [{"type": "video", "video": str(path), "nframes": count}]
    item = VideoDataset([parse_sample(sample(content))], processor, frames=AS_IS, on_bad_sample="error")[0]
    frames = read_clip(path, num_frames=count).frames
    assert len(frames) == count
    mean, std = (np.array(getattr(processor.image_processor, name)) for name in ("image_mean", "image_std"))
    rows = item["pixel_values_videos"].reshape(-1, 2, 2, 2, 2, 3, 2, 4, 4)  # (t, h/2, w/2, 2, 2, rgb, pair, 4, 4)
    seen = rows.permute(0, 6, 1, 3, 7, 2, 4, 8, 5).reshape(-1, 16, 16, 3).numpy() * std + mean
    padded = np.concatenate([frames, frames[-1:]]) if count % 2 else frames
    np.testing.assert_allclose(seen * 255, padded, atol=0.01)


@pytest.mark.parametrize("order", ["ordered", "shuffled", "reversed"])
def test_frame_order(processor, tmp_path, order):
    file = write_samples(tmp_path, 2)
    straight = VideoDataset(file, processor, frames=AS_IS)
    clip = VideoDataset(file, processor, frames=AS_IS, frame_order=order, seed=3)

    def frames(dataset):
        return dataset.encoder.reader.read(dataset.samples[0].messages[0]["content"][:1], 0)[0].pixels

    expected = {
        "ordered": np.arange(4),
        "reversed": np.arange(4)[::-1],
        "shuffled": np.random.default_rng((3, 0)).permutation(4),
    }
    np.testing.assert_array_equal(frames(clip), frames(straight)[expected[order]])


def test_each_clip_of_a_sample_is_shuffled_in_its_own_way(processor, tmp_path):
    """Else two clips are still in step with each other, and whether they show the same movement can be told."""
    path = write_video(tmp_path / "a.mp4", moving_square("left"))
    parts = [{"type": "video", "video": str(path), "nframes": 8}] * 2
    straight, *_ = ClipReader.of(processor, AS_IS).read(parts)
    first, second = (visual.pixels for visual in ClipReader.of(processor, AS_IS, "shuffled").read(parts))
    assert not np.array_equal(first, second)
    for pixels in (first, second):
        assert sorted(frame.tobytes() for frame in pixels) == sorted(frame.tobytes() for frame in straight.pixels)


@pytest.mark.parametrize(
    ("part", "settings", "grid"),
    [
        ({}, FrameSettings(min_tokens=16, max_tokens=32), [2, 8, 8]),
        ({}, FrameSettings(min_tokens=1, max_tokens=1), [2, 2, 2]),
        ({"max_pixels": 64}, AS_IS, [2, 2, 2]),
        ({"min_pixels": 1024}, AS_IS, [2, 8, 8]),
    ],
    ids=["tokens_up", "tokens_down", "max_pixels", "min_pixels"],
)
def test_frame_size(processor, tmp_path, part, settings, grid):
    path = write_video(tmp_path / "a.mp4", moving_square("left"))
    record = sample([{"type": "video", "video": str(path), "nframes": 4, **part}])
    item = VideoDataset([parse_sample(record)], processor, frames=settings, on_bad_sample="error")[0]
    assert item["video_grid_thw"].tolist() == [grid]


@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([8, 28]), st.integers(1, 20), st.integers(0, 40))
def test_fit_frames_keeps_within_the_limits(height, width, factor, low, more):
    least, most = low * factor**2, (low + more) * factor**2
    frames = fit_frames(np.zeros((1, height, width, 3), np.uint8), factor=factor, min_pixels=least, max_pixels=most)
    new_height, new_width = frames.shape[1:3]
    assert new_height % factor == new_width % factor == 0
    narrow = max(height, width) / min(height, width)
    if narrow < 4 and more >= 2 * low + 4:  # else no multiple of the factor may fit
        assert least <= new_height * new_width <= most


@pytest.mark.parametrize(
    ("limit", "grid"), [({}, [1, 4, 4]), ({"max_pixels": 64}, [1, 2, 2]), ({"min_pixels": 1024}, [1, 8, 8])]
)
def test_limits_of_a_picture(processor, tmp_path, limit, grid):
    from PIL import Image

    Image.fromarray(moving_square("left")[0]).save(tmp_path / "a.png")
    record = sample([{"type": "image", "image": str(tmp_path / "a.png"), **limit}])
    item = VideoDataset([parse_sample(record)], processor, frames=AS_IS, on_bad_sample="error")[0]
    assert item["image_grid_thw"].tolist() == [grid]


def test_limits_of_a_picture_that_the_processor_would_not_keep(processor, tmp_path):
    Image.fromarray(moving_square("left")[0]).save(tmp_path / "a.png")
    picture = {"type": "image", "image": str(tmp_path / "a.png")}
    item = VideoDataset([sample([picture, {**picture, "min_pixels": 8192}])], processor, frames=AS_IS)[0]
    assert isinstance(item, BadSample)
    assert "make a picture 96x96, and the processor, by its own limits, 64x64; give such as it takes" in item.reason


def test_limits_of_one_clip_leave_the_others_to_the_processor(processor, tmp_path):
    """Each clip of a sample is encoded as it is alone, whichever of them sets its own limits.

    Before transformers 4.52 processors resize by Pillow, which rounds a few pixels to the level beside torch's.
    """
    path = write_video(tmp_path / "clip.mp4", np.random.default_rng(0).integers(0, 255, (4, 96, 128, 3), np.uint8))
    parts = [
        {"type": "video", "video": str(path), "nframes": 4},
        {"type": "video", "video": str(path), "nframes": 4, "max_pixels": 1024},
    ]
    settings = FrameSettings(min_tokens=None, max_tokens=None)
    part = processor.image_processor
    level = 0 if hasattr(processor, "video_processor") else 1.001 * part.rescale_factor / min(part.image_std)

    def encoded(*chosen):
        file = jsonl(tmp_path / "data.jsonl", sample([*chosen, {"type": "text", "text": "which?"}]))
        return VideoDataset(file, processor, frames=settings, on_bad_sample="error")[0]

    alone = [encoded(part) for part in parts]
    for order in ((0, 1), (1, 0)):
        both = encoded(*(parts[index] for index in order))
        assert torch.equal(both["video_grid_thw"], torch.cat([alone[i]["video_grid_thw"] for i in order]))
        difference = both["pixel_values_videos"] - torch.cat([alone[i]["pixel_values_videos"] for i in order])
        assert difference.abs().max() <= level
    assert not torch.equal(alone[0]["video_grid_thw"], alone[1]["video_grid_thw"])


def test_range_of_a_clip(processor, tmp_path):
    path = write_video(tmp_path / "a.mp4", moving_square("right"), fps=4)
    record = sample([{"type": "video", "video": str(path), "fps": 4, "video_start": 1.0, "video_end": 2.0}])
    item = VideoDataset([parse_sample(record)], processor, frames=AS_IS, on_bad_sample="error")[0]
    assert item["video_grid_thw"].tolist() == [[2, 4, 4]]


def test_a_clip_that_lies_there_as_pictures_is_read_at_its_own_rate(processor, tmp_path):
    (tmp_path / "frames").mkdir()
    for number in range(8):
        Image.new("RGB", (16, 16), (number * 30,) * 3).save(tmp_path / "frames" / f"{number}.png")
    part = {"type": "video", "video": "frames", "folder_fps": 4, "fps": 2}
    parsed = parse_sample(sample([part, {"type": "text", "text": "which?"}]), folder=tmp_path)
    visual = ClipReader.of(processor, AS_IS).read(parsed.messages[0]["content"][:1])[0]
    assert visual.metadata["frames_indices"] == [0, 2, 4, 6]
    assert visual.pixels[:, 0, 0, 0].tolist() == [0, 60, 120, 180]


@pytest.mark.parametrize(
    ("given", "kind"),
    [(sample("Which?"), "an object"), (parse_sample(sample("Which?")), "Sample"), (None, "missing"), (5, "a number")],
)
def test_what_is_no_list_of_records(processor, given, kind):
    with pytest.raises(DataError, match=rf"samples are {kind}, expected a file's name, or a list of records"):
        VideoDataset(given, processor)


@pytest.mark.parametrize(
    "given", [["a.jsonl", "b.jsonl"], (Path("a.jsonl"),), {"video": 0, "caption": 1}.keys()], ids=str
)
def test_names_in_the_place_of_records_are_told_at_once(processor, given):
    """Files, or what a table gives that is gone through: its columns. They were bad samples, one by one, skipped."""
    with pytest.raises(
        DataError, match=r"samples are texts, the first '(a.jsonl|video)', expected records .* mixed_samples"
    ):
        VideoDataset(given, processor)


def greys(folder, numbers):
    """Pictures whose brightness tells which they are."""
    for number in numbers:
        Image.new("RGB", (16, 16), (number * 30,) * 3).save(folder / f"{number}.png")


@pytest.mark.parametrize(
    "record",
    [
        sample([LISTED, {"type": "text", "text": "which?"}]),
        sample("<video>which?", videos=[{"video": NAMES, "folder_fps": 4, "fps": 2}]),
        sample("<video>which?", video=NAMES, folder_fps=4, fps=2),
        {"video": NAMES, "folder_fps": 4, "fps": 2, "question": "which?", "answer": "left"},
    ],
    ids=["part", "videos", "video", "question"],
)
def test_a_clip_that_is_a_list_of_pictures_has_their_order(processor, tmp_path, record):
    greys(tmp_path, range(8))
    parsed = parse_sample(record, folder=tmp_path)
    assert [part["type"] for part in parsed.messages[0]["content"]] == ["video", "text"]
    visual = ClipReader.of(processor, AS_IS).read(parsed.messages[0]["content"][:1])[0]
    assert visual.metadata["frames_indices"] == [0, 2, 4, 6]
    assert visual.metadata["video_backend"] == "pillow"
    assert visual.pixels[:, 0, 0, 0].tolist() == [210, 90, 150, 90]  # of 7, 3, 5 and 3 again
    assert clips_of([parsed]) == [tuple(str(tmp_path / name) for name in NAMES)]


def test_one_of_the_pictures_of_a_clip_is_not_there(processor, tmp_path):
    greys(tmp_path, range(5))
    item = VideoDataset([parse_sample(sample([LISTED]), folder=tmp_path)], processor)[0]
    assert isinstance(item, BadSample)
    assert "7.png', one of 8 pictures of a clip, is not there" in item.reason


def test_a_list_of_pictures_is_told_apart_by_their_contents_and_order(tmp_path):
    greys(tmp_path, range(8))

    def told(names):
        part = parse_sample(sample([{**LISTED, "video": names}]), folder=tmp_path).messages[0]["content"][0]
        return fingerprint_clip(part)

    first = told(NAMES)
    assert told(NAMES) == first
    assert told(NAMES[::-1]) != first
    assert told([*NAMES, "absent.png"]) is None
    Image.new("RGB", (16, 16), "red").save(tmp_path / "7.png")
    assert told(NAMES) != first


# ---- formats


def test_both_ways_of_writing_a_sample_are_the_same(tmp_path):
    parts = sample([{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "Which?"}], category="x")
    plain = sample("<video>Which?", videos=["a.mp4"], category="x")
    turns = [{"from": "human", "value": "<video>Which?"}, {"from": "gpt", "value": "left"}]
    samples = read_samples(
        jsonl(tmp_path / "data.jsonl", parts, "", plain, {"conversations": turns, "videos": ["a.mp4"], "category": "x"})
    )
    assert len(samples) == 3
    assert all(s.messages == samples[0].messages for s in samples)
    assert samples[0].messages[0]["content"][0] == {"type": "video", "video": str(tmp_path / "a.mp4")}
    assert [s.source.split(", ")[1] for s in samples] == ["line 1", "line 3", "line 4"]
    assert (samples[0].answer, samples[0].category, len(samples[0].prompt)) == ("left", "x", 1)


def test_absolute_paths_and_settings_beside_the_text(tmp_path):
    record = sample("<image>Then <video>?", videos=[{"video": "/v/a.mp4", "fps": 2}], images=["b.png"])
    content = parse_sample(record, folder=tmp_path).messages[0]["content"]
    assert content == [
        {"type": "image", "image": str(tmp_path / "b.png")},
        {"type": "text", "text": "Then "},
        {"type": "video", "video": "/v/a.mp4", "fps": 2},
        {"type": "text", "text": "?"},
    ]


VIDEO = {"type": "video", "video": "a.mp4"}


MALFORMED = {
    "no_json": ('{"messages": [', r"line 2: not JSON \(Expecting value at column 15\)"),
    "no_object": ("3", "line 2: found a number, expected an object"),
    "no_messages": (
        {"text": "hi"},
        "line 2: a record of no known format. Keys: text. Expected one of: conversations: 'messages' ",
    ),
    "two_forms": (
        {**sample("hi"), "conversations": [{"from": "human", "value": "hi"}]},
        "both 'messages' and 'conversations' are given, expected one of them",
    ),
    "empty_messages": ({"messages": []}, "'messages' is empty"),
    "message_is_text": ({"messages": ["hi"]}, "message 0 is a text, expected an object"),
    "role": ({"messages": [{"role": "bot", "content": "hi"}]}, "message 0 has the role 'bot', expected system, user"),
    "no_content": ({"messages": [{"role": "user"}]}, "message 0 has missing as content"),
    "empty_answer": (sample("hi", answer=" "), "message 1 is an empty answer"),
    "path_missing": (sample("<video>hi"), "message 0 has a <video> for which 'videos' holds no path"),
    "path_left_over": (
        sample("hi", videos=["a.mp4"]),
        "'videos' holds 1 more than there are <video> in the text, first 'a.mp4'",
    ),
    "videos_no_list": (sample("hi", videos="a.mp4"), "'videos' is a text, expected a list"),
    "part_type": (
        sample([{"type": "audio"}]),
        "message 0, part 0 is 'audio', expected an object whose 'type' is text, image",
    ),
    "unknown_key": (sample([{**VIDEO, "nframe": 8}]), "unknown key 'nframe'. Did you mean 'nframes'?"),
    "no_whole_number": (sample([{**VIDEO, "nframes": 2.5}]), "'nframes' is 2.5, expected a positive whole number"),
    "zero_rate": (sample([{**VIDEO, "fps": 0}]), "'fps' is 0, expected a positive number"),
    "rate_and_number": (sample([{**VIDEO, "fps": 1, "nframes": 8}]), "gives both 'fps' and 'nframes'"),
    "range": (sample([{**VIDEO, "video_start": 2, "video_end": 1}]), "'video_end' is not after 'video_start'"),
    "path_no_text": (sample([{"type": "video", "video": 3}]), "'video' is a number, expected a path"),
    "one_option": (sample("hi", options=["left"]), "expected a list of at least two texts"),
    "answer_no_option": (
        sample("hi", options=["up", "down"]),
        r"the answer is 'left', expected one of the options \['up', 'down'\]",
    ),
}


@pytest.mark.parametrize(("line", "error"), MALFORMED.values(), ids=MALFORMED)
def test_errors_name_file_line_and_what_was_expected(tmp_path, line, error):
    file = jsonl(tmp_path / "data.jsonl", sample("fine"), line)
    with pytest.raises(DataError, match=r"data.jsonl, line 2: .*" + error.removeprefix("line 2: ").replace("?", r"\?")):
        read_samples(file)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (None, "can't read the data file .*No such file"),
        (b"", "no sample in it"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b'[{"messages": []}', "not a JSON array .*line 1, column 18"),
    ],
    ids=["missing", "empty", "binary", "array"],
)
def test_files_that_are_no_data(tmp_path, content, error):
    file = tmp_path / "data.jsonl"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=error):
        read_samples(file)


@pytest.mark.parametrize("folder", [".", "..", "/", "train.json"])
def test_a_folder_is_no_file_of_samples(tmp_path, monkeypatch, folder):
    (tmp_path / "train.json").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"can't read the data file .*: Is a directory"):
        read_samples(folder)


# ---- bad samples


@pytest.fixture
def spoilt(tmp_path):
    """Four samples: fine, missing file, no video, fine."""
    file = write_samples(tmp_path, 4)
    (tmp_path / "1.mp4").unlink()
    (tmp_path / "2.mp4").write_text("no video")
    return file


def test_bad_samples_are_marked_not_replaced(processor, spoilt):
    dataset = VideoDataset(spoilt, processor, frames=AS_IS, cache=True)
    items = [dataset[i] for i in range(4)]
    assert [isinstance(item, BadSample) for item in items] == [False, True, True, False]
    assert items[1].source.endswith("data.jsonl, line 2")
    assert "1.mp4" in items[1].reason
    batch = Collator.of(processor)(items)
    assert len(batch["input_ids"]) == 2
    assert [message.split(":")[0].rsplit(" ", 1)[1] for message in batch["bad_samples"]] == ["2", "3"]
    nothing = Collator.of(processor)(items[1:3])
    assert "input_ids" not in nothing
    assert not (nothing["labels"] != IGNORE).any()


@pytest.mark.parametrize("index", [1, 2], ids=["missing", "no_video"])
def test_bad_samples_stop_if_asked(processor, spoilt, index):
    dataset = VideoDataset(spoilt, processor, on_bad_sample="error")
    with pytest.raises(DataError, match=rf"data.jsonl, line {index + 1}: .*{index}.mp4"):
        dataset[index]


def test_long_samples_are_bad(processor, tmp_path):
    dataset = VideoDataset(write_samples(tmp_path, 1), processor, frames=AS_IS, max_length=41)
    assert dataset[0].reason.startswith("42 tokens, more than max_length 41")


def test_the_frames_are_shuffled_by_seed_0_unless_another_is_given(processor, tmp_path):
    file = write_samples(tmp_path, 1)
    usual, *seeded = (
        VideoDataset(file, processor, frames=AS_IS, frame_order="shuffled", **seed)[0]["pixel_values_videos"]
        for seed in ({}, {"seed": 0}, {"seed": 1})
    )
    assert [torch.equal(usual, pixels) for pixels in seeded] == [True, False]


def test_prompts_of_a_data_set_end_before_the_answer_and_are_made_once(processor, tmp_path):
    data = VideoDataset(write_samples(tmp_path, 1), processor, frames=AS_IS, cache=True)
    prompts = data.as_prompts()
    count = len(prompts[0]["input_ids"])
    assert count < len(data[0]["input_ids"])
    assert torch.equal(prompts[0]["input_ids"], data[0]["input_ids"][:count])
    assert data.as_prompts() is prompts
    assert prompts.as_prompts() is prompts
    assert data.as_prompts("reversed") is not prompts


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"frame_order": "backwards"}, "frame_order is 'backwards'"),
        ({"on_bad_sample": "ask"}, "on_bad_sample is 'ask'"),
        ({"frame_order": "shuffled", "seed": -1}, "seed is -1, expected a number of at least 0"),
    ],
    ids=["order", "bad", "seed"],
)
def test_wrong_options(processor, options, error):
    with pytest.raises(ConfigError, match=error):
        VideoDataset([], processor, **options)


# ---- batches


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding(processor, tmp_path, side):
    write_video(tmp_path / "a.mp4", moving_square("left"))
    text = jsonl(
        tmp_path / "data.jsonl",
        sample([{"type": "video", "video": "a.mp4", "nframes": 4}, {"type": "text", "text": "Which way?"}]),
        sample("Which way, in words?", answer="up"),
    )
    items = [VideoDataset(text, processor, frames=AS_IS, on_bad_sample="error")[i] for i in range(2)]
    batch = Collator.of(processor, side=side)(items)
    longest = max(len(item["input_ids"]) for item in items)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (2, longest)
    for row, item in enumerate(items):
        kept = batch["attention_mask"][row].bool()
        for key in ("input_ids", "labels", *(["mm_token_type_ids"] if "mm_token_type_ids" in batch else [])):
            expected = item.get(key, torch.zeros_like(item["input_ids"]))
            assert torch.equal(batch[key][row][kept], expected)
        assert kept[0 if side == "right" else -1]
        assert (batch["labels"][row][~kept] == IGNORE).all()
    assert torch.equal(batch["pixel_values_videos"], items[0]["pixel_values_videos"])


def test_cache_decodes_once(processor, tmp_path):
    dataset = VideoDataset(write_samples(tmp_path, 2), processor, frames=AS_IS, cache=True)
    first = dataset[0]
    prompts = dataset.as_prompts("reversed", 1)
    prompt = prompts[0]
    for file in tmp_path.glob("*.mp4"):
        file.unlink()
    assert dataset[0] is first
    assert dataset.as_prompts("reversed", 1)[0] is prompt
    assert isinstance(dataset[1], BadSample)
