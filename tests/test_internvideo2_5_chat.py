"""InternVideo2.5-Chat put together from transformers' parts: the published code's numbers, and everything that is done with it."""

import json

import full_size_chat
import internvideo2_5_chat as tiny
import pytest
import torch
from safetensors import safe_open

from sta_adapter.errors import CheckpointError
from sta_adapter.loading import load_model

CASES = list(tiny.CASES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_published(tmp_path_factory.mktemp("published"))


@pytest.fixture
def model(folder):
    return tiny.tiny(load_model(folder, dtype="fp32", device="cpu"))


@pytest.fixture(scope="module")
def goldens():
    with safe_open(tiny.GOLDENS, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def assert_close(found, expected):
    """To 1e-5 of the greatest number."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("case", CASES)
def test_visual_tokens_are_the_published_ones(model, goldens, case):
    with torch.no_grad():
        assert_close(model.extract_feature(tiny.pixels(tiny.CASES[case][0])), goldens[0][f"{case}.features"])


@pytest.mark.parametrize("case", CASES)
def test_logits_and_loss_are_the_published_ones(model, goldens, case):
    (ids, mask), rows = tiny.prompts(case), tiny.pixels(tiny.CASES[case][0])
    with torch.no_grad():
        out = model(rows, ids, mask, image_flags=torch.ones(len(rows), 1, dtype=torch.long), labels=ids)
    seen = mask[:, ::7].bool()
    assert_close(out.logits[:, ::7][seen], goldens[0][f"{case}.logits"][seen])
    if mask.all():
        assert_close(out.loss, goldens[0][f"{case}.loss"])


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_are_the_published_ones(model, goldens, case):
    (ids, mask), rows = tiny.prompts(case), tiny.pixels(tiny.CASES[case][0])
    options = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False, "pad_token_id": tiny.EOS}
    said = model.generate(rows, ids, mask, eos_token_id=tiny.END, **options)
    assert said[:, : ids.shape[1]].tolist() == ids.tolist()
    assert said[:, ids.shape[1] :].tolist() == goldens[0][f"{case}.tokens"].tolist()


@pytest.mark.parametrize("name", list(tiny.CHATS))
def test_chats_are_the_published_ones(model, goldens, name):
    said, ids, tokens = tiny.run_chat(model, tiny.tokenizer(), name)
    assert ids.tolist() == goldens[0][f"{name}.input_ids"].tolist()
    assert tokens.tolist() == goldens[0][f"{name}.tokens"].tolist()
    assert said == json.loads(goldens[1][name])


def test_a_chat_gives_the_first_of_several_answers(model):
    beams = {"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 3, "do_sample": False}
    rows, words = tiny.pixels(4), tiny.tokenizer()
    both = model.batch_chat(words, rows, ["Which way?"], beams, num_patches_list=[4])
    assert len(both) == 2
    assert model.chat(words, rows, "Which way?", beams) == both[0]


def test_a_checkpoint_made_from_our_names_has_the_published_ones():
    _, published, to_ours = full_size_chat.internvideo2_5()
    assert full_size_chat.full_shapes(tiny.CONFIG, published, to_ours) == published


def test_a_conversation_of_no_known_form_is_told_of(model):
    model.config.template = "phi3-chat"
    with pytest.raises(CheckpointError, match="template is 'phi3-chat'; expected one of internvl2_5, internlm2-chat"):
        model.chat(None, None, "Who?", {})
