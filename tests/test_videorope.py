"""VideoRoPE: the golden numbers, generation and training."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from qwen2_vl_prompts import (
    END,
    IMAGE,
    NATIVE,
    START,
    VIDEO,
    batch_of,
    cache_name,
    check_positions,
    needs_seams,
    rows_of_prompts,
    tokens_of,
    transformers_version,
)
from safetensors.torch import load_file

from sta_adapter.backbones.videorope import apply_videorope, remove_videorope
from sta_adapter.backbones.videorope_frequencies import InterleavedFrequencies
from sta_adapter.compatibility.checkpointing import checkpointing_methods
from sta_adapter.errors import CompatibilityError, LayoutError

pytestmark = needs_seams
GOLDEN = Path(__file__).parent / "goldens" / "videorope"
SPECIAL = [IMAGE, VIDEO, START, END, 154]
GREEDY = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": SPECIAL, "eos_token_id": None, "pad_token_id": 0}
BATCHES = {
    "text": ([(7,)], [(4,)]),
    "one-clip": ([(3,), (3, 2, 3), (4,)],),
    "clips-and-images": ([(2,), (2, 2, 2), (1,), (3, 1, 2), (2, 3), (3,)], [(2,), (4, 1, 2), (5,)], [(6,)]),
}
batches = pytest.mark.parametrize("rows", [pytest.param(rows, id=name) for name, rows in BATCHES.items()])


def load_model(**options):
    from transformers import Qwen2VLForConditionalGeneration

    return Qwen2VLForConditionalGeneration.from_pretrained(GOLDEN, **options).float().eval()


@pytest.fixture
def model():
    return load_model(attn_implementation="eager")


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "golden.safetensors")


def inputs_of(golden):
    names = ("input_ids", "attention_mask", "pixel_values_videos", "video_grid_thw")
    types = {"mm_token_type_ids": 2 * (golden["input_ids"] == VIDEO)}
    return {name: golden[name] for name in names} | (types if "mm_token_type_ids" in batch_of([(2,)]) else {})


def assert_near(found, expected, tolerance=1e-4):
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def recomputed(model, batch, steps):
    """Greedy tokens (batch, steps) and their logits, each from a forward over everything so far, without a cache."""
    batch, logits = dict(batch), []
    for _ in range(steps):
        with torch.no_grad():
            last = model(**batch, use_cache=False).logits[:, -1]
        last[:, SPECIAL] = -torch.inf
        logits.append(last)
        extra = {"input_ids": last.argmax(-1, keepdim=True)}
        extra["attention_mask"] = torch.ones_like(extra["input_ids"])
        extra["mm_token_type_ids"] = torch.zeros_like(extra["input_ids"])
        batch |= {name: torch.cat([batch[name], extra[name]], dim=1) for name in extra if name in batch}
    return batch["input_ids"][:, -steps:], torch.stack(logits, dim=1)


def test_golden(model, golden):
    inputs = inputs_of(golden)
    with torch.no_grad():
        plain = model(**inputs).logits
        if NATIVE != "unknown":  # there an untouched model is wrong
            assert_near(plain, golden["mrope_logits"])
        assert apply_videorope(model) is model
        assert_near(model(**inputs).logits, golden["logits"])
        assert torch.equal(model.model.rope_deltas, golden["rope_deltas"])
        remove_videorope(model)
        assert torch.equal(model(**inputs).logits, plain)
    assert (golden["logits"] - golden["mrope_logits"]).abs().max() > 0.01 * golden["logits"].abs().max()


def test_which_axis_turns_which_frequency():
    """Row and column by turns, and the lowest ones temporal; as a method (transformers 5) and as a hook (4)."""
    mixing = InterleavedFrequencies((2, 3, 3))
    axes = torch.tensor([10.0, 11.0, 12.0])[:, None, None, None] + torch.zeros(3, 1, 1, 8)
    expected = [11, 12, 11, 12, 11, 12, 10, 10] * 2
    assert mixing(axes)[0, 0].tolist() == expected
    cos = torch.cat([axes, axes], dim=-1)
    for mixed in mixing(None, (), (cos, cos)):
        assert mixed.shape == cos.shape
        assert mixed[0, 0, 0].tolist() == expected


def test_golden_positions(model, golden):
    apply_videorope(model)
    inputs = inputs_of(golden)
    del inputs["pixel_values_videos"]
    positions, deltas = model.model.get_rope_index(**inputs)
    assert positions.dtype == torch.float32
    assert torch.equal(positions, golden["position_ids"])
    assert torch.equal(deltas, golden["rope_deltas"])


@pytest.mark.parametrize("scale", [pytest.param(2.0, id="2"), pytest.param(0.75, id="0.75")])
@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_follow_the_formula(model, scale, side):
    apply_videorope(model, scale)

    @settings(max_examples=25)
    @given(rows=rows_of_prompts)
    def check(rows):
        batch = batch_of(*rows, side=side, pixels=False)
        check_positions(rows, batch, model.model.get_rope_index(**batch), scale)

    check()


@batches
@pytest.mark.parametrize("types", [pytest.param(True, id="types"), pytest.param(False, id="no-types")])
def test_generation_with_a_cache_equals_recomputation(model, rows, types):
    apply_videorope(model, 1.5)
    batch = batch_of(*rows, types=types)
    tokens, logits = recomputed(model, batch, 4)
    found = model.generate(**batch, **GREEDY, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(found.sequences[:, -4:], tokens)
    finite = torch.isfinite(logits)
    assert_near(torch.stack(found.scores, dim=1)[finite], logits[finite])


@batches
@pytest.mark.parametrize("masked", [True, False], ids=["mask", "no mask"])
def test_forward_with_a_cache_equals_recomputation(model, rows, masked):
    apply_videorope(model)
    name = cache_name(model)
    batch = batch_of(*rows[: None if masked else 1])  # rows of one length, which need no mask
    tokens, logits = recomputed(model, batch, 3)
    mask = batch["attention_mask"]
    with torch.no_grad():
        out = model(**batch, use_cache=True)
        for step in range(2):
            mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=torch.long)], dim=1)
            token = tokens[:, step, None]
            cached = {name: out[name]}
            out = model(input_ids=token, **({"attention_mask": mask} if masked else {}), **cached, use_cache=True)
            finite = torch.isfinite(logits[:, step + 1])
            assert_near(out.logits[:, -1][finite], logits[:, step + 1][finite])


@pytest.mark.parametrize("how", ["keyword", "position", "name of older releases"])
def test_a_cache_is_found_however_it_is_passed(model, how):
    apply_videorope(model)
    owner, batch = model.model, batch_of([(3,), (3, 2, 3), (4,)])
    token = torch.tensor([[5]])
    with torch.no_grad():
        whole = owner(**grown(batch, token)).last_hidden_state[:, -1]
        name = cache_name(owner)
        cache = owner(**batch, use_cache=True)[name]
        if how == "keyword":
            out = owner(input_ids=token, **{name: cache})
        elif how == "position":
            out = owner(token, None, None, cache)
        else:
            renamed = name != "past_key_values"
            with pytest.warns(FutureWarning, match="past_key_values") if renamed else contextlib.nullcontext():
                out = owner(input_ids=token, past_key_values=cache)
    assert_near(out.last_hidden_state[:, -1], whole)


def grown(batch, token):
    more = {"input_ids": token, "attention_mask": torch.ones_like(token), "mm_token_type_ids": torch.zeros_like(token)}
    return {name: torch.cat([value, more[name]], dim=1) if name in more else value for name, value in batch.items()}


def test_a_cache_under_another_name_is_an_error_and_no_number(model):
    apply_videorope(model)
    batch = batch_of([(7,)])
    cache = model.model(**batch, use_cache=True)[cache_name(model)]
    with pytest.raises(CompatibilityError, match=r"given a cache \(DynamicCache\) as 'memory'.*This is transformers"):
        model.model(input_ids=torch.tensor([[5]]), memory=cache)


def test_a_cache_that_another_model_filled_is_an_error_and_no_number(model):
    apply_videorope(model)
    cache = model.model(**batch_of([(7,)]), use_cache=True)[cache_name(model)]
    model.model.rope_deltas = None
    with pytest.raises(LayoutError, match="the cache holds 7 tokens of which this model has not seen the positions"):
        model.model(input_ids=torch.tensor([[5]]), **{cache_name(model): cache})


def test_a_clip_behind_a_cached_prompt_stands_where_it_would_in_one(model):
    apply_videorope(model, 1.5)
    turns, more = ([(3,), (3, 2, 3), (4,)], [(2,), (1, 2, 2), (1,)]), [(2,), (2, 2, 2), (3,)]
    whole, new, name = batch_of(*([*turn, *more] for turn in turns)), len(tokens_of(more)), cache_name(model)
    grid, clips = whole["video_grid_thw"], whole["pixel_values_videos"].split(whole["video_grid_thw"].prod(-1).tolist())

    def part(which, columns):  # of each row its first clip or its second
        tokens = {key: whole[key][:, columns] for key in ("input_ids", "mm_token_type_ids") if key in whole}
        return tokens | {"video_grid_thw": grid[which::2], "pixel_values_videos": torch.cat(clips[which::2])}

    longer = grown(whole, torch.tensor([[5], [6]]))
    mask = longer["attention_mask"]
    with torch.no_grad():
        expected = model(**longer).logits[:, -new - 1 :]
        first = model(**part(0, slice(-new)), attention_mask=mask[:, : -new - 1], use_cache=True)
        second = model(**part(1, slice(-new, None)), attention_mask=mask[:, :-1], use_cache=True, **{name: first[name]})
        third = model(input_ids=longer["input_ids"][:, -1:], attention_mask=mask, **{name: second[name]})
    assert_near(torch.cat([second.logits, third.logits], dim=1), expected)


@batches
def test_generation_goes_on_from_a_cache(model, rows):
    apply_videorope(model)
    batch = batch_of(*rows)
    tokens, logits = recomputed(model, batch, 6)
    options = {**GREEDY, "max_new_tokens": 3, "return_dict_in_generate": True, "output_scores": True}
    first = model.generate(**batch, **options)
    mask = torch.cat([batch["attention_mask"], torch.ones(len(tokens), 3, dtype=torch.long)], dim=1)
    cache = {cache_name(model): first[cache_name(model)]}
    second = model.generate(input_ids=first.sequences, attention_mask=mask, **cache, **options)
    assert torch.equal(second.sequences[:, -6:], tokens)
    finite = torch.isfinite(logits[:, 3:])
    assert_near(torch.stack(second.scores, dim=1)[finite], logits[:, 3:][finite])


@pytest.mark.skipif(transformers_version() == (5, 18), reason="an untouched model's beams of clips are wrong there")
def test_beam_search_with_a_cache_equals_beam_search_without(model):
    apply_videorope(model)
    batch = batch_of(*BATCHES["clips-and-images"])
    found = [model.generate(**batch, **GREEDY, num_beams=2, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*found)


def test_a_static_cache_and_a_prompt_in_chunks(model):
    apply_videorope(model)
    batch = batch_of(*BATCHES["clips-and-images"])
    expected = model.generate(**batch, **GREEDY)
    if transformers_version() >= (4, 54):  # before, the model takes no static cache, or gives no mask to count by
        found = model.generate(**batch, **GREEDY, cache_implementation="static", disable_compile=True)
        assert torch.equal(found, expected)
    if transformers_version() >= (5, 24):  # an untouched model fails until 5.18, and answers otherwise on 5.20
        assert torch.equal(model.generate(**batch, **GREEDY, prefill_chunk_size=5), expected)


@batches
def test_padding_on_the_right_changes_nothing_for_a_row(model, rows):
    apply_videorope(model)
    model.train()
    batch = batch_of(*rows, side="right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    out = model(**batch, labels=labels)
    out.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.model.language_model.parameters())
    left = model(**batch_of(*rows, side="left"))
    for row, mask in enumerate(batch["attention_mask"]):
        length = int(mask.sum())
        assert_near(out.logits[row, :length], left.logits[row, -length:])


def test_a_clip_has_the_same_logits_with_its_neighbours_before_or_without(model):
    apply_videorope(model)
    rows = [[(2,), (3, 2, 2), (3,)], [(9,)]]
    both, alone = batch_of(*rows), batch_of(rows[0])
    assert_near(model(**both).logits[0], model(**alone).logits[0])


def test_text_as_embeddings(model):
    apply_videorope(model)
    batch = batch_of([(7,)], [(4,)])
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    mask = batch["attention_mask"]
    assert_near(model(inputs_embeds=embeddings, attention_mask=mask).logits, model(**batch).logits, 1e-6)
    found = model.generate(inputs_embeds=embeddings, attention_mask=mask, **GREEDY)
    assert torch.equal(found, model.generate(**batch, **GREEDY)[:, -4:])


@pytest.mark.skipif(
    transformers_version() < (5, 3), reason="before transformers 5.3 no argument says what the embeddings are of"
)
def test_clips_as_embeddings(model):
    apply_videorope(model)
    batch = batch_of([(3,), (4, 2, 2), (5,)], [(4,)])
    ids, pixels = batch["input_ids"], batch["pixel_values_videos"]
    embeddings = model.get_input_embeddings()(ids)
    features = model.model.get_video_features(pixels, batch["video_grid_thw"]).pooler_output
    embeddings[ids == VIDEO] = torch.cat(list(features))
    types = batch["mm_token_type_ids"]
    embedded = {key: batch[key] for key in ("attention_mask", "video_grid_thw")} | {"inputs_embeds": embeddings}
    options = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    found, expected = (model.generate(**given, **options) for given in (embedded | {"mm_token_type_ids": types}, batch))
    assert torch.equal(found.sequences, expected.sequences[:, -4:])
    assert_near(torch.stack(found.logits), torch.stack(expected.logits), 1e-6)
    with pytest.raises(LayoutError, match="can't be known without input_ids"):
        model.generate(**embedded, **GREEDY)


def test_gradient_checkpointing(model):
    apply_videorope(model)
    model.train()
    batch = batch_of(*BATCHES["clips-and-images"])
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            checkpointing_methods(model).enable()
        model.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_positions_stay_exact_in_half_precision(model, dtype):
    apply_videorope(model, 0.5)
    model.to(dtype)
    seen = []
    model.model.language_model.rotary_emb.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    batch = batch_of([(3001,), (2, 1, 1), (2,)])
    model.generate(**batch, **{**GREEDY, "max_new_tokens": 2})
    prompt, step = [[*args, *kwargs.values()][1] for args, kwargs in seen]
    assert prompt[0, 0, -5:].tolist() == [3002.0, 3002.5, 3003.5, 3004.5, 3005.5]
    assert step.flatten().tolist() == [3006.5] * 3
