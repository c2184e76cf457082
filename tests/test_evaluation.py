import contextlib
import dataclasses
import json
import math
import shutil

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_qwen import make_model, make_processor, save_base, write_samples

from sta_adapter import STAConfig, inject_sta
from sta_adapter.cli import cli
from sta_adapter.compatibility.calls import takes
from sta_adapter.data import FrameSettings, VideoDataset
from sta_adapter.data.chat_encoding import encode_answer
from sta_adapter.errors import CheckpointError, ConfigError, DataError, DivergenceError
from sta_adapter.evaluation import EvaluationResult, Prediction, as_text, evaluate, wilson
from sta_adapter.evaluation.eval_mode import eval_mode, without_adapter
from sta_adapter.training import TrainingConfig, train

AS_IS = FrameSettings(min_tokens=None, max_tokens=None)
UNTAUGHT = 2  # the seed of a base that says none of the answers by chance, on any release of transformers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    write_samples(path, 6)
    return path


@pytest.fixture(scope="module")
def processor(folder):
    return make_processor(folder / "tokenizer")


@pytest.fixture(scope="module")
def dataset(folder, processor):
    return VideoDataset(folder / "data.jsonl", processor, frames=AS_IS, on_bad_sample="error", cache=True)


@pytest.fixture(scope="module")
def taught(tmp_path_factory, processor, dataset):
    """A model that has learned to say "left" or "right"; and its adapter's folder."""
    config = TrainingConfig(batch_size=6, device_batch_size=6, max_steps=80, learning_rate=5e-3)
    out = tmp_path_factory.mktemp("adapter")
    result = train(
        make_model(processor.tokenizer, UNTAUGHT), dataset, output_dir=out, config=config, stage="2", progress=False
    )
    return result.model, out


@pytest.fixture(scope="module")
def choices(dataset, processor):
    samples = [dataclasses.replace(s, options=["right", "left", "straight up"]) for s in dataset.samples]
    return VideoDataset(samples, processor, frames=AS_IS, on_bad_sample="error", cache=True)


# ---- counting


@pytest.mark.parametrize(
    ("correct", "total", "expected"),
    [
        (0, 0, (0, 1)),
        (0, 10, (0, 0.2775)),
        (5, 10, (0.2366, 0.7634)),
        (10, 10, (0.7225, 1)),
        (81, 263, (0.2553, 0.3662)),
    ],
    ids=["nothing", "none", "half", "all", "wilson_1927"],
)
def test_wilson(correct, total, expected):
    assert wilson(correct, total) == pytest.approx(expected, abs=1e-4)


@given(st.integers(0, 1000).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total))))
def test_wilson_holds_the_share_and_solves_its_equation(counts):
    correct, total = counts
    low, high = wilson(correct, total)
    assert 0 <= low <= (correct / total if total else 0.5) <= high <= 1
    for bound in (low, high) if 0 < correct < total else ():
        z = abs(correct / total - bound) / math.sqrt(bound * (1 - bound) / total)
        assert z == pytest.approx(1.959964, rel=1e-4)


def test_categories_and_json():
    predictions = [Prediction(i, f"line {i}", "ab"[i % 2], "x", "y", i < 3) for i in range(4)]
    result = EvaluationResult([*predictions, Prediction(4, "line 4", None, "x", "x", True)], ["line 9: gone"])
    assert {name: (s.correct, s.total) for name, s in result.categories.items()} == {"a": (2, 2), "b": (1, 2)}
    assert (result.overall.correct, result.overall.total, result.accuracy) == (4, 5, 0.8)
    values = json.loads(json.dumps(result.to_dict()))
    assert values["frames"] == "ordered"
    assert values["predictions"][4] == dataclasses.asdict(result.predictions[4])
    assert values["overall"]["low"] == pytest.approx(wilson(4, 5)[0])
    assert EvaluationResult(predictions).to_dict()["bad_samples"] == []


