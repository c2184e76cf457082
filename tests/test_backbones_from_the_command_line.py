"""Each backbone that commands take: unequal clips and pictures in JSON Lines, to a loss, an adapter and an answer."""

import json

import numpy as np
import pytest
import tiny_bases
import torch
import transformers
from cases_transformers import ROW_VISION
from click.testing import CliRunner
from PIL import Image
from qwen2_vl_prompts import transformers_version
from tiny_qwen import moving_square, write_video

from sta_adapter import inject_sta, loading
from sta_adapter.cli import cli
from sta_adapter.data import BadSample, Collator, FrameSettings, VideoDataset
from sta_adapter.data.conversation import parse_sample
from sta_adapter.errors import ConfigError, DataError, STAWarning
from sta_adapter.evaluation import evaluate
from sta_adapter.evaluation.answering import Answerer, Question, option_tokens
from sta_adapter.text_positions import use_positions

AS_IS = FrameSettings(min_tokens=None, max_tokens=None)
GLM = ("glm4v", "glm4v_moe", "glm46v")


PACKED = ("qwen2_5_vl", "qwen3_vl", "glm4v", "video_llama_3")
WITHOUT_CLIPS = "not in this release of transformers, or not with clips"


def processor_of(name, folder):
    if not tiny_bases.takes_clips(name):
        pytest.skip(WITHOUT_CLIPS)
    return tiny_bases.make_processor(name, folder)


