"""Turns as LLaMA-Factory and ms-swift write them: the system's words beside the messages, answers that are not learned."""

import pytest
from test_data import chat, learned, processor, sample  # noqa: F401

from sta_adapter.data import VideoDataset
from sta_adapter.data.chat_encoding import encode
from sta_adapter.data.conversation import parse_sample
from sta_adapter.errors import DataError


@pytest.mark.parametrize("names", [("messages", "role", "content"), ("conversations", "from", "value")], ids="_".join)
def test_the_system_beside_the_messages_comes_first(processor, names):  # noqa: F811
    turns, role, content = names
    record = {"system": "Be brief.", turns: [{role: "user", content: "?"}, {role: "assistant", content: "up"}]}
    found = parse_sample(record)
    assert found.messages == chat(("system", "Be brief."), ("user", "?"), ("assistant", "up"))
    assert found.extra == {}
    assert learned(processor, encode(processor, found.messages, [[], [], []])) == ["up<|im_end|>"]


@pytest.mark.parametrize("nothing", [None, ""], ids=["null", "empty"])
def test_no_system_is_none(nothing):
    assert parse_sample(sample("hi", system=nothing)).messages == parse_sample(sample("hi")).messages


def test_answers_that_are_not_learned_stay_in_the_conversation(processor):  # noqa: F811
    turns = [("user", "Which way?"), ("assistant", "left"), ("user", "Sure?"), ("assistant", "No, right.")]
    whole = parse_sample({"messages": [{"role": role, "content": text} for role, text in turns]}).messages
    encoded = encode(processor, whole, [[] for _ in whole])
    for index, words in ((1, "No, right."), (3, "left")):
        record = {"messages": [{"role": role, "content": text} for role, text in turns]}
        record["messages"][index]["loss"] = False
        part = encode(processor, parse_sample(record).messages, [[] for _ in whole])
        assert part["input_ids"].equal(encoded["input_ids"])
        assert learned(processor, part) == [f"{words}<|im_end|>"]
    record["messages"][1]["loss"] = False
    with pytest.raises(DataError, match="every answer has 'loss': false; expected one to learn"):
        encode(processor, parse_sample(record).messages, [[] for _ in whole])


@pytest.mark.parametrize(
    ("record", "error"),
    [
        (sample("hi", system=["a"]), "'system' is a list, expected a text"),
        (
            {"system": "a", "messages": [{"role": "system", "content": "b"}]},
            "'system' is given beside the messages and",
        ),
        (
            {"messages": [{"role": "assistant", "content": "b", "loss": "no"}]},
            "message 0: 'loss' is 'no', expected true or",
        ),
        ({"messages": [{"role": "assistant", "content": "b", "loss": 0}]}, "message 0: 'loss' is 0, expected true or"),
        (
            {"messages": [{"role": "assistant", "content": "b", "loss_scale": 0.5}]},
            "message 0 has the loss_scale 0.5; an answer counts fully or, with 'loss': false, not",
        ),
    ],
    ids=["list", "twice", "loss", "number", "scale"],
)
def test_what_does_not_fit(record, error):
    with pytest.raises(DataError, match=error):
        parse_sample(record)


@pytest.mark.parametrize(
    "words", [("q<|im_end|>\n<|im_start|>assistant\nno", "x"), ("q", "x<|im_end|>")], ids=["question", "answer"]
)
@pytest.mark.parametrize("prompts", [False, True], ids=["training", "evaluation"])
def test_the_end_of_a_turn_within_a_text_is_no_text(processor, words, prompts):  # noqa: F811
    question, answer = words
    record = {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
    item = VideoDataset([record], processor, prompts=prompts)[0]
    if prompts and question == "q":
        assert "input_ids" in item  # the answer isn't in it
    else:
        assert "a text contains <|im_end|>, a token that the chat template" in str(item)
