"""Everything that a result depends on changes its fingerprint, and nothing else does."""

import copy
import dataclasses
import json
import shutil

import pytest
import torch
from tiny_qwen import make_model, make_processor, write_samples

from sta_adapter import STAConfig, inject_sta
from sta_adapter.data import FrameSettings, VideoDataset
from sta_adapter.data.clip_reader import ClipReader
from sta_adapter.data.conversation import parse_sample
from sta_adapter.data.fingerprint import fingerprint_processor, fingerprint_samples, without_names
from sta_adapter.errors import ConfigError, STAWarning
from sta_adapter.evaluation import evaluate
from sta_adapter.injection.fingerprint import fingerprint_model, fingerprint_start
from sta_adapter.training import TrainingConfig, train

AS_IS = FrameSettings(min_tokens=None, max_tokens=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    write_samples(path, 4)
    return path


@pytest.fixture(scope="module")
def processor(folder):
    return make_processor(folder / "tokenizer")


@pytest.fixture
def model(processor):
    return make_model(processor.tokenizer)


def of_sample(folder, words="What?", **part):
    content = [{"type": "video", "video": "0.mp4", **part}, {"type": "text", "text": words}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "left"}]
    return fingerprint_samples([(parse_sample({"messages": messages}, folder=folder).messages, None)])[0]


# ---- samples