def test_a_few_answers_that_could_not_be_read_are_shown():
    said = [Prediction(i, f"line {i}", None, "A", str(i) * 300, False, unmatched=True) for i in range(5)]
    values = EvaluationResult(said).to_dict()
    assert values["unmatched"] == 5
    assert [example["said"][0] for example in values["unmatched_examples"]] == ["0", "1", "2"]
    assert all(len(example["said"]) < 300 for example in values["unmatched_examples"])


# ---- asking


def test_taught_model_is_right_and_base_is_not(taught, dataset, processor):
    model, _ = taught
    result = evaluate(model, dataset, batch_size=4)
    assert [p.prediction for p in result.predictions] == ["left", "right"] * 3
    assert result.accuracy == 1
    assert set(result.categories) == {"left", "right"}
    assert evaluate(make_model(processor.tokenizer, UNTAUGHT), dataset, max_new_tokens=4).accuracy == 0
    assert not model.training


@pytest.mark.parametrize("size", [1, 4, 6])
def test_batches_do_not_matter(taught, dataset, choices, size):
    for data in (dataset, choices):
        one, many = (evaluate(taught[0], data, batch_size=n).predictions for n in (1, size))
        assert [p.prediction for p in one] == [p.prediction for p in many]
        for a, b in zip(one, many, strict=True):
            assert a.scores == (b.scores and pytest.approx(b.scores, abs=1e-4))


def test_options_are_scored_as_complete_answers(taught, choices, processor):
    model = taught[0]
    result = evaluate(model, choices)
    assert result.accuracy == 1
    sample, prompt = choices.samples[0], choices.as_prompts()[0]
    for option, score in zip(sample.options, result.predictions[0].scores, strict=True):
        ids = encode_answer(processor, sample.prompt, option)
        inputs = {
            key: value[None] if key in ("input_ids", "mm_token_type_ids") else value for key, value in prompt.items()
        }
        total = 0.0
        for token in ids:
            with torch.no_grad():
                total += model(**inputs).logits[0, -1].log_softmax(-1)[token].item()
            inputs["input_ids"] = torch.cat([inputs["input_ids"], token.view(1, 1)], dim=1)
            if "mm_token_type_ids" in inputs:
                inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, 1))
        assert score == pytest.approx(total, abs=1e-4)


@pytest.mark.parametrize("choose", ["loglikelihood", "generate"])
def test_a_model_whose_outputs_are_no_numbers_has_no_answer(choices, processor, choose):
    """As fp16 makes them where it overflows; the first option would be the answer, or the first word."""
    model = make_model(processor.tokenizer)
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(DivergenceError, match=r"the model's outputs are no numbers \(NaN\).*--dtype"):
        evaluate(model, choices, choose=choose, num_workers=0)


def test_options_are_scored_without_the_logits_of_the_prompt(choices, processor):
    """Those of a prompt with a clip, over the whole vocabulary, would take gigabytes."""
    model = make_model(processor.tokenizer)
    if not takes(model, "logits_to_keep"):
        pytest.skip("this release's Qwen2-VL computes all logits")
    lengths = set()
    model.register_forward_hook(lambda module, args, out: lengths.add(out.logits.shape[1]))
    evaluate(model, choices)
    sample = choices.samples[0]
    assert lengths == {1 + max(len(encode_answer(processor, sample.prompt, option)) for option in sample.options)}


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("left", True),
        (" Left.", True),
        ("left\n", True),
        ("**Left**", True),
        ("<think>right?</think>left", True),
        (r"\boxed{left}", True),
        ("left right", False),
        ("", False),
        ("lef", False),
        ("<think>left", False),
    ],
)
def test_exact_labels(dataset, processor, said, right):
    class Parrot(torch.nn.Module):
        generation_config = type("Config", (), {"eos_token_id": None})

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def generate(self, input_ids, **kwargs):
            answer = torch.tensor([processor.tokenizer(said + "<|im_end|>")["input_ids"]])
            return torch.cat([input_ids, answer.expand(len(input_ids), -1)], dim=1)

    predictions = evaluate(Parrot(), dataset).predictions
    assert [p.correct for p in predictions] == [right, False] * 3
    assert all(p.unmatched == (said in ("", "<think>left")) for p in predictions)