@pytest.fixture(scope="module", params=list(tiny_bases.FAMILIES))
def family(request):
    if not tiny_bases.model_takes_clips(request.param):
        pytest.skip(WITHOUT_CLIPS)
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    write_video(folder / "short.mp4", moving_square("left", count=24))
    write_video(folder / "long.mp4", moving_square("right", size=24, count=56))
    write_video(folder / "large.mp4", moving_square("right", size=128, count=64))
    for name, size in (("square", (16, 16)), ("wide", (44, 20))):
        Image.effect_noise(size, 200).convert("RGB").save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def base(family, tmp_path_factory):
    return tiny_bases.save_base(family, tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def parts(family, tmp_path_factory):
    processor = tiny_bases.make_processor(family, tmp_path_factory.mktemp("words"))
    model = tiny_bases.make_model(family, processor.tokenizer)
    handle = inject_sta(model)
    # as the commands do. Untouched, the one takes a clip's seconds for a picture, and both forget padding when they generate
    if (family, transformers_version()) in (("qwen2_5_vl", (5, 3)), ("qwen2_5_vl", (5, 4))) or (
        family in ("qwen2_vl", "qwen2_5_vl") and (4, 54) <= transformers_version() < (4, 57)
    ):
        use_positions(model)
    torch.manual_seed(1)
    for parameter in handle.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return processor, model


def clip(name, **how):
    return {"type": "video", "video": f"{name}.mp4", **how}


def picture(name):
    return {"type": "image", "image": f"{name}.png"}


def record(*content, answer="left", **more):
    user = {"role": "user", "content": [*content, {"type": "text", "text": "Which way?"}]}
    return {"messages": [user, {"role": "assistant", "content": answer}], **more}


def records(family):
    """Clips of 3 and 7 frames, two in one sample, pictures of two sizes, text alone, options; mixed where a model takes it."""
    found = [
        record(clip("short", nframes=3)),
        record(clip("long")),
        record(clip("short"), clip("long", nframes=5), answer="right"),
        record(clip("long", nframes=2), options=["left", "right", "up"]),
        record(clip("short", fps=2, video_start=1)),
        record(answer="up"),
    ]
    pictures = [record(picture("square")), record(picture("wide"), options=["left", "right"])]
    return found if family in GLM else [*found, *pictures, record(picture("wide"), clip("short"), answer="right")]


def run(*line):
    done = CliRunner().invoke(cli, [str(word) for word in line])
    assert done.exit_code == 0, done.output
    return done.output


def test_check_train_and_evaluate(family, folder, base, tmp_path):
    file = folder / f"{family}.jsonl"
    lines = records(family)
    file.write_text("\n".join(map(json.dumps, lines)))
    assert run("check-data", file, "--model", base).startswith(f"{len(lines)} samples, 0 of them bad")
    size = ["--set", "device_batch_size=4", "--set", "num_workers=0", "--set", "lora_rank=2"]
    run(
        "train",
        "--model",
        base,
        "--data",
        file,
        "--out",
        tmp_path / "adapter",
        "--max-steps",
        3,
        "--batch-size",
        4,
        *size,
    )
    for stage in ("stage1", "stage2"):
        assert json.loads((tmp_path / "adapter" / stage / "result.json").read_text())["bad_samples"] == []
    output = ["--out", tmp_path / "answers", "--batch-size", 4, "--max-new-tokens", 2]
    with pytest.warns(STAWarning, match="not all were sampled alike"):
        run("evaluate", "--model", base, "--adapter", tmp_path / "adapter", "--data", file, *output)
    found = json.loads((tmp_path / "answers" / "results.json").read_text())
    assert f'"total": {len(lines)}' in json.dumps(found)
    assert '"bad_samples": []' in json.dumps(found)


def encoded(parts, folder, *lines, **options):
    samples = [parse_sample(line, folder=folder) for line in lines]
    data = VideoDataset(samples, parts[0], frames=AS_IS, on_bad_sample="error", **options)
    return [data[index] for index in range(len(samples))]


def losses(parts, items):
    """Sum of the losses of all learned tokens, and how many there are."""
    batch = Collator.of(parts[0], on_bad_sample="error")(items)
    batch.pop("bad_samples")
    learned = int((batch["labels"] != -100).sum())
    with torch.no_grad():
        return float(parts[1](**batch).loss) * learned, learned


@pytest.mark.parametrize(
    "lines",
    [
        [record(clip("short", nframes=3)), record(clip("long", nframes=7)), record(clip("short", nframes=1))],
        [record(clip("short", nframes=3), clip("long", nframes=6)), record(clip("long", nframes=2), answer="right")],
        [record(picture("square")), record(picture("wide"))],
        [record(picture("wide"), clip("short", nframes=3)), record(clip("long", nframes=2)), record(picture("square"))],
        [record(clip("short", nframes=2), picture("wide"), clip("long", nframes=5)), record()],
    ],
    ids=["unequal", "two_in_one", "pictures", "mixed", "picture_between"],
)
def test_a_batch_is_its_samples(family, parts, folder, lines):
    if family in GLM and any("image" in json.dumps(line) and "video" in json.dumps(line) for line in lines):
        pytest.skip("its model takes pictures or clips; see below")
    items = encoded(parts, folder, *lines)
    total, learned = losses(parts, items)
    alone = [losses(parts, [item]) for item in items]
    assert learned == sum(count for _, count in alone)
    assert total == pytest.approx(sum(loss for loss, _ in alone), rel=1e-4)


def test_two_clips_in_a_sample_are_each_what_it_is_by_itself(family, parts, folder):
    """What the model's encoder makes of a clip does not depend on the clip beside it."""
    seen = []
    hook = [m for m in parts[1].modules() if hasattr(m, "sta")][-1].register_forward_hook(
        lambda module, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    for content in (
        [clip("short", nframes=2), clip("long", nframes=6)],
        [clip("short", nframes=2)],
        [clip("long", nframes=6)],
    ):
        losses(parts, encoded(parts, folder, record(*content)))
    hook.remove()
    both, short, long = (tokens.flatten(0, -2) for tokens in seen)
    torch.testing.assert_close(both, torch.cat([short, long]), rtol=1e-4, atol=1e-5)


def test_answers_do_not_depend_on_the_batch(family, parts, folder):
    lines = [record(clip("short", nframes=3)), record(clip("long", nframes=6)), record(picture("square")), record()]
    samples = [parse_sample(line, folder=folder) for line in lines]
    data = VideoDataset(samples, parts[0], frames=AS_IS, prompts=True, on_bad_sample="error")
    asked = Answerer(parts[1], parts[0], 3, 4)
    questions = [Question(index, sample, data[index], []) for index, sample in enumerate(samples)]
    together = {found.index: found.prediction for found in asked.answer(questions)}
    alone = {found.index: found.prediction for question in questions for found in asked.answer([question])}
    assert together == alone
    for group in asked._alike(questions):
        said, scores = written(asked, [question.prompt for question in group])
        for row, question in enumerate(group):
            said_alone, scores_alone = written(asked, [question.prompt])
            assert torch.equal(said[row, -3:], said_alone[0, -3:])
            torch.testing.assert_close(scores[:, row], scores_alone[:, 0], rtol=1e-4, atol=1e-4)


def written(asked, prompts):
    """Tokens (B, L) and logits (steps, B, words) of three steps, which tell more than the words that are said."""
    batch, told = asked.batch(prompts)
    how = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": asked.collate.pad_id}
    with told, torch.no_grad():
        found = asked.model.generate(**batch, **how, return_dict_in_generate=True, output_logits=True)
    return found.sequences, torch.stack(found.logits)


def test_an_options_score_is_that_of_the_answer_in_training(family, parts, folder):
    """Whichever options stand beside it, and after the model has written something."""
    options = ["left", "right", "further up"]
    lines = [record(content, options=options) for content in (clip("short", nframes=3), picture("wide"))]
    samples = [parse_sample(line, folder=folder) for line in lines]
    data = VideoDataset(samples, parts[0], frames=AS_IS, prompts=True, on_bad_sample="error")
    for batch_size in (1, 3):
        asked = Answerer(parts[1], parts[0], 3, batch_size)
        asked.write([data[0]])
        questions = [
            Question(index, sample, data[index], option_tokens(parts[0], sample, "loglikelihood"))
            for index, sample in enumerate(samples)
        ]
        with torch.no_grad():
            answered = list(asked.answer(questions))
        for line, found in zip(lines, answered, strict=True):
            told = [{**line, "messages": [line["messages"][0], {"role": "assistant", "content": o}]} for o in options]
            expected = [-losses(parts, encoded(parts, folder, one))[0] for one in told]
            assert found.scores == pytest.approx(expected, rel=1e-4)


def test_a_model_without_sta_answers_as_well(family, parts, folder):
    model = tiny_bases.make_model(family, parts[0].tokenizer)
    lines = [record(clip("short", nframes=3)), record(clip("long", nframes=6), options=["left", "right"])]
    samples = [parse_sample(line, folder=folder) for line in lines]
    data = VideoDataset(samples, parts[0], frames=AS_IS, on_bad_sample="error")
    assert len(evaluate(model, data, batch_size=2, max_new_tokens=2).predictions) == 2


@pytest.mark.parametrize("name", GLM)
def test_glm_says_what_it_does_not_take(name, folder, tmp_path):
    parts = (processor_of(name, tmp_path), None)
    with pytest.raises(DataError, match="either pictures or clips in one sample"):
        encoded(parts, folder, record(picture("wide"), clip("short")))
    items = encoded(parts, folder, record(picture("wide")), record(clip("short")), record(clip("long")))
    batch = Collator.of(parts[0])(items)
    assert len(batch["bad_samples"]) == 1
    assert "device_batch_size 1" in batch["bad_samples"][0]
    assert len(batch["input_ids"]) == 2
    with pytest.raises(DataError, match="device_batch_size 1"):
        Collator.of(parts[0], on_bad_sample="error")(items)


@pytest.mark.parametrize(
    "seen", [clip("short", max_pixels=100), {**picture("wide"), "min_pixels": 100}], ids=["clip", "picture"]
)
@pytest.mark.parametrize("name", ["internvl", "llava_onevision"])
def test_limits_that_a_processor_of_one_size_would_drop_are_refused(name, seen, folder, tmp_path):
    sample = parse_sample(record(seen), folder=folder)
    item = VideoDataset([sample], processor_of(name, tmp_path), frames=AS_IS)[0]
    assert isinstance(item, BadSample)
    assert "brings all frames to one size" in item.reason


def test_limits_of_all_frames_that_it_would_drop_are_found_by_the_check(folder, tmp_path, monkeypatch):
    processor = processor_of("internvl", tmp_path)
    monkeypatch.setattr(loading, "load_processor", lambda name, **options: processor)
    (tmp_path / "run.yaml").write_text("frames: {max_tokens: 64}\n")
    (tmp_path / "data.jsonl").write_text(json.dumps(record(answer="up")))
    words = ["check-data", str(tmp_path / "data.jsonl"), "--model", "x", "--config", str(tmp_path / "run.yaml")]
    with pytest.raises(ConfigError, match=r"frames\.max_tokens is 64, and has no effect with this model"):
        CliRunner().invoke(cli, words, catch_exceptions=False)


def test_pictures_of_several_turns_that_would_be_read_otherwise_are_refused(folder, tmp_path):
    first, second = record(picture("wide")), record(picture("square"))
    both = {"messages": [*first["messages"], *second["messages"]]}
    item = VideoDataset([parse_sample(both, folder=folder)], processor_of("llava_onevision", tmp_path))[0]
    if transformers_version() < (4, 53):  # it reads each by itself
        assert len(item["image_sizes"]) == 2
        return
    assert isinstance(item, BadSample)
    assert "Put them into one turn" in item.reason


def test_rows_are_counted_by_their_placeholders(folder, tmp_path):
    processor = processor_of("internvl", tmp_path)
    lines = record(clip("short", nframes=2), picture("wide"), clip("long", nframes=5))
    (item,) = encoded((processor, None), folder, lines)
    lengths = item["clip_lengths"].tolist()
    assert (lengths[0], lengths[-1], set(lengths[1:-1])) == (2, 5, {1})
    assert sum(lengths) == len(item["pixel_values"])
    assert np.isfinite(item["pixel_values"].numpy()).all()


@pytest.mark.parametrize("name", PACKED)
def test_limits_of_a_clip_are_kept_or_refused(name, folder, tmp_path):
    """Limits beyond the processor's own; Qwen2.5-VL's isn't told to leave clips as they are before transformers 4.52."""
    parts, line = (processor_of(name, tmp_path), None), record(clip("short", nframes=2, min_pixels=8192))
    if transformers_version() < (4, 52):
        with pytest.raises(DataError, match="make a clip 96x96, and the processor, by its own limits, 64x64"):
            encoded(parts, folder, line)
    else:
        assert encoded(parts, folder, line)[0]["video_grid_thw"][0, 1:].tolist() == [24, 24]


@pytest.mark.parametrize("name", [name for name in tiny_bases.FAMILIES if name not in ("internvl", "llava_onevision")])
def test_a_clip_without_limits_has_its_size_also_beside_one_with_limits(name, folder, tmp_path):
    """Several processors give a long clip smaller frames, so that a size goes by the number of frames."""
    parts, free = (processor_of(name, tmp_path), None), clip("large", nframes=32)
    limited = clip("short", nframes=4, max_pixels=1024)
    if transformers_version() < (4, 52):
        pytest.skip("this release's processor can't be told to leave clips as they are")
    (alone,), (both,) = encoded(parts, folder, record(free)), encoded(parts, folder, record(limited, free))
    assert both["video_grid_thw"][1].tolist() == alone["video_grid_thw"][0].tolist()


@pytest.mark.parametrize("own", [None, True, False])
def test_a_processor_s_own_cap_of_pixels_is_kept(own, folder, tmp_path):
    """Qwen3-VL's: unless it says so, frames of short clips are not made smaller, whatever transformers comes to do."""
    processor = processor_of("qwen3_vl", tmp_path)
    if not hasattr(processor.video_processor, "cap_pixels_per_frame"):
        pytest.skip("this release has no cap")
    processor.video_processor.cap_pixels_per_frame, processor.video_processor.max_video_tokens = own, 8
    free, limited = clip("large", nframes=8), clip("short", nframes=4, max_pixels=1024)
    (alone,), (both,) = (encoded((processor, None), folder, record(*parts)) for parts in ([free], [limited, free]))
    assert alone["video_grid_thw"][0].tolist() == both["video_grid_thw"][1].tolist()
    assert (alone["video_grid_thw"][0, 1:].prod() <= 4 * 8) == bool(own)


@pytest.mark.parametrize(
    "name", [name for name in tiny_bases.FAMILIES if tiny_bases.available(name) and not tiny_bases.takes_clips(name)]
)
def test_releases_that_take_no_clips_say_so_and_take_pictures(name, folder, tmp_path):
    processor = tiny_bases.make_processor(name, tmp_path)
    parts = processor, tiny_bases.make_model(name, processor.tokenizer)
    with pytest.raises(DataError, match=r"Use transformers 4\.57 or newer"):
        encoded(parts, folder, record(clip("short")))
    items = encoded(parts, folder, record(picture("wide")), record(picture("square")), record())
    total, learned = losses(parts, items)
    assert total == pytest.approx(sum(losses(parts, [item])[0] for item in items), rel=1e-4)
    assert learned == 3 * int((items[0]["labels"] != -100).sum())


@pytest.mark.parametrize(
    ("model", "config", "processor"),
    [
        ("CLIPVisionModel", "CLIPVisionConfig", "CLIPImageProcessor"),
        ("SiglipVisionModel", "SiglipVisionConfig", "SiglipImageProcessor"),
        ("Dinov2Model", "Dinov2Config", "BitImageProcessor"),
        ("", "", ""),
    ],
    ids=["clip", "siglip", "dinov2", "remote_code"],
)
@pytest.mark.parametrize("command", ["check-data", "train", "evaluate"])
def test_what_commands_do_not_take_is_refused_with_what_to_do(model, config, processor, command, folder, tmp_path):
    if model:
        tower = getattr(transformers, config)(**{**ROW_VISION, "num_hidden_layers": 1})
        getattr(transformers, model)(tower).save_pretrained(tmp_path / "base")
        getattr(transformers, processor)().save_pretrained(tmp_path / "base")
    else:
        (tmp_path / "base").mkdir()
        told = {"model_type": "intern_video2_chat", "architectures": ["InternVideo2"], "auto_map": {}}
        (tmp_path / "base" / "config.json").write_text(json.dumps(told))
    (folder / "refused.jsonl").write_text(json.dumps(record(clip("short"))))
    line = [command, "--model", tmp_path / "base", *(["--out", tmp_path / "out"] if command == "train" else [])]
    line += [folder / "refused.jsonl"] if command == "check-data" else ["--data", folder / "refused.jsonl"]
    done = CliRunner().invoke(cli, [str(word) for word in line])
    assert done.exit_code != 0
    said = " ".join(f"{done.output} {done.exception}".split())
    assert "use inject_sta in a training loop of your own" in said