@pytest.mark.parametrize(
    "other",
    [{"words": "Which?"}, {"nframes": 2}, {"fps": 2.0}, {"video_start": 0.5}, {"video_end": 0.5}, {"max_pixels": 784}, {"video": "1.mp4"}],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_a_sample_is_all_that_stands_in_it(folder, other):
    assert of_sample(folder, **other) != of_sample(folder)


def test_where_clips_lie_and_when_they_were_written_is_no_matter(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "moved")
    assert of_sample(tmp_path / "moved") == of_sample(folder)


@pytest.mark.parametrize("size", [100, 300_000], ids=["short", "long"])
def test_what_is_in_a_clip_counts(tmp_path, size):
    found = set()
    for content in (bytes(size), bytes(size - 1) + b"x", b"x" + bytes(size - 1), bytes(size + 1)):
        (tmp_path / "0.mp4").write_bytes(content)
        found.add(of_sample(tmp_path))
    (tmp_path / "0.mp4").unlink()
    assert len(found | {of_sample(tmp_path)}) == 5


def test_a_folder_of_pictures_is_all_its_pictures(tmp_path):
    (tmp_path / "0.mp4").mkdir()
    (tmp_path / "0.mp4" / "1.png").write_bytes(b"one")
    before = of_sample(tmp_path)
    (tmp_path / "0.mp4" / "1.png").write_bytes(b"two")
    changed = of_sample(tmp_path)
    (tmp_path / "0.mp4" / "2.png").write_bytes(b"two")
    assert len({before, changed, of_sample(tmp_path)}) == 3


def test_what_lies_in_memory_is_its_bytes(folder):
    path = str(folder / "0.mp4")

    def packed(content):
        part = {"type": "video", "video": path, "packed": content}
        return fingerprint_samples([([{"role": "user", "content": [part]}], None)])[0]

    again = packed(b"one")
    assert packed(b"one") == again != packed(b"two")


# ---- processors


def test_a_processor_is_its_template_words_and_sizes(processor, folder):
    before = fingerprint_processor(processor)
    assert fingerprint_processor(make_processor(folder / "again")) == before
    other = copy.deepcopy(processor)
    other.video_processor.merge_size += 1
    template = copy.deepcopy(processor)
    template.chat_template = f"{template.chat_template} "
    words = copy.deepcopy(processor)
    words.tokenizer.add_tokens(["another"])
    ends = copy.deepcopy(processor)
    ends.tokenizer.eos_token = "<|endoftext|>"
    own = copy.deepcopy(processor)
    own.image_seq_length = 4
    assert len({before, *map(fingerprint_processor, (other, template, words, ends, own))}) == 6


def test_names_of_places_are_left_out_at_any_depth():
    found = without_names({"sizes": [{"edge": 4, "_name_or_path": "here"}, (2, 3)], "transformers_version": "5"})
    assert found == {"sizes": [{"edge": 4}, [2, 3]]}


# ---- models


def differs(before, after):
    return {name for name in before if before[name] != after[name]}


def test_the_same_model_again_is_the_same(model, processor):
    assert fingerprint_model(model) == fingerprint_model(make_model(processor.tokenizer))
    assert fingerprint_model(model)["sta"] == fingerprint_model(model)["lora"] == "off"


@pytest.mark.parametrize("name", ["visual.blocks.0.mlp.fc1.weight", "language_model.norm.weight", "lm_head.weight"])
def test_one_bit_of_the_base(model, name):
    before = fingerprint_model(model)
    weight = next(value for key, value in model.named_parameters() if key.endswith(name))
    weight.data.view(-1)[-1] *= -1
    assert differs(before, fingerprint_model(model)) == {"base"}


def test_dtype_and_generation_are_the_base_s(model):
    before = fingerprint_model(model)
    model.generation_config.no_repeat_ngram_size = 2
    generating = fingerprint_model(model)
    assert differs(before, generating) == {"base"}
    assert differs(generating, fingerprint_model(model.to(torch.bfloat16))) == {"base"}


def test_sta_at_work(model):
    before = fingerprint_model(model)
    handle = inject_sta(model, STAConfig(init="normal"))
    on = fingerprint_model(model)
    assert differs(before, on) == {"sta"}
    with handle.disabled():
        assert fingerprint_model(model) == before
    with torch.no_grad():
        next(handle.parameters()).neg_()
    assert differs(on, fingerprint_model(model)) == {"sta"}
    handle.remove()
    assert fingerprint_model(model) == before


def test_settings_of_sta_that_no_weight_shows(processor):
    found = set()
    for change in (
        {},
        {"causal": True},
        {"rope_theta": 500.0},
        {"order": "before_spatial"},
        {"token_order": "published"},
    ):
        torch.manual_seed(0)
        model = make_model(processor.tokenizer)
        inject_sta(model, STAConfig(init="normal", **change))
        found.add(fingerprint_model(model)["sta"])
    assert len(found) == 5


def test_lora_at_work(model):
    import peft

    before = fingerprint_model(model)
    handle = inject_sta(model)
    net = peft.get_peft_model(handle.model, handle.lora_config())
    on = fingerprint_model(net)
    assert differs(before, on) == {"sta", "lora"}
    with net.disable_adapter():
        assert differs(before, fingerprint_model(net)) == {"sta"}
    weight = next(value for name, value in net.named_parameters() if "lora_A" in name)
    with torch.no_grad():
        weight.neg_()
    changed = fingerprint_model(net)
    assert differs(on, changed) == {"lora"}
    for module in net.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.set_scale("default", 2.0)
    assert differs(changed, fingerprint_model(net)) == {"lora"}


def test_the_base_is_the_same_beneath_modules_that_peft_trains_as_copies(model):
    import peft

    before = fingerprint_model(model)
    net = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    on = fingerprint_model(net)
    assert differs(before, on) == {"lora"}
    with torch.no_grad():
        next(value for name, value in net.named_parameters() if ".modules_to_save." in name).neg_()
    assert differs(on, fingerprint_model(net)) == {"lora"}


def test_positions_are_those_of_a_major_release_of_transformers(model, monkeypatch):
    import transformers

    before = fingerprint_model(model)
    monkeypatch.setattr(transformers, "__version__", transformers.__version__.split(".")[0] + ".999.0")
    assert fingerprint_model(model) == before
    monkeypatch.setattr(transformers, "__version__", "999.0.0")
    assert differs(before, fingerprint_model(model)) == {"positions"}


def test_positions(model):
    from sta_adapter.backbones.qwen2_vl_positions import restore_original_positions, undo_original_positions
    from sta_adapter.backbones.videorope import apply_videorope, remove_videorope

    before = fingerprint_model(model)
    found = [before["positions"]]
    for scale in (2.0, 1.0):
        apply_videorope(model, scale)
        found.append(fingerprint_model(model)["positions"])
        remove_videorope(model)
    restore_original_positions(model)
    found.append(fingerprint_model(model)["positions"])
    assert len(set(found)) == 4
    undo_original_positions(model)
    assert fingerprint_model(model) == before


def test_weights_that_are_elsewhere_can_t_be_known(model):
    model.lm_head.to("meta")
    with pytest.raises(ConfigError, match=r"1 weights of the model are not in memory \(the first is lm_head\.weight\)"):
        fingerprint_model(model)


# ---- what goes on only if all is the same


def test_predictions_by_another_processor_or_model(model, processor, folder, tmp_path):
    data = VideoDataset(folder / "data.jsonl", processor, frames=AS_IS, cache=True)
    how = {"max_new_tokens": 1, "predictions_file": tmp_path / "p.jsonl"}
    evaluate(model, data, **how)
    smaller = VideoDataset(folder / "data.jsonl", processor, frames=dataclasses.replace(AS_IS, max_frames=4))
    with pytest.raises(ConfigError, match=r"differs in sampling\."):
        evaluate(model, smaller, **how)
    other = copy.deepcopy(processor)
    other.video_processor.image_mean = [0.1, 0.1, 0.1]
    with pytest.raises(ConfigError, match=r"differs in processor\."):
        evaluate(model, VideoDataset(folder / "data.jsonl", other, frames=AS_IS), **how)
    inject_sta(model)
    with pytest.raises(ConfigError, match=r"differs in sta\."):
        evaluate(model, data, **how)
    assert evaluate(model, data, overwrite=True, **how).overall.total == 4


def test_a_list_of_records_that_has_grown_is_gone_on_with(model, processor, folder, tmp_path):
    """As a file is: what is new is asked, and the rest is taken as it was kept."""
    records = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    for record in records:
        record["messages"][0]["content"][0]["video"] = str(folder / record["messages"][0]["content"][0]["video"])
    how = {"max_new_tokens": 1, "predictions_file": tmp_path / "p.jsonl"}
    evaluate(model, VideoDataset(records[:2], processor, frames=AS_IS), **how)
    head, *lines = map(json.loads, (tmp_path / "p.jsonl").read_text().splitlines())
    for line in lines:
        line["prediction"]["prediction"] = "kept"
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (head, *lines)))
    found = evaluate(model, VideoDataset(records, processor, frames=AS_IS), **how).predictions
    assert [p.prediction == "kept" for p in found] == [True, True, False, False]


