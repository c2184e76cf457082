"""Which rule text is numbered by: asked of the model, switched, written into adapters, and warned of."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from cases import make_qwen2_vl, make_qwen2_vl_tower, qwen2_vl_prompt
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from qwen2_vl_prompts import (
    END,
    IMAGE,
    NATIVE,
    START,
    VIDEO,
    batch_of,
    is_transformers_5,
    needs_seams,
    transformers_version,
)
from tiny_qwen import make_processor, save_base, write_samples

from sta_adapter import inject_sta, load_sta
from sta_adapter.backbones import qwen2_vl_position_hooks
from sta_adapter.backbones.qwen2_vl_position_rules import OriginalPositions
from sta_adapter.backbones.qwen2_vl_positions import find_owner, restore_original_positions
from sta_adapter.backbones.qwen2_vl_rope_index import RopeIndex
from sta_adapter.backbones.qwen2_vl_text_positions import RULES, rule_of_training
from sta_adapter.backbones.videorope import apply_videorope
from sta_adapter.cli import cli
from sta_adapter.compatibility.position_seams import forget_earlier_batches
from sta_adapter.demo import TINY_BASE
from sta_adapter.errors import ConfigError, InjectionError, LayoutError, STAWarning
from sta_adapter.injection.text_positions import use_positions_of
from sta_adapter.loading import load_model
from sta_adapter.text_positions import rule_in_use, use_positions

SPECIAL = [IMAGE, VIDEO, START, END, 154]
other_rule = pytest.mark.skipif(
    transformers_version() < (5, 3), reason="earlier transformers has the rule of the training"
)


def make_qwen2_5_vl():
    """A tiny Qwen2.5-VL: windows of one merged patch, two temporal positions a second."""
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "Qwen2_5_VLConfig"):
        pytest.skip("this release of transformers has no qwen2_5_vl")
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "in_channels": 3, "out_hidden_size": 32,
        "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 8,
        "fullatt_block_indexes": [1], "tokens_per_second": 2,
    }  # fmt: skip
    text = {
        "vocab_size": 160, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 512, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
    }  # fmt: skip
    ids = {"image_token_id": 150, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
    by_part = {"text_config": text} if is_transformers_5() else text
    config = transformers.Qwen2_5_VLConfig(vision_config=vision, **by_part, **ids)
    torch.manual_seed(0)
    return transformers.Qwen2_5_VLForConditionalGeneration(config).eval()


def clip_prompt(frames, seconds):
    """A prompt with a clip of so many temporal steps of one merged patch, and text behind it."""
    batch = qwen2_vl_prompt(frames)
    return {**batch, "second_per_grid_ts": torch.tensor([seconds])}


def positions_of(model, frames, seconds):
    batch = clip_prompt(frames, seconds)
    names = ("input_ids", "attention_mask", "video_grid_thw", "mm_token_type_ids", "second_per_grid_ts")
    found, deltas = model.model.get_rope_index(**{name: batch[name] for name in names if name in batch})
    return found[:, 0], deltas


@needs_seams
def test_two_models_in_one_are_not_told_apart():
    two = torch.nn.ModuleList([make_qwen2_vl(), make_qwen2_vl()])
    with pytest.raises(InjectionError, match="ModuleList holds 2 Qwen2-VL models; pass one of them"):
        find_owner(two)
    assert find_owner(two[0]) is two[0].model
    with pytest.raises(InjectionError, match="Linear is no Qwen2-VL and holds none"):
        find_owner(torch.nn.Linear(2, 2))


def test_a_model_is_asked_for_its_rule():
    model = make_qwen2_vl()
    assert rule_in_use(model) == NATIVE
    assert rule_of_training(model) == "original"
    assert rule_in_use(model.to("meta")) == NATIVE
    assert rule_in_use(make_qwen2_vl_tower()) is None
    assert rule_in_use(torch.nn.Linear(2, 2)) is None


@needs_seams
def test_a_class_of_ones_own_follows_the_family_it_comes_from():
    from transformers import Qwen2VLModel

    class ColQwen2(Qwen2VLModel):
        """As others name theirs."""

    model = ColQwen2(make_qwen2_vl().config)
    inject_sta(use_positions(model))
    assert rule_in_use(model) == "original"


@needs_seams
def test_rules_are_switched_and_switched_back():
    model = make_qwen2_vl()
    for name in RULES:
        assert rule_in_use(use_positions(model, name)) == (name if "seconds" not in name else rule_in_use(model))
    assert rule_in_use(use_positions(model, "transformers")) == NATIVE
    assert "get_rope_index" not in vars(model.model)
    assert rule_in_use(use_positions(model)) == "original"
    assert rule_in_use(restore_original_positions(make_qwen2_vl())) == "original"


def test_a_forward_has_the_positions_of_the_training_each_time():
    """Before transformers 4.49, those of a Qwen2-VL that doesn't generate were not asked for, or only once."""
    model = use_positions(make_qwen2_vl().eval())
    batch = batch_of([(2,), (3, 2, 3), (4,), (2, 2)], [(5,)], [(1,), (2, 1, 2), (2,)])
    expected, _ = RopeIndex(OriginalPositions(), model.config, ())(**batch)
    seen = []
    text = getattr(model.model, "language_model", model.model)
    text.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["position_ids"][-3:]), with_kwargs=True)
    for _ in range(3):
        model(**batch)
    kept = batch["attention_mask"] == 1  # those of padding differ, and reach nothing
    assert all(torch.equal(found[:, kept], expected[:, kept]) for found in seen)
    assert len(seen) == 3