@pytest.mark.parametrize("frames", ["shuffled", "reversed"])
def test_frame_order_reaches_the_model(dataset, processor, frames):
    model = make_model(processor.tokenizer)
    seen = []
    model.model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True)
    inject_sta(model, STAConfig(init="normal"))
    straight, other = (dataset.as_prompts(order, 5)[0]["pixel_values_videos"] for order in ("ordered", frames))
    assert not torch.equal(straight, other)
    assert torch.equal(straight.sort(0).values.sum(), other.sort(0).values.sum())
    result = evaluate(model, dataset, frame_order=frames, seed=5, max_new_tokens=1)
    assert result.frame_order == frames
    again = evaluate(model, dataset, frame_order=frames, seed=5, max_new_tokens=1)
    assert [p.prediction for p in result.predictions] == [p.prediction for p in again.predictions]


# ---- going on


def test_predictions_are_kept_and_not_asked_again(taught, dataset, tmp_path):
    model, file = taught[0], tmp_path / "kept" / "predictions.jsonl"
    whole = evaluate(model, dataset, batch_size=2, predictions_file=file, tag="mine")
    lines = file.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 6
    file.write_text("".join(lines[:4]) + lines[4][:10])  # cut off while writing
    asked = []
    hook = model.get_base_model().register_forward_hook(lambda *args: asked.append(1))
    resumed = evaluate(model, dataset, batch_size=2, predictions_file=file, tag="mine")
    assert resumed.predictions == whole.predictions
    assert file.read_text().splitlines(keepends=True) == lines
    assert asked
    asked.clear()
    assert evaluate(model, dataset, predictions_file=file, tag="mine").predictions == whole.predictions
    assert not asked
    hook.remove()


@pytest.mark.parametrize(
    ("options", "name"),
    [({"tag": "other"}, "tag"), ({"frame_order": "reversed"}, "frames"), ({"max_new_tokens": 3}, "max_new_tokens")],
    ids=["tag", "frames", "length"],
)
def test_predictions_of_another_evaluation_are_refused(taught, dataset, tmp_path, options, name):
    file = tmp_path / "predictions.jsonl"
    evaluate(taught[0], dataset, predictions_file=file, tag="mine")
    before = file.read_bytes()
    with pytest.raises(ConfigError, match=f"holds predictions of an evaluation that differs in {name}"):
        evaluate(taught[0], dataset, predictions_file=file, **{"tag": "mine", **options})
    assert file.read_bytes() == before


def test_a_foreign_file_is_refused(taught, dataset, tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("my notes\n")
    with pytest.raises(ConfigError, match=r"notes\.txt, line 1 is not a prediction"):
        evaluate(taught[0], dataset, predictions_file=file)
    assert file.read_text() == "my notes\n"


@pytest.mark.parametrize(
    "line",
    ["{}", "[]", '{"question": 1}', '{"question": "QUESTION"}', '{"question": "QUESTION", "prediction": 3}', "1"],
)
def test_lines_that_are_no_predictions(taught, dataset, tmp_path, line):
    file = tmp_path / "predictions.jsonl"
    evaluate(taught[0], dataset, predictions_file=file)
    head, first, *_ = file.read_text().splitlines()
    file.write_text(f"{head}\n{line.replace('QUESTION', json.loads(first)['question'])}\n")
    with pytest.raises(ConfigError, match=r"predictions\.jsonl, line 2 is not a prediction"):
        evaluate(taught[0], dataset, predictions_file=file)


def test_bad_samples_do_not_count(taught, processor, tmp_path):
    file = write_samples(tmp_path, 3)
    (tmp_path / "1.mp4").unlink()
    result = evaluate(taught[0], file, processor=processor, frame_settings=AS_IS)
    assert (result.overall.total, len(result.bad_samples)) == (2, 1)
    assert "line 2: " in result.bad_samples[0]
    with pytest.raises(DataError, match=r"line 2: .*1\.mp4"):
        evaluate(taught[0], file, processor=processor, frame_settings=AS_IS, on_bad_sample="error")


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("frame_settings", FrameSettings(fps=3)),
        ("on_bad_sample", "error"),
        ("processor", object()),
        ("overwrite", True),
    ],
)
def test_arguments_that_others_leave_without_effect(processor, dataset, argument, value):
    model, dataset = make_model(processor.tokenizer), VideoDataset(dataset.samples[:1], processor)  # skips bad samples
    with pytest.raises(ConfigError, match=f"{argument} has no effect"):
        evaluate(model, dataset, **{argument: value})