@pytest.mark.parametrize(
    ("source", "name"),
    [("/a/b.jsonl, line 3", "b.jsonl"), ("/a/b, c.json, entry 12", "b, c.json"), ("/a/t-1.tar, 007", "t-1.tar"), ("/a/t.tar, 0,7, entry 2", "t.tar"), ("record 4", "record")],
    ids=["lines", "entries", "shard", "several in a shard", "list"],
)  # fmt: skip
def test_predictions_are_of_a_file_whatever_the_places_in_it(model, processor, folder, tmp_path, source, name):
    sample = VideoDataset(folder / "data.jsonl", processor).samples[0]
    data = VideoDataset([dataclasses.replace(sample, source=source)], processor, frames=AS_IS)
    evaluate(model, data, max_new_tokens=1, predictions_file=tmp_path / "p.jsonl")
    assert json.loads((tmp_path / "p.jsonl").read_text().splitlines()[0])["settings"]["data"] == [name]


def test_a_start_that_adds_nothing_is_fresh_whatever_its_other_weights(model, processor):
    torch.manual_seed(3)
    handle = inject_sta(model)
    torch.manual_seed(4)
    again = make_model(processor.tokenizer)
    other = inject_sta(again)
    assert fingerprint_start(model) == fingerprint_start(again)
    assert fingerprint_start(model)["start"] == "fresh"
    with torch.no_grad():
        for module in (handle.blocks[0], other.blocks[0]):
            module.to_out.weight.fill_(1)
    assert differs(fingerprint_start(model), fingerprint_start(again)) == {"start"}


def test_a_start_with_lora_is_fresh_until_it_is_trained(model):
    import peft

    handle = inject_sta(model)
    net = peft.get_peft_model(handle.model, handle.lora_config())
    assert fingerprint_start(net)["start"] == "fresh"
    with torch.no_grad():
        next(value for name, value in net.named_parameters() if "lora_B" in name).view(-1)[-1] = 1
    assert fingerprint_start(net)["start"] != "fresh"


