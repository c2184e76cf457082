"""Chat templates of the shape that each supported model has, and what of a conversation is learned with them."""

import pytest
from tiny_qwen import make_model, make_processor, moving_square, write_video

from sta_adapter.data import Collator, FrameSettings, VideoDataset
from sta_adapter.data.chat_encoding import IGNORE, grown
from sta_adapter.data.conversation import parse_sample
from sta_adapter.errors import DataError

AS_IS = FrameSettings(min_tokens=None, max_tokens=None)
VISUAL = "{{ '<|vision_start|><|' + part['type'] + '_pad|><|vision_end|>' }}"
PARTS = (
    "{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}" + VISUAL + "{% endif %}{% endfor %}"
)  # fmt: skip
CHATML_TURN = "{{ '<|im_start|>' + m['role'] + '\n' }}" + PARTS + "{{ '<|im_end|>\n' }}"
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
DEFAULT_SYSTEM = (
    "{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
)
SYSTEM_FIRST = (
    "{% if messages[0]['role'] == 'system' %}{{ '<|im_start|>system\n' + messages[0]['content'][0]['text'] + '<|im_end|>\n' }}"
    "{% endif %}{% for m in messages %}{% if not (loop.first and m['role'] == 'system') %}" + CHATML_TURN + "{% endif %}{% endfor %}"
)  # fmt: skip
VISUALS_FIRST = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + SEPARATOR }}"
    "{% for part in m['content'] if part['type'] != 'text' %}" + VISUAL + "{{ '\n' }}{% endfor %}"
    "{% for part in m['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{{ '<|im_end|>' + AFTER }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# name: the template, and what a learned answer ends with