@pytest.mark.parametrize(
    "wrong", [{"batch_size": 0}, {"batch_size": -1}, {"max_new_tokens": 0}, {"num_workers": -1}], ids=str
)
def test_counts_that_would_answer_nothing(processor, dataset, wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ConfigError, match=f"{name} is {value}, expected a whole number of at least"):
        evaluate(make_model(processor.tokenizer), dataset, **wrong)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_stays_in_the_mode_that_it_was_in(taught, dataset, training):
    model = taught[0]
    model.train(training)
    part = next(module for module in model.modules() if isinstance(module, torch.nn.Linear))
    part.train(not training)
    try:
        evaluate(model, dataset)
        assert model.training is training
        assert part.training is not training
    finally:
        model.eval()


@pytest.mark.parametrize("fails", [False, True])
def test_in_eval_mode_there_is_no_dropout_and_no_gradient(fails):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.5))
    model[1].eval()
    with contextlib.suppress(ZeroDivisionError), eval_mode(model):
        assert not model(torch.ones(1, 2)).requires_grad
        assert not any(module.training for module in model.modules())
        if fails:
            1 / 0
    assert [module.training for module in model.modules()] == [True, True, False]
    assert model(torch.ones(1, 2)).requires_grad


@pytest.mark.parametrize("fails", [False, True])
def test_sta_is_switched_off_without_the_adapter_and_on_again(processor, fails):
    model = make_model(processor.tokenizer)
    handle = inject_sta(model)
    with contextlib.suppress(ZeroDivisionError), without_adapter(model):
        assert not handle._injection.is_enabled
        if fails:
            1 / 0
    assert handle._injection.is_enabled
    with without_adapter(torch.nn.Linear(1, 1)) as nothing:  # which has none
        assert nothing is None


def test_a_file_needs_a_processor(taught, folder):
    with pytest.raises(ConfigError, match="pass processor="):
        evaluate(taught[0], folder / "data.jsonl")


# ---- the command


@pytest.fixture(scope="module")
def base(tmp_path_factory, processor):
    return save_base(tmp_path_factory.mktemp("base"), processor, UNTAUGHT)


def test_command_compares_base_and_adapter(base, taught, folder, tmp_path):
    run = taught[1] / "run.json"
    settings = json.loads(run.read_text())
    run.write_text(json.dumps({**settings, "frames": dataclasses.asdict(AS_IS)}))  # the clips' own size, as trained
    line = ["evaluate", "--model", str(base), "--adapter", str(taught[1]), "--data", str(folder / "data.jsonl")]
    more = ["--base", "--frames", "all", "--num-workers", "0", "--max-new-tokens", "4"]
    done = CliRunner().invoke(cli, [*line, *more, "--json", "--out", str(tmp_path)], catch_exceptions=False)
    report = json.loads(done.stdout[done.stdout.index("{") :])
    assert report["adapter"]["ordered"]["overall"]["accuracy"] == 1
    assert report["base"]["ordered"]["overall"]["accuracy"] == 0
    assert set(report["adapter"]) == {"ordered", "shuffled", "reversed"}
    gain = next(d for d in report["differences"] if d["of"] == "adapter - base" and d["frames"] == "ordered")
    assert (gain["difference"], gain["low"], gain["high"], gain["clips"]) == (1, 1, 1, 6)
    assert "The adapter is better than the base: +100.0" in report["reading"][0]
    assert (tmp_path / "results.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "results.json").read_text()) == report
    assert len((tmp_path / "adapter-shuffled.jsonl").read_text().splitlines()) == 7
    table = as_text(report)
    assert "adapter, ordered   100.0 [61.0, 100.0]  6" in table
    assert max(map(len, table.splitlines())) <= 80


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--model", "nowhere/at/all"], "can't load the processor of 'nowhere/at/all'"),
        (["--fps", "1", "--nframes", "2"], "--fps and --nframes exclude each other"),
        (["--adapter", "/no/folder"], "there is no folder '/no/folder'"),
        (["--data", "/no/file"], "can't read the data file '/no/file'"),
    ],
    ids=["model", "rates", "adapter", "data"],
)
def test_command_errors(base, folder, options, error):
    from sta_adapter.errors import STAError

    line = ["evaluate", "--model", str(base), "--data", str(folder / "data.jsonl"), *options]
    with pytest.raises(STAError, match=error):
        CliRunner().invoke(cli, line, catch_exceptions=False)