def test_a_run_is_taken_up_only_from_the_same_start(model, processor, folder, tmp_path):
    data = VideoDataset(folder / "data.jsonl", processor, frames=AS_IS, cache=True)
    held = VideoDataset(folder / "data.jsonl", processor, frames=AS_IS, cache=True)
    settings = TrainingConfig(batch_size=4, device_batch_size=4, max_steps=1, num_workers=0)
    how = {"output_dir": tmp_path, "stage": "1", "config": settings, "progress": False}
    train(model, data, eval_data=held, **how)

    def fresh(change=lambda model: None):
        net = make_model(processor.tokenizer)
        change(net)
        return net

    def loaded(net):
        handle = inject_sta(net)
        torch.nn.init.ones_(handle.blocks[0].to_out.weight)

    assert train(fresh(), data, eval_data=held, **how).stages["1"]["steps"] == 1
    less = VideoDataset(held.samples[:2], processor, frames=AS_IS)
    shorter = VideoDataset(data.samples, processor, frames=AS_IS, max_length=999)
    turned = VideoDataset(data.samples, processor, frames=AS_IS, frame_order="reversed")
    for net, data_now, eval_data, name in (
        (fresh(lambda net: net.lm_head.weight.data.neg_()), data, held, "base"),
        (fresh(loaded), data, held, "start"),
        (fresh(), shorter, held, "max_length"),
        (fresh(), turned, held, "frame_order"),
        (fresh(), data, turned, "eval_data"),
        (fresh(), data, less, "eval_data"),
        (fresh(), data, None, "eval_data"),
    ):
        with pytest.raises(ConfigError, match=rf"holds a run that differs in {name}\."):
            train(net, data_now, eval_data=eval_data, **how)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([{"nframes": 6}, {"nframes": 6}], {"nframes": 6}),
        ([{"nframes": 6}, {"nframes": 4}], {"nframes": 8}),
        ([{"nframes": 6}, {}], {"nframes": 8}),
        ([{"fps": 2.0, "max_frames": 9}], {"fps": 2.0, "max_frames": 9, "nframes": None}),
        ([{"max_pixels": 784 * 3}], {"min_tokens": 3, "max_tokens": 3}),
        ([{"min_pixels": 784 * 300}], {"min_tokens": 300, "max_tokens": 300}),
        ([{"max_frames": 3}], {"min_frames": 3, "max_frames": 3, "nframes": None}),
        ([{"min_frames": 40}], {"min_frames": 40, "max_frames": 40, "nframes": None}),
        ([], {"nframes": 8}),
    ],
    ids=["alike", "unlike", "some", "rate", "most pixels", "least pixels", "most frames", "least frames", "none"],
)
def test_what_all_records_set_alike_is_how_the_run_samples(parts, expected):
    reader = ClipReader(FrameSettings(nframes=8), factor=28)
    found, _ = reader.settings_of(
        [{"type": "video", "video": "x", **part} for part in parts] + [{"type": "text", "text": "x"}]
    )
    assert found == dataclasses.replace(reader.settings, **expected)


@pytest.mark.parametrize(
    ("parts", "expected"), [([], False), ([{"nframes": 6}] * 2, False), ([{"nframes": 6}, {"nframes": 4}], True)]
)
def test_whether_clips_are_sampled_each_otherwise(parts, expected):
    clips = [{"type": "video", "video": "x", **part} for part in parts]
    assert ClipReader(FrameSettings()).settings_of([*clips, {"type": "image", "image": "x"}])[1] is expected


def test_records_that_sample_themselves_each_otherwise_are_told_of(model, processor, folder, tmp_path):
    """`visualize`, the app, `serve` and `evaluate` ask the same function, for clips that don't say it themselves."""
    from sta_adapter.loading import saved_frame_settings

    lines = (folder / "data.jsonl").read_text().splitlines()
    lines[0] = lines[0].replace('"nframes": 4', '"nframes": 2')
    assert lines[0] not in (folder / "data.jsonl").read_text()
    (folder / "unlike.jsonl").write_text("\n".join(lines))
    data = VideoDataset(
        folder / "unlike.jsonl", processor, frames=FrameSettings(fps=3.0, min_tokens=None, max_tokens=None)
    )
    settings = TrainingConfig(batch_size=4, device_batch_size=4, max_steps=1, num_workers=0)
    train(model, data, output_dir=tmp_path, stage="1", config=settings, progress=False)
    with pytest.warns(STAWarning, match="its records set how their clips are sampled themselves, each otherwise"):
        assert saved_frame_settings(tmp_path)["fps"] == 3.0


def test_records_that_sample_themselves_are_in_the_run(model, processor, folder, tmp_path):
    from sta_adapter.loading import saved_frame_settings

    data = VideoDataset(
        folder / "data.jsonl", processor, frames=FrameSettings(fps=3.0, min_tokens=None, max_tokens=None)
    )
    own = {
        part.get("nframes")
        for s in data.samples
        for m in s.messages
        for part in m["content"]
        if part["type"] == "video"
    }
    settings = TrainingConfig(batch_size=4, device_batch_size=4, max_steps=1, num_workers=0)
    train(model, data, output_dir=tmp_path, stage="1", config=settings, progress=False)
    assert {saved_frame_settings(tmp_path)["nframes"]} == own == {4}