def test_a_text_behind_clips_is_numbered_by_itself():
    """transformers 5.2 and 5.3 go on from the clips of the batch before, and fail where that had more rows."""
    model = make_qwen2_vl().eval()
    text = batch_of([(5,)])
    expected = model(**text).logits
    model(**batch_of([(2,), (3, 2, 3), (4,)], [(1,), (2, 1, 2), (2,)]))
    forget_earlier_batches(model, text)
    torch.testing.assert_close(model(**text).logits, expected)
    assert model.generate(**text, max_new_tokens=2, do_sample=False).shape == (1, 7)


def test_qwen2_vl_generates_with_a_cache_what_it_computes_without():
    """Also behind padding, which transformers 4.54 to 4.56 leave out of what they count on from."""
    model = use_positions(make_qwen2_vl().eval())
    for rows in ([[(2,), (3, 2, 3), (4,)], [(1,), (2, 1, 2), (2,)]], [[(7,)]]):
        batch = batch_of(*rows)
        tokens, mask, expected = batch["input_ids"], batch["attention_mask"], []
        with torch.no_grad():
            answer = model.generate(
                **batch,
                max_new_tokens=5,
                do_sample=False,
                eos_token_id=None,
                suppress_tokens=SPECIAL,
                return_dict_in_generate=True,
                output_scores=True,
            )
            for _ in range(5):
                longer = {**batch, "input_ids": tokens, "attention_mask": mask}
                if "mm_token_type_ids" in batch:
                    longer["mm_token_type_ids"] = (tokens == IMAGE).int() + 2 * (tokens == VIDEO).int()
                scores = model(**longer).logits[:, -1]
                scores[:, SPECIAL] = -torch.inf
                expected.append(scores)
                tokens = torch.cat([tokens, scores.argmax(-1, keepdim=True)], dim=1)
                mask = torch.cat([mask, mask[:, -1:]], dim=1)
        assert torch.equal(answer.sequences, tokens)
        torch.testing.assert_close(torch.stack(answer.scores), torch.stack(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(transformers_version() >= (4, 49), reason="later releases ask for positions in each forward")
def test_early_releases_are_switched_and_switched_back():
    model = make_qwen2_vl()
    before = set(vars(model)), len(model._forward_pre_hooks)
    for name, expected in (("trained", "original"), ("sequential", "sequential"), ("original", "original")):
        assert rule_in_use(use_positions(model, name)) == expected
    assert rule_in_use(copy.deepcopy(model)) == "original"
    assert rule_in_use(use_positions(model, "transformers")) == "sequential"
    assert (set(vars(model)), len(model._forward_pre_hooks)) == before
    with pytest.raises(InjectionError, match=r"4\.52 and newer ones can"):
        use_positions(model, "rows-and-columns")


@needs_seams
def test_videorope_is_a_rule_of_its_own():
    model = apply_videorope(make_qwen2_vl())
    assert rule_in_use(model) == rule_of_training(model) == "videorope"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inject_sta(use_positions(model))
    for rule in ("original", "transformers"):
        with pytest.raises(InjectionError, match="remove_videorope"):
            use_positions(model, rule)
    assert rule_in_use(model) == "videorope"


@pytest.mark.parametrize("name", ["Original", "", "trained "])
def test_an_unknown_rule_is_an_error(name):
    with pytest.raises(ConfigError, match="expected one of original, rows-and-columns"):
        use_positions(make_qwen2_vl(), name)
    with pytest.raises(ConfigError, match="rule is None"):
        use_positions(make_qwen2_vl(), None)


def test_a_base_may_say_which_rule_it_was_trained_by():
    model = load_model(TINY_BASE, device="cpu")
    assert rule_of_training(model) == "rows-and-columns"
    model.config.text_positions = "columns"
    with pytest.raises(ConfigError, match="text_positions: 'columns'; expected one of"):
        use_positions(model)


@needs_seams
@settings(max_examples=30, deadline=None)
@given(frames=st.integers(1, 9), seconds=st.floats(0.03125, 8, width=32))
def test_qwen2_5_vl_counts_time_as_its_own_training_code_does(frames, seconds):
    model = use_positions(make_qwen2_5_vl())
    positions, deltas = positions_of(model, frames, seconds)
    times = [int(torch.tensor(k) * torch.tensor(seconds) * 2) for k in range(frames)]
    clip = [1 + t for t in times for _ in range(4)]
    after = max(1 + times[-1], 2) + 1
    assert positions[0].tolist() == [0, *clip, after, after + 1, after + 2]
    assert positions[1].tolist() == [0, *[1, 1, 2, 2] * frames, after, after + 1, after + 2]
    assert positions[2].tolist() == [0, *[1, 2, 1, 2] * frames, after, after + 1, after + 2]
    assert deltas.tolist() == [[after + 3 - len(positions[0])]]


@needs_seams
def test_qwen2_5_vl_needs_the_seconds_of_a_step():
    model = use_positions(make_qwen2_5_vl())
    batch = clip_prompt(3, 0.5)
    del batch["second_per_grid_ts"]
    with pytest.raises(
        LayoutError, match="second_per_grid_ts is None; a clip of several temporal steps needs the seconds"
    ):
        model(**batch)
    with pytest.raises(LayoutError, match="second_per_grid_ts is nan"):
        model(**batch, second_per_grid_ts=torch.tensor([torch.nan]))


def test_qwen2_5_vl_generates_with_a_cache_what_it_computes_without():
    model = use_positions(make_qwen2_5_vl())
    batch = clip_prompt(5, 0.5)
    with torch.no_grad():
        answer = model.generate(**batch, max_new_tokens=6, do_sample=False, eos_token_id=None)
        tokens = batch["input_ids"]
        for _ in range(6):
            longer = {**batch, "input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
            if "mm_token_type_ids" in batch:
                longer["mm_token_type_ids"] = 2 * (tokens == VIDEO).int()
            tokens = torch.cat([tokens, model(**longer).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(answer, tokens)


@other_rule
def test_injection_warns_with_the_line_that_mends_it():
    model = make_qwen2_vl()
    with pytest.warns(STAWarning, match=f"rule '{NATIVE}'.*was trained with 'original'") as caught:
        handle = inject_sta(model)
    assert caught[0].filename == __file__
    line = str(caught[0].message).split("To use that: ")[1]
    exec(line, {"model": model})
    assert rule_in_use(model) == "original"
    handle.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inject_sta(model)


@other_rule
def test_a_warning_made_an_error_leaves_the_model_as_it_was():
    model = make_qwen2_vl()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(STAWarning):
            inject_sta(model)
    assert not any("sta" in dict(module.named_children()) for module in model.modules())


def saved(folder, rule, monkeypatch=None):
    """An adapter trained with a rule."""
    model = use_positions(make_qwen2_vl(), rule)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", STAWarning)
        inject_sta(model).save_pretrained(folder)
    return folder


def test_an_adapter_says_its_rule_and_loading_compares(tmp_path):
    folder = saved(tmp_path / "adapter", "transformers")
    assert json.loads((folder / "sta_config.json").read_text())["positions"] == NATIVE
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_sta(make_qwen2_vl(), folder)


@needs_seams
def test_loading_warns_of_another_rule(tmp_path):
    other = next(name for name in ("rows-and-columns", "original") if name != NATIVE)
    folder = saved(tmp_path / "adapter", other)
    model = make_qwen2_vl()
    with pytest.warns(STAWarning, match=f"rule '{NATIVE}'.*this adapter was trained with '{other}'"):
        load_sta(model, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_sta(use_positions(make_qwen2_vl(), other), folder)


@other_rule
def test_an_adapter_without_the_field_is_warned_of_as_its_base_is(tmp_path):
    folder = saved(tmp_path / "adapter", "original")
    file = folder / "sta_config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "positions"}))
    with pytest.warns(STAWarning, match="the base of Qwen2VLForConditionalGeneration was trained with 'original'"):
        load_sta(make_qwen2_vl(), folder)


@needs_seams
@pytest.mark.parametrize(
    ("choice", "rule", "expected"),
    [
        (None, None, "original"),
        (None, "rows-and-columns", "rows-and-columns"),
        ("trained", "rows-and-columns", "original"),
        ("transformers", "original", NATIVE),
    ],
)
def test_a_command_takes_its_choice_then_the_adapter_s_then_the_base_s(choice, rule, expected):
    assert rule_in_use(use_positions_of(make_qwen2_vl(), choice, rule)) == expected


@needs_seams
@pytest.mark.parametrize(("options", "rule"), [([], "original"), (["--positions", "transformers"], NATIVE)])
def test_training_writes_the_rule_and_evaluation_takes_it(tmp_path, monkeypatch, options, rule):
    base = save_base(tmp_path / "base", make_processor(tmp_path / "processor"))
    data = write_samples(tmp_path, 2)
    out = tmp_path / "run"
    line = ["train", "--model", str(base), "--data", str(data), "--out", str(out), "--max-steps", "1", "--stage", "1"]
    done = CliRunner().invoke(cli, [*line, "--batch-size", "2", *options], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert json.loads((out / "sta_config.json").read_text())["positions"] == rule
    seen = []
    import sta_adapter.evaluation.evaluator as evaluation

    measure = evaluation.evaluate
    monkeypatch.setattr(
        evaluation, "evaluate", lambda model, *a, **k: (seen.append(rule_in_use(model)), measure(model, *a, **k))[1]
    )
    line = ["evaluate", "--model", str(base), "--adapter", str(out), "--data", str(data), "--num-workers", "0"]
    done = CliRunner().invoke(cli, line, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert seen == [rule]


@needs_seams
@pytest.mark.skipif(NATIVE == "unknown", reason="there the rule itself is another one")
def test_a_release_that_forgets_padding_when_it_generates_is_told_of(monkeypatch):
    monkeypatch.setattr(qwen2_vl_position_hooks, "generates_behind_padding", lambda: True)
    model = make_qwen2_vl()
    model.config.text_positions = NATIVE
    with pytest.warns(STAWarning, match=rf"forgets the padding .* To mend that: .*use_positions\(model, '{NATIVE}'\)"):
        handle = inject_sta(model)
    handle.remove()
    use_positions(model, NATIVE)
    with warnings.catch_warnings():
        warnings.simplefilter("error", STAWarning)
        inject_sta(model)
    assert rule_in_use(use_positions(model, "transformers")) == NATIVE
