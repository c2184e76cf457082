"""Chat templates of the shape that each supported model has, and what of a conversation is learned with them."""

import pytest
from tiny_qwen import make_model, make_processor, moving_square, write_video

from sta_adapter.data import BadSample, Collator, FrameSettings, VideoDataset
from sta_adapter.data.chat_encoding import IGNORE, encode, encode_answer, encode_prompt
from sta_adapter.data.chat_template import grown
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
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% for part in m['content'] if part['type'] != 'text' %}" + VISUAL + "{{ '\n' }}{% endfor %}"
    "{% for part in m['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}" + ASK
)
SPACED = (  # an answer stands behind a space and a new line, and is asked for without the space
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' }}"
    "{% for part in m['content'] if part['type'] != 'text' %}" + VISUAL + "{% endfor %}"
    "{% for part in m['content'] if part['type'] == 'text' %}{{ '\n' + part['text'] }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}" + ASK
)
BLOCK = "<think>\n\n</think>\n\n"
REASONED = (  # reasoning, or an empty place for it, in front of answers to the last question alone
    "{% set last = namespace(user=0) %}{% for m in messages if m['role'] == 'user' %}{% set last.user = loop.length %}{% endfor %}"
    "{% set seen = namespace(users=0) %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% set said = m['content'] | map(attribute='text') | join | trim %}"
    "{% set why = said.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in said else '' %}"
    "{% if seen.users == last.user KEPT %}{{ '<think>\n' + why + '\n</think>\n\n' }}{% endif %}"
    "{{ said.split('</think>')[-1].lstrip('\n') }}"
    "{% else %}{% if m['role'] == 'user' %}{% set seen.users = seen.users + 1 %}{% endif %}" + PARTS + "{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '\n</think>\n\n' }}{% endif %}{% endif %}"
)
# name: the template, and what a learned answer ends with
TEMPLATES = {
    "qwen2_vl": ("{% for m in messages %}" + DEFAULT_SYSTEM + CHATML_TURN + "{% endfor %}" + ASK, "<|im_end|>"),
    "qwen2_5_vl": ("{% for m in messages %}" + DEFAULT_SYSTEM + CHATML_TURN + "{% endfor %}" + ASK, "<|im_end|>"),
    "qwen3_vl": (SYSTEM_FIRST + ASK, "<|im_end|>"),
    "videorope": ("{% for m in messages %}" + DEFAULT_SYSTEM + CHATML_TURN + "{% endfor %}" + ASK, "<|im_end|>"),
    "qwen3_5": (REASONED.replace("KEPT", ""), "<|im_end|>"),
    "qwen3_6": (REASONED.replace("KEPT", "or preserve_thinking"), "<|im_end|>"),
    "internvl3": (VISUALS_FIRST, "<|im_end|>"),
    "llava_onevision": (SPACED, "<|im_end|>"),
    "video_llama_3": (  # visuals each on a line of their own, no system of the template's
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        + PARTS.replace("<|vision_end|>' }}", "<|vision_end|>\n' }}")
        + "{{ '<|im_end|>\n' }}{% endfor %}"
        + ASK,
        "<|im_end|>",
    ),
    "glm4_1v": (
        "{{ '<|endoftext|>' }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% if m['role'] == 'user' %}" + PARTS + "{% else %}{{ m['content'] }}{% endif %}{% endfor %}" + ASK,
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
    """What learns is what the processor makes of the whole text at once, with each answer as it is asked for."""
    processor, end = case
    item = encoded(processor, record)
    plain = [
        {**m, "content": m["content"][0]["text"]} if m["role"] != "user" and end is None else m
        for m in parse_sample(record).messages
    ]
    text = processor.apply_chat_template(plain, tokenize=False, preserve_thinking=True)
    text += "" if end else "<|im_end|>"
    text = text.replace("assistant \n", "assistant\n")
    if BLOCK in text:  # where a template takes the earlier one out
        text = text.replace(BLOCK, "").replace("assistant\n", "assistant\n" + BLOCK)
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


# ---- what published templates write otherwise


@pytest.fixture
def use(processor):
    """Use one of the templates for a while."""
    before = processor.chat_template

    def change(name):
        processor.chat_template = TEMPLATES[name][0]
        return processor

    yield change
    processor.chat_template = before


def talk(*turns):
    return parse_sample({"messages": [{"role": role, "content": text} for role, text in turns]}).messages


ASKED = [("user", "Which way?"), ("assistant", "left"), ("user", "And now?"), ("assistant", "It went up.")]


def words(processor, item):
    return processor.tokenizer.decode([label for label in item["labels"].tolist() if label != IGNORE])


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_asked_and_what_is_answered_make_the_whole(use, name):
    processor, turns = use(name), talk(*ASKED[:2])
    whole = encode(processor, turns, [[], []])["input_ids"].tolist()
    prompt = encode_prompt(processor, turns[:1], [[]])["input_ids"].tolist()
    answer = encode_answer(processor, turns[:1], "left").tolist()
    assert whole[: len(prompt) + len(answer)] == prompt + answer
    assert processor.tokenizer.decode(answer) == "left<|im_end|>"
    options = {"add_generation_prompt": True, "enable_thinking": False, "chat_template": processor.chat_template}
    asked = processor.tokenizer.apply_chat_template(turns[:1], tokenize=False, **options)
    assert processor.tokenizer.decode(prompt) == asked


def test_texts_that_a_template_shows_as_lists_are_given_plainly(use):
    processor = use("glm4_1v")
    item = encode(processor, talk(("system", 'It\'s "brief".\n'), *ASKED), [[]] * 5)
    text = processor.tokenizer.decode(item["input_ids"])
    assert 'system\nIt\'s "brief".\n' in text
    assert "[{" not in text


def test_white_space_of_an_answer_stays_its_own(use):
    processor = use("llava_onevision")
    item = encode(processor, talk(("user", "a"), ("assistant", " e t"), ("user", "e t"), ("assistant", "e")), [[]] * 4)
    assert words(processor, item) == " e t<|im_end|>e<|im_end|>"


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_6"])
@pytest.mark.parametrize("thinks", [False, True], ids=["plain", "reasoned"])
def test_reasoning_is_asked_for_where_an_answer_has_some(use, name, thinks):
    processor = use(name)
    said = "<think>\nIt moves.\n</think>\n\nleft" if thinks else "left"
    record = {"messages": [{"role": role, "content": text} for role, text in (ASKED[0], ("assistant", said))]}
    assert words(processor, VideoDataset([record], processor)[0]) == said.removeprefix("<think>\n") + "<|im_end|>"
    prompt = VideoDataset([record], processor, prompts=True)[0]["input_ids"]
    assert processor.tokenizer.decode(prompt).endswith("assistant\n" + ("<think>\n" if thinks else BLOCK))


def test_reasoning_that_a_template_takes_out_of_earlier_turns(use):
    said = "<think>\nIt moves.\n</think>\n\nleft"
    turns = talk(ASKED[0], ("assistant", said), ASKED[2], ("assistant", said))
    with pytest.raises(DataError, match="rewrites earlier turns when a turn is added"):
        encode(use("qwen3_5"), turns, [[]] * 4)
    kept = said.removeprefix("<think>\n") + "<|im_end|>"
    assert words(use("qwen3_6"), encode(use("qwen3_6"), turns, [[]] * 4)) == 2 * kept


def test_an_answer_without_the_reasoning_that_is_asked_for(tmp_path):
    processor = make_processor(tmp_path)
    processor.tokenizer.add_tokens(["\n\n"])
    processor.chat_template = TEMPLATES["qwen3_5"][0].replace("enable_thinking is false", "false")
    with pytest.raises(
        DataError, match=r"a token straddles .*asked for its reasoning: begin the answer with it, <think>"
    ):
        encode(processor, talk(*ASKED[:2]), [[], []])


def test_words_that_a_template_leaves_out(use):
    turns = [*ASKED[:2], ("system", "Be brief."), *ASKED[2:]]
    processor = use("qwen3_vl")
    assert "Be brief." in processor.tokenizer.decode(encode(processor, talk(*turns), [[]] * 5)["input_ids"])
    processor.chat_template = processor.chat_template.replace(
        "(loop.first and m['role'] == 'system')", "m['role'] == 'system'"
    )
    with pytest.raises(
        DataError, match=r"leaves out what the system says, 'Be brief\.'; expected it to write every turn"
    ):
        encode(processor, talk(*turns), [[]] * 5)


@pytest.mark.parametrize("role", ["user", "assistant"])
@pytest.mark.parametrize("token", ["<|im_start|>", "<|endoftext|>", "<|im_end|>"])
def test_tokens_that_set_turns_off_are_no_words(use, role, token):
    turns = [(who, f"a{token}user" if who == role else text) for who, text in ASKED[:2]]
    record = {"messages": [{"role": who, "content": text} for who, text in turns]}
    item = VideoDataset([record], use("qwen2_vl"))[0]
    assert isinstance(item, BadSample)
    assert f"a text contains {token}, a token that the chat template or a tokenizer writes by itself" in item.reason


def test_special_tokens_that_no_template_writes_are_words(tmp_path):
    """As grounding has them."""
    processor = make_processor(tmp_path)
    processor.tokenizer.add_special_tokens(
        {"additional_special_tokens": [*processor.tokenizer.all_special_tokens, "<box>"]}
    )
    item = encode(processor, talk(ASKED[0], ("assistant", "<box>left<box>")), [[], []])
    assert words(processor, item) == "<box>left<box><|im_end|>"