def test_command_with_no_sample_that_can_be_read(base, tmp_path):
    file = write_samples(tmp_path, 2)
    for clip in tmp_path.glob("*.mp4"):
        clip.unlink()
    line = ["evaluate", "--model", str(base), "--data", str(file), "--num-workers", "0"]
    with pytest.raises(DataError, match=r"none of the 2 samples could be used. The first: .*no such video file"):
        CliRunner().invoke(cli, line, catch_exceptions=False)


def test_command_asks_a_benchmark(base, taught, tmp_path):
    import make_benchmarks

    copy = make_benchmarks.tempcompass(tmp_path / "copy")
    line = ["evaluate", "--model", str(base), "--adapter", str(taught[1]), "--data", str(copy), "--num-workers", "0"]
    more = ["--benchmark", "tempcompass", "--category", "kind", "--nframes", "4", "--max-new-tokens", "4", "--json"]
    done = CliRunner().invoke(cli, [*line, *more], catch_exceptions=False)
    report = json.loads(done.stdout[done.stdout.index("{") :])
    kinds = report["adapter"]["ordered"]["categories"]
    assert {name: (score["correct"], score["total"]) for name, score in kinds.items()} == {
        "multi-choice": (2, 2),  # it has learned to say "left", which is an option's text
        "yes_no": (0, 2),
        "caption_matching": (0, 2),
    }
    assert report["adapter"]["ordered"]["unmatched"] == 4
    examples = report["adapter"]["ordered"]["unmatched_examples"]
    assert [example["said"] for example in examples] == ["left"] * 3
    assert (report["benchmark"], report["chance"]["overall"]) == (
        "tempcompass",
        pytest.approx((1 / 3 + 1 / 2 + 1 / 2) / 3),
    )
    assert "captioning: 2 questions left out" in report["notes"][0]
    for extra, error in (
        (["--category", "topic"], "there are: aspect, kind"),
        (["--format", "ssv2"], "--format and --ben"),
    ):
        with pytest.raises(ConfigError, match=error):
            CliRunner().invoke(cli, [*line, *more, *extra], catch_exceptions=False)


def test_command_with_another_base(base, taught, folder, tmp_path):
    """An adapter that names another language model is refused, unless the user says that it fits."""
    adapter = tmp_path / "adapter"
    shutil.copytree(taught[1], adapter)
    about = json.loads((adapter / "sta_config.json").read_text())
    about["language_model"]["num_hidden_layers"] = 99
    (adapter / "sta_config.json").write_text(json.dumps(about))
    line = ["evaluate", "--model", str(base), "--adapter", str(adapter), "--data", str(folder / "data.jsonl")]
    line += ["--num-workers", "0", "--max-new-tokens", "1", "--json"]
    with pytest.raises(CheckpointError, match="another language model: num_hidden_layers: 99"):
        CliRunner().invoke(cli, line, catch_exceptions=False)
    assert CliRunner().invoke(cli, [*line, "--any-base"], catch_exceptions=False).exit_code == 0


