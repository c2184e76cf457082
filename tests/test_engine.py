"""Evaluations by an engine, without one: a stand-in that answers by rules, the tree of options, and what commands refuse."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from tiny_qwen import make_processor, save_base, write_samples

from sta_adapter.cli import cli
from sta_adapter.cli.measurement import _some, check_options, sentences
from sta_adapter.data import FrameSettings, VideoDataset
from sta_adapter.data.chat_encoding import Prompt
from sta_adapter.data.message import Visual
from sta_adapter.errors import CompatibilityError, ConfigError, DataError, InjectionError, MissingExtraError
from sta_adapter.evaluation import EvaluationResult, Prediction, evaluate
from sta_adapter.evaluation.answering import option_tokens
from sta_adapter.evaluation.engine import agreement
from sta_adapter.integrations.vllm import engine as vllm_engine
from sta_adapter.integrations.vllm.engine import VLLMEngine, request
from sta_adapter.integrations.vllm.frames import clip_facts
from sta_adapter.integrations.vllm.option_scores import MOST_IDS, OptionTree


class Rules:
    """An engine that writes "left" behind every prompt, and prefers the option of more tokens."""

    max_length = 512

    def __init__(self, tokenizer):
        self.tokenizer, self.asked = tokenizer, []

    def fingerprint(self):
        return {"engine": "rules 1"}

    def write(self, prompts, max_new_tokens):
        self.asked += prompts
        return [self.tokenizer("left<|im_end|>")["input_ids"] for _ in prompts]

    def log_likelihoods(self, prompts, options):
        self.asked += prompts
        return [[float(len(answer)) for answer in answers] for answers in options]


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return make_processor(tmp_path_factory.mktemp("words"))


@pytest.fixture
def dataset(processor, tmp_path):
    return VideoDataset(write_samples(tmp_path, 4), processor)


def with_options(dataset):
    rows = [
        {**json.loads(line), "options": ["left", "right", "down and up"]} for line in dataset.read_text().splitlines()
    ]
    dataset.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return dataset


def test_an_engine_answers_the_prompts_that_a_model_would_get(dataset, processor):
    engine = Rules(processor.tokenizer)
    result = evaluate(engine, dataset, frame_order="reversed", num_workers=2)
    assert [p.prediction for p in result.predictions] == ["left"] * 4
    assert result.accuracy == 0.5
    encoded = list(dataset.as_prompts("reversed"))
    plain = list(dataset.as_prompts("ordered", for_engine=True))
    for (prompt, ids), item, ordered in zip(engine.asked, encoded, plain, strict=True):
        assert ids == item["input_ids"].tolist()
        assert len(prompt.tokens) < len(ids)
        [visual], [forward] = prompt.visuals, ordered.prompt.visuals
        assert visual.resized
        assert prompt.settings["do_resize"] is False
        np.testing.assert_array_equal(visual.pixels, forward.pixels[::-1])


def test_options_are_chosen_by_their_log_likelihood(processor, tmp_path):
    dataset = VideoDataset(with_options(write_samples(tmp_path, 2)), processor)
    engine = Rules(processor.tokenizer)
    found = evaluate(engine, dataset).predictions
    assert [p.prediction for p in found] == ["down and up"] * 2
    assert found[0].scores[2] > found[0].scores[0]
    assert [p.prediction for p in evaluate(engine, dataset, choose="generate").predictions] == ["left"] * 2


def test_what_was_asked_already_belongs_to_the_engine(dataset, processor, tmp_path):
    engine, kept = Rules(processor.tokenizer), tmp_path / "kept.jsonl"
    first = evaluate(engine, dataset, predictions_file=kept)
    engine.asked.clear()
    assert evaluate(engine, dataset, predictions_file=kept).predictions == first.predictions
    assert engine.asked == []
    engine.fingerprint = lambda: {"engine": "rules 2"}
    with pytest.raises(ConfigError, match="engine"):
        evaluate(engine, dataset, predictions_file=kept)


def test_a_files_clips_are_sampled_as_asked(processor, tmp_path):
    engine, file = Rules(processor.tokenizer), write_samples(tmp_path, 2)
    file.write_text(file.read_text().replace(', "nframes": 4', ""))
    evaluate(engine, file, processor=processor, frame_settings=FrameSettings(nframes=2))
    assert [len(visual.pixels) for prompt, _ in engine.asked for visual in prompt.visuals] == [2, 2]


def test_the_bar_says_what_is_measured(dataset, processor, capsys):
    evaluate(Rules(processor.tokenizer), dataset, progress="with the adapter")
    assert "with the adapter" in capsys.readouterr().err


def test_an_engine_is_not_told_where_answers_end(dataset, processor):
    with pytest.raises(ConfigError, match="stop_at_letter is for models"):
        evaluate(Rules(processor.tokenizer), dataset, choose="generate", stop_at_letter=True)


def test_prompts_without_room_are_bad_samples(dataset, processor):
    engine = Rules(processor.tokenizer)
    engine.max_length = 40
    result = evaluate(engine, dataset)
    assert len(result.bad_samples) == 4
    assert "more than the 40 of the engine" in result.bad_samples[0]
    dataset.encoder.on_bad_sample = "error"
    with pytest.raises(DataError, match="or a larger max_model_len"):
        evaluate(engine, dataset)


def test_room_is_for_the_options_where_these_are_scored(processor, tmp_path):
    """An answer that nobody writes takes none, and an option longer than it must fit."""
    dataset = VideoDataset(with_options(write_samples(tmp_path, 2)), processor)
    engine = Rules(processor.tokenizer)
    evaluate(engine, dataset)
    longest = len(engine.asked[0][1]) + max(
        len(option) for option in option_tokens(processor, dataset.samples[0], "loglikelihood")
    )
    for room, bad in ((longest, 0), (longest - 1, 2)):
        engine.max_length = room
        for new in (1, 400):
            assert len(evaluate(engine, dataset, max_new_tokens=new).bad_samples) == bad


def results(*said, scores=None):
    return EvaluationResult([Prediction(i, f"line {i}", None, "a", s, s == "a", scores) for i, s in enumerate(said)])


def test_agreement_counts_equal_answers_and_the_largest_difference():
    found = agreement(results("a", "b", scores=[1.0, 2.0]), results("a", "c", scores=[1.5, 2.25]))
    assert found == {
        "samples": 2, "equal": 1, "correct": {"engine": 1, "transformers": 1}, "largest_difference": 0.5,
    }  # fmt: skip
    assert agreement(results("a"), results("a"))["largest_difference"] is None
    said = sentences({"name": "vllm", "version": "1", "agreement": {"adapter": found}})
    assert (
        said[1]
        == "adapter: 1 of 2 answers are those of transformers; log-likelihoods of options are at most 0.5 apart."
    )
    assert "Not compared" in sentences({"name": "vllm", "version": "1", "agreement": {}})[1]


def test_agreement_is_over_the_samples_that_both_could_use():
    """A sample without room in the engine is a bad one there, and must not cost the outcome of all others."""
    found = agreement(results("a"), results("a", "b"))
    assert (found["samples"], found["equal"], found["correct"]) == (1, 1, {"engine": 1, "transformers": 1})
    assert agreement(results(), results("a"))["samples"] == 0


@pytest.mark.parametrize(
    ("count", "chosen"),
    [(0, []), (1, [0]), (3, [0, 1, 3]), (4, [0, 1, 2, 3]), (5, [0, 1, 2, 3, 4]), (16, [0, 1, 2, 3, 4])],
)
def test_so_many_samples_are_compared_with_transformers(processor, tmp_path, count, chosen):
    dataset = VideoDataset(write_samples(tmp_path, 5), processor)
    assert _some(dataset, count).samples == [dataset.samples[index] for index in chosen]


def test_the_tree_asks_for_each_beginning_once_and_sums_up():
    options = [[[1, 2, 3], [1, 2], [4]], [[0], [1, 2, 3]]]
    tree, asked = OptionTree(options), []
    for nodes in tree.rounds():
        asked.append(len(nodes))
        lists = tree.padded(nodes)
        assert len({len(ids) for ids in lists}) == 1
        for node, ids in zip(nodes, lists, strict=True):
            assert set(ids) == set(node.following)
            tree.tell(node, {token: -(token + 1.0) / (len(node.before) + 1) for token in node.following})
    assert asked == [2, 4]
    expected = [[sum(-(t + 1.0) / (i + 1) for i, t in enumerate(answer)) for answer in answers] for answers in options]
    assert tree.scores() == expected


def test_more_options_than_vllm_scores_at_once_are_asked_in_parts():
    tree = OptionTree([[[token] for token in range(MOST_IDS + 5)]])
    [nodes] = tree.rounds()
    assert [len(node.following) for node in nodes] == [MOST_IDS, 5]
    assert [len(ids) for ids in tree.padded(nodes)] == [MOST_IDS, MOST_IDS]  # no more than it takes
    for node in nodes:
        tree.tell(node, {token: float(token) for token in node.following})
    assert tree.scores() == [[float(token) for token in range(MOST_IDS + 5)]]


@pytest.mark.parametrize("indices", [[0, 4, 8, 12], [10, 11, 12, 13], [3, 9, 30, 31]], ids=["even", "part", "uneven"])
def test_vllm_is_told_the_seconds_of_a_step_that_training_had(indices):
    from transformers.video_utils import VideoMetadata

    times = {"fps": 4.0, "frames_indices": indices, "total_num_frames": 40, "duration": 10.0}
    clip = Visual("video", np.zeros((4, 8, 8, 3), np.uint8), times, True)
    facts = clip_facts(clip, 2)
    assert facts["do_sample_frames"] is False
    told = VideoMetadata(**{key: value for key, value in facts.items() if key != "do_sample_frames"})
    assert 2 / told.sampled_fps == pytest.approx((indices[2] - indices[0]) / 4.0)
    assert clip_facts(Visual("video", clip.pixels), 2).keys() == {"video_backend", "do_sample_frames"}


def test_a_request_has_the_clips_in_order_and_the_answer_behind():
    clip = Visual("video", np.zeros((2, 8, 8, 3), np.uint8), None, True)
    picture = Visual("image", np.full((1, 8, 8, 3), 7, np.uint8))
    made = request(Prompt([1, 2], [picture, clip], {"do_resize": False}, 2), (9,))
    assert made["prompt_token_ids"] == [1, 2, 9]
    assert made["mm_processor_kwargs"] == {"videos_kwargs": {"do_resize": False}}
    assert np.array(made["multi_modal_data"]["image"][0]).max() == 7
    assert made["multi_modal_data"]["video"][0][0] is clip.pixels
    assert "mm_processor_kwargs" not in request(Prompt([1], [picture], {}))


def given(**changes):
    return {
        "engine": "vllm", "engine_options": None, "check": None, "quantize": None, "device": None, "positions": None,
        "cache": None, "stop_at_letter": False, **changes,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": "transformers", "check": 4}, "--check is for --engine vllm"),
        ({"engine": "transformers", "engine_options": "{}"}, "--engine-options is for --engine vllm"),
        ({"quantize": "4bit"}, "--quantize is for transformers; vLLM takes --engine-options"),
        ({"device": "cpu"}, "--device is for transformers"),
        ({"positions": "transformers"}, "vLLM numbers text as the base was trained"),
        ({"cache": "x"}, "--cache keeps samples as transformers takes them"),
        ({"stop_at_letter": True}, "--stop-at-letter is for transformers"),
        ({"engine_options": "{"}, "is not JSON"),
        ({"engine_options": "[1]"}, "expected an object"),
    ],
    ids=["check", "options", "quantize", "device", "positions", "cache", "letter", "json", "list"],
)
def test_options_that_do_not_go_together_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        check_options(given(**changes))
    assert check_options(given(engine_options='{"seed": 1}')) == {"seed": 1}


def test_without_vllm_the_command_says_how_to_get_it(tmp_path, monkeypatch, processor):
    base = save_base(tmp_path / "base", processor)
    monkeypatch.setitem(__import__("sys").modules, "vllm", None)
    words = [
        "evaluate",
        "--model",
        str(base),
        "--data",
        str(write_samples(tmp_path, 2)),
        "--engine",
        "vllm",
        "--check",
        "0",
    ]
    with pytest.raises(MissingExtraError, match=re.escape("pip install 'sta-adapter[vllm]'")):
        CliRunner().invoke(cli, words, catch_exceptions=False)


def test_the_command_asks_an_engine_and_compares_it_with_the_model(tmp_path, monkeypatch, processor):
    """Twice, as what was found the first time can be thrown away; of the comparison nothing is kept."""

    class Engine(Rules):
        def __init__(self, model, adapter, **how):
            super().__init__(processor.tokenizer)
            made.append((model, adapter, how["most"], how["options"]))

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    made = []
    monkeypatch.setattr(vllm_engine, "VLLMEngine", Engine)
    monkeypatch.setattr("sta_adapter.cli.evaluate.require_packages", lambda what, extras: None)
    base, out = save_base(tmp_path / "base", processor), tmp_path / "out"
    words = ["evaluate", "--model", base, "--data", write_samples(tmp_path, 2), "--engine", "vllm", "--out", out]
    words += ["--engine-options", '{"seed": 1}', "--num-workers", 0, "--max-new-tokens", 1, "--overwrite"]
    for _ in range(2):
        done = CliRunner().invoke(cli, [str(word) for word in words], catch_exceptions=False)
        assert done.exit_code == 0, done.output
    assert made == [(str(base), None, {"video": 1, "image": 0}, {"seed": 1})] * 2
    found = json.loads((out / "results.json").read_text())
    assert found["base"]["ordered"]["overall"]["total"] == found["engine"]["agreement"]["base"]["samples"] == 2
    assert sorted(path.name for path in out.glob("*.jsonl")) == ["base-ordered.jsonl"]


class FakeLLM:
    """What VLLMEngine uses of `vllm.LLM`."""

    def __init__(self, model, **settings):
        if settings.get("seed") == 13:
            try:
                raise ConfigError("at the root of it")
            except ConfigError as error:
                raise ValueError("validation failed") from error
        if settings.get("seed") == 14:
            raise ValueError("no memory")
        core = type("Core", (), {"shutdown": lambda self: None})()
        config = type("Config", (), {"max_model_len": 64})()
        self.llm_engine = type("Engine", (), {"engine_core": core, "model_config": config})()
        self.settings = settings

    def generate(self, prompts, how, use_tqdm):
        return [type("Output", (), {"prompt_token_ids": [*p["prompt_token_ids"], 5], "outputs": []})() for p in prompts]


@pytest.fixture
def fake(monkeypatch):
    import sys
    import types

    package = types.ModuleType("vllm")
    package.LLM = FakeLLM
    package.SamplingParams = lambda **settings: settings
    monkeypatch.setitem(sys.modules, "vllm", package)
    monkeypatch.setattr(vllm_engine, "_saved_dtype", lambda model, source: "float32")


def test_prompts_that_become_other_tokens_are_an_error(fake, tmp_path):
    with VLLMEngine(str(tmp_path), options={"max_model_len": 64}) as engine:
        assert engine.max_length == 64
        assert engine.llm.settings["limit_mm_per_prompt"] == {"video": 1, "image": 1}
        with pytest.raises(CompatibilityError, match="made 3 tokens of a prompt, which are not the 2 of transformers"):
            engine.write([(Prompt([1, 2], [], {}), [1, 2])], 4)
    engine.close()
    assert not hasattr(engine, "llm")


def test_options_are_scored_token_by_token(fake, tmp_path, monkeypatch):
    asked = []

    def generate(self, prompts, how, use_tqdm):
        asked.extend(how)
        scores = [{token: SimpleNamespace(logprob=-float(token)) for token in one["logprob_token_ids"]} for one in how]
        said = [SimpleNamespace(logprobs=[found]) for found in scores]
        return [
            SimpleNamespace(prompt_token_ids=prompt["prompt_token_ids"], outputs=[one])
            for prompt, one in zip(prompts, said, strict=True)
        ]

    monkeypatch.setattr(FakeLLM, "generate", generate)
    with VLLMEngine(str(tmp_path)) as engine:
        found = engine.log_likelihoods([(Prompt([1, 2], [], {}), [1, 2])], [[[3], [3, 4], [5]]])
    assert found == [[-3.0, -7.0, -5.0]]
    assert [(how["temperature"], how["max_tokens"]) for how in asked] == [(0, 1)] * 2


def test_what_ends_the_start_of_an_engine_is_told(fake, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="at the root of it"):
        VLLMEngine(str(tmp_path), options={"seed": 13})
    with pytest.raises(InjectionError, match=r"vLLM doesn't start with .*no memory"):
        VLLMEngine(str(tmp_path), options={"seed": 14})
    with pytest.raises(ConfigError, match="the engine's option dtype has a setting of its own"):
        VLLMEngine(str(tmp_path), options={"dtype": "half"})
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    with pytest.raises(ConfigError, match="would serve the base without STA"):
        VLLMEngine(str(tmp_path), adapter=tmp_path)


def test_the_fingerprint_knows_the_files_of_the_base(fake, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1")
    with VLLMEngine(str(tmp_path)) as engine:
        first = engine.fingerprint()
        assert first == engine.fingerprint()
        assert (first["sta"], first["lora"]) == ("off", "off")
        (tmp_path / "model.safetensors").write_bytes(b"2")
        changed = engine.fingerprint()
    assert {key for key in first if first[key] != changed[key]} == {"base"}