TEMPLATES = {
    "qwen2_vl": ("{% for m in messages %}" + DEFAULT_SYSTEM + CHATML_TURN + "{% endfor %}" + ASK, "<|im_end|>"),
    "qwen2_5_vl": ("{% for m in messages %}" + DEFAULT_SYSTEM + CHATML_TURN + "{% endfor %}" + ASK, "<|im_end|>"),
    "qwen3_vl": (SYSTEM_FIRST + ASK, "<|im_end|>"),
    "videorope": ("{% for m in messages %}" + DEFAULT_SYSTEM + CHATML_TURN + "{% endfor %}" + ASK, "<|im_end|>"),
    "internvl3": (
        VISUALS_FIRST.replace("SEPARATOR", "'\n'").replace("AFTER", "'\n'"),
        "<|im_end|>",
    ),
    "llava_onevision": (
        VISUALS_FIRST.replace("SEPARATOR", "('\n' if m['role'] == 'assistant' else ' ')").replace("AFTER", "''"),
        "<|im_end|>",
    ),
    "video_llama_3": (  # visuals each on a line of their own, no system of the template's
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        + PARTS.replace("<|vision_end|>' }}", "<|vision_end|>\n' }}")
        + "{{ '<|im_end|>\n' }}{% endfor %}"
        + ASK,
        "<|im_end|>",
    ),
    "glm4_1v": (
        "{{ '<|endoftext|>' }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}" + PARTS + "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        None,  # a turn ends where the next begins; the last gets the tokenizer's end
    ),
}


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return make_processor(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """Two clips in one turn, an image between, another clip in a later turn; each of another size or number of frames."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("clips")
    a = write_video(folder / "a.mp4", moving_square("left"))
    b = write_video(folder / "b.mp4", moving_square("right", start=3))
    c = write_video(folder / "c.mp4", moving_square("right", start=6, size=24))
    Image.fromarray(moving_square("left", start=5)[2]).save(folder / "d.png")

    def clip(path, count):
        return {"type": "video", "video": str(path), "nframes": count}

    first = [
        clip(a, 4),
        {"type": "text", "text": "then"},
        {"type": "image", "image": str(folder / "d.png")},
        clip(b, 6),
    ]
    return {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [*first, {"type": "text", "text": "Which way?"}]},
            {"role": "assistant", "content": "left then right"},
            {"role": "user", "content": [clip(c, 2), {"type": "text", "text": "And this?"}]},
            {"role": "assistant", "content": "It went up."},
        ]
    }


@pytest.fixture(params=TEMPLATES)
def case(request, processor):
    template, end = TEMPLATES[request.param]
    before, processor.chat_template = processor.chat_template, template
    yield processor, end
    processor.chat_template = before


def encoded(processor, record):
    return VideoDataset([parse_sample(record)], processor, frames=AS_IS, on_bad_sample="error")[0]


def test_the_assistants_words_alone_are_learned(case, record):
    processor, end = case
    item = encoded(processor, record)
    ids, labels = item["input_ids"].tolist(), item["labels"].tolist()
    assert all(label in (IGNORE, token) for token, label in zip(ids, labels, strict=True))
    learned = processor.tokenizer.decode([label for label in labels if label != IGNORE])
    ends = (end, end) if end else ("", "<|im_end|>")
    assert learned == "left then right" + ends[0] + "It went up." + ends[1]


def test_a_conversation_is_encoded_as_its_template_writes_it(case, record):
    """What learns is what the processor makes of the whole text at once."""
    processor, end = case
    item = encoded(processor, record)
    text = processor.apply_chat_template(parse_sample(record).messages, tokenize=False)
    text += "" if end else "<|im_end|>"
    counts = iter([2 * 4, 3 * 4, 1 * 9])
    for kind, sizes in (("video", counts), ("image", iter([4]))):
        pieces = text.split(f"<|{kind}_pad|>")
        text = pieces[0] + "".join(f"<|{kind}_pad|>" * next(sizes) + piece for piece in pieces[1:])
    assert processor.tokenizer.decode(item["input_ids"]) == text


def test_clips_and_images_reach_the_model_in_order(processor, record):
    """Rows of pixels, grids and placeholders are those of each clip on its own, one after the other."""
    item = encoded(processor, record)
    assert item["video_grid_thw"].tolist() == [[2, 4, 4], [3, 4, 4], [1, 6, 6]]
    assert item["image_grid_thw"].tolist() == [[1, 4, 4]]
    parts = [part for message in record["messages"] for part in message["content"] if isinstance(part, dict)]
    for kind, key in (("video", "pixel_values_videos"), ("image", "pixel_values")):
        start = 0
        for part in (part for part in parts if part["type"] == kind):
            turns = [{"role": "user", "content": [part]}, {"role": "assistant", "content": "x"}]
            alone = encoded(processor, {"messages": turns})[key]
            assert alone.equal(item[key][start : start + len(alone)])
            start += len(alone)
        assert start == len(item[key])


def test_each_clip_changes_what_the_model_says_after_it(processor, record, tmp_path):
    import copy

    import torch

    model = make_model(processor.tokenizer)
    model.eval()

    def logits(changed):
        batch = Collator.of(processor)([encoded(processor, changed)])
        with torch.no_grad():
            return model(**{key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}).logits[0]

    plain = logits(record)
    ids = encoded(processor, record)["input_ids"]
    pads = (ids == processor.tokenizer.convert_tokens_to_ids("<|video_pad|>")).nonzero()[:, 0].tolist()
    firsts = [place for place in pads if place - 1 not in pads]
    other = write_video(tmp_path / "other.mp4", moving_square("left", start=1))
    large = write_video(tmp_path / "large.mp4", moving_square("left", start=1, size=24))
    for (turn, part, path), first in zip([(1, 0, other), (1, 3, other), (3, 0, large)], firsts, strict=True):
        changed = copy.deepcopy(record)
        changed["messages"][turn]["content"][part]["video"] = str(path)
        moved = (logits(changed) - plain).abs().amax(-1) > 1e-6
        assert not moved[:first].any()
        assert moved[first:].any()


def test_a_template_that_rewrites_a_turn_is_quoted_from_there_on():
    assert grown("user: hi", "user: hi assistant: ho") == "user: hi assistant: ho"
    with pytest.raises(DataError, match="when a turn is added: 'hi' became 'bye, assistant: ho'"):
        grown("user: hi", "user: bye, assistant: ho")