def test_training_goes_on_from_an_adapter_of_another_base(base, taught, folder, tmp_path):
    """If the user says that it fits; what comes out belongs to the base at hand."""
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    shutil.copytree(taught[1], adapter)
    about = json.loads((adapter / "sta_config.json").read_text())
    ours, about["language_model"]["num_hidden_layers"] = about["language_model"]["num_hidden_layers"], 99
    (adapter / "sta_config.json").write_text(json.dumps(about))
    line = ["train", "--model", str(base), "--adapter", str(adapter), "--data", str(folder / "data.jsonl")]
    line += ["--out", str(out), "--stage", "1", "--max-steps", "1", "--batch-size", "1", "--num-workers", "0"]
    with pytest.raises(CheckpointError, match=r"another language model: num_hidden_layers: 99.*--any-base of train"):
        CliRunner().invoke(cli, line, catch_exceptions=False)
    CliRunner().invoke(cli, [*line, "--any-base"], catch_exceptions=False)
    assert json.loads((out / "sta_config.json").read_text())["language_model"]["num_hidden_layers"] == ours


def test_command_does_not_take_an_older_adapter_s_answers(base, taught, folder, tmp_path):
    adapter = tmp_path / "adapter"
    shutil.copytree(taught[1], adapter)
    line = ["evaluate", "--model", str(base), "--adapter", str(adapter), "--data", str(folder / "data.jsonl")]
    line += ["--num-workers", "0", "--max-new-tokens", "1", "--out", str(tmp_path / "out")]
    for _ in range(2):  # the second time, answers are there
        assert CliRunner().invoke(cli, line, catch_exceptions=False).exit_code == 0
    state = load_file(adapter / "sta_adapter.safetensors")
    with safe_open(adapter / "sta_adapter.safetensors", "pt") as file:
        metadata = file.metadata()
    save_file({k: v + 1 for k, v in state.items()}, adapter / "sta_adapter.safetensors", metadata)
    before = (tmp_path / "out" / "adapter-ordered.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"an evaluation that differs in sta\. .*--overwrite"):
        CliRunner().invoke(cli, line, catch_exceptions=False)
    assert (tmp_path / "out" / "adapter-ordered.jsonl").read_bytes() == before
    assert CliRunner().invoke(cli, [*line, "--overwrite"], catch_exceptions=False).exit_code == 0
    assert (tmp_path / "out" / "adapter-ordered.jsonl").read_bytes() != before


def test_command_asks_again_what_has_changed(base, folder, tmp_path):
    """A clip's seconds are another question; what answers are grouped by is none."""
    shutil.copy(folder / "0.mp4", tmp_path / "a.mp4")
    record = {
        "question": "Which?",
        "options": ["left", "right"],
        "answer": "left",
        "category": "task",
        "length": "short",
    }

    def ask(out, *more, **fields):
        lines = [{**record, "video": "a.mp4", **fields}, {**record, "video": "a.mp4", "question": "Where?"}]
        (tmp_path / "d.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        line = [
            "evaluate",
            "--model",
            str(base),
            "--data",
            str(tmp_path / "d.jsonl"),
            "--nframes",
            "2",
            "--num-workers",
            "0",
        ]
        done = CliRunner().invoke(cli, [*line, "--out", str(tmp_path / out), *more], catch_exceptions=False)
        assert done.exit_code == 0
        kept = (tmp_path / out / "base-ordered.jsonl").read_text().splitlines()[1:]
        return sorted(map(json.loads, kept), key=lambda entry: entry["index"])

    first = ask("kept", end=0.3)
    again, fresh = ask("kept", start=0.4), ask("new", start=0.4)
    for entry, expected in zip(again, (fresh[0], first[1]), strict=True):
        assert entry["prediction"]["scores"] == pytest.approx(expected["prediction"]["scores"])
    assert first[0]["prediction"]["scores"] != pytest.approx(fresh[0]["prediction"]["scores"], abs=1e-9)
    assert again[0]["question"] != first[0]["question"]
    grouped = ask("kept", "--category", "length", start=0.4, answer="right", options=["left", "right"])
    assert [entry["prediction"]["category"] for entry in grouped] == ["short", "short"]
    assert grouped[0]["prediction"]["answer"] == "B"
    assert grouped[0]["prediction"]["scores"] == again[0]["prediction"]["scores"]
