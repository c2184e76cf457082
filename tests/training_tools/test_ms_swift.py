"""STA in ms-swift's own commands."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import BIN, KILLED, Page, check_adapter, run, same_weights

from sta_adapter.adapter.hub import ADAPTER_FILES
from sta_adapter.errors import ConfigError
from sta_adapter.integrations.convert_data import convert_data
from sta_adapter.loading import load_model

FRAMES = {"FPS_MAX_FRAMES": "8", "VIDEO_MIN_TOKEN_NUM": "16", "VIDEO_MAX_TOKEN_NUM": "16"}
TINY = Path(__file__).with_name("swift_tiny.py")


@pytest.fixture(scope="module")
def data(clips):
    convert_data(clips / "pairs.jsonl", clips / "swift-pairs.jsonl", to="ms-swift")
    return convert_data(clips / "clips.jsonl", clips / "swift.jsonl", to="ms-swift").path


def plug_in(folder):
    return run([BIN / "sta-adapter", "path", "ms-swift"], folder).strip()


def swift(command, base, data, out, *more, expect=0, steps=4, save=2, lora=(), **environment):
    words = [
        BIN / "swift",
        command,
        "--model",
        base,
        "--model_type",
        "qwen2_vl",
        "--template",
        "qwen2_vl",
        "--dataset",
        data,
    ]
    words += [
        "--external_plugins",
        plug_in(data.parent),
        TINY,
        "--tuner_type",
        "sta",
        "--torch_dtype",
        "float32",
        "--output_dir",
        out,
    ]
    words += [
        "--add_version",
        "false",
        "--max_steps",
        steps,
        "--save_steps",
        save,
        "--per_device_train_batch_size",
        2,
        "--learning_rate",
        1e-3,
    ]
    words += [
        "--gradient_accumulation_steps",
        1,
        "--logging_steps",
        1,
        "--max_length",
        2048,
        "--split_dataset_ratio",
        0,
        "--dataset_num_proc",
        1,
    ]
    words += ["--dataloader_num_workers", 0, "--report_to", "none", *more]
    return run(words, data.parent, expect, **{**FRAMES, **environment})


@pytest.fixture(scope="module")
def trained(base, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("swift") / "out"
    return out, swift("sft", base, data, out)


def test_sft(trained, base, clips):
    out, said = trained
    assert "--strict true makes it an error" in said
    check_adapter(out / "checkpoint-4", base, clips)
    check_adapter(out, base, clips)
    config = json.loads((out / "checkpoint-4/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (16, 16)  # the recipe's


def test_the_page(base, clips, tmp_path):
    page = Page("ms-swift", base, clips, tmp_path)
    page.run(page.command("sta-adapter convert-data"))
    command = page.block("bash").strip().replace('path ms-swift)"', f'path ms-swift)" {TINY}')
    tiny = "--model_type qwen2_vl --template qwen2_vl --torch_dtype float32 --report_to none"
    page.run(f"{command} {tiny}")
    check_adapter(tmp_path / "my-adapter", base, clips)
    page.run(page.command("sta-adapter evaluate"))


def test_resuming_after_a_kill_gives_the_same_bits(trained, base, data, tmp_path):
    out, _ = trained
    swift("sft", base, data, tmp_path / "out", expect=1, PYTHONPATH=KILLED)
    assert not (tmp_path / "out/checkpoint-4").exists()
    swift("sft", base, data, tmp_path / "out", "--resume_from_checkpoint", tmp_path / "out/checkpoint-2")
    same_weights(out / "checkpoint-4", tmp_path / "out/checkpoint-4")


def test_stage_one_then_two_and_settings_from_the_command_line(base, data, clips, tmp_path):
    swift(
        "sft",
        base,
        data,
        tmp_path / "one",
        "--model_kwargs",
        '{"sta_settings": {"stage": 1, "head_scale": 0.5}}',
        steps=2,
    )
    check_adapter(tmp_path / "one/checkpoint-2", base, clips, lora=False)
    start = f"{{adapter: {tmp_path / 'one/checkpoint-2'}}}"
    swift("sft", base, data, tmp_path / "two", "--lora_rank", 4, steps=2, STA_SETTINGS=start)
    check_adapter(tmp_path / "two", base, clips)
    assert json.loads((tmp_path / "two/sta_config.json").read_text())["config"]["head_scale"] == 0.5
    assert json.loads((tmp_path / "two/adapter_config.json").read_text())["r"] == 4
    said = swift("sft", base, data, tmp_path / "three", "--adapters", tmp_path / "one/checkpoint-2", expect=1)
    assert "is of stage 1, without LoRA" in said


@pytest.mark.parametrize("tuner", ["lora", "full"])
def test_the_plug_in_without_its_tuner_is_an_error(base, data, tmp_path, tuner):
    said = swift("sft", base, data, tmp_path / "out", "--tuner_type", tuner, expect=1)
    assert f"--tuner_type {tuner} would train without STA: set --tuner_type sta" in said


def test_two_processes(base, data, clips, tmp_path):
    swift("sft", base, data, tmp_path / "out", steps=2, NPROC_PER_NODE="2")
    check_adapter(tmp_path / "out/checkpoint-2", base, clips)


def test_bf16_and_checkpointing(base, data, clips, tmp_path):
    swift(
        "sft",
        base,
        data,
        tmp_path / "out",
        "--use_cpu",
        "true",
        "--torch_dtype",
        "bfloat16",
        "--gradient_checkpointing",
        "true",
        steps=2,
    )
    check_adapter(tmp_path / "out/checkpoint-2", base, clips)


def losses(out):
    rows = map(json.loads, (out / "logging.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def test_dpo(trained, base, clips, data, tmp_path):
    """The first loss is log 2 where the model that is trained equals the reference."""
    out, _ = trained
    pairs, after = data.with_name("swift-pairs.jsonl"), ["--rlhf_type", "dpo", "--adapters", out / "checkpoint-4"]
    dropout = ["--lora_dropout", 0.0]
    swift("rlhf", base, pairs, tmp_path / "out", *after, "--ref_adapters", out / "checkpoint-4", *dropout, steps=2)
    check_adapter(tmp_path / "out/checkpoint-2", base, clips)
    assert losses(tmp_path / "out")[0] == pytest.approx(math.log(2), abs=1e-4)
    swift("rlhf", base, pairs, tmp_path / "from-base", *after, *dropout, steps=1)
    assert abs(losses(tmp_path / "from-base")[0] - math.log(2)) > 1e-3


def test_grpo(base, clips, data, tmp_path):
    words = ["--rlhf_type", "grpo", "--reward_funcs", "differs", "--num_generations", 2, "--max_completion_length", 4]
    swift("rlhf", base, data, tmp_path / "out", *words, "--use_vllm", "false", steps=2)
    check_adapter(tmp_path / "out/checkpoint-2", base, clips)


def test_answers_from_vllm_are_refused(base):
    from sta_adapter.integrations.ms_swift import STATuner

    with pytest.raises(ConfigError, match="set --use_vllm false"):
        STATuner.prepare_model(SimpleNamespace(use_vllm=True), load_model(base))


def test_packing_on_a_cpu_is_refused_with_what_to_set(base, data, tmp_path):
    said = swift("sft", base, data, tmp_path / "out", "--packing", "true", expect=1)
    assert 'The "packing" feature requires a flash attention implementation' in said


def test_padding_free_batches_have_the_same_clips(base, data, monkeypatch):
    """With flash attention: the texts of a batch become one row, and the vision encoder gets what it gets otherwise."""
    import swift_tiny  # noqa: F401
    from swift.model import get_processor
    from swift.template import get_template

    for name, value in FRAMES.items():
        monkeypatch.setenv(name, value)
    rows = [json.loads(line) for line in data.read_text().splitlines()][:2]
    batches = []
    for padding_free in (False, True):
        processor = get_processor(str(base), model_type="qwen2_vl")
        template = get_template(processor, template_type="qwen2_vl", padding_free=padding_free)
        template.model = load_model(base)  # numbers the positions
        template.set_mode("train")
        batches.append(template.data_collator([template.encode(row, return_length=True) for row in rows]))
    padded, free = batches
    assert len(padded["input_ids"]) == 2
    assert len(free["input_ids"]) == 1
    for name in ("pixel_values_videos", "video_grid_thw"):
        assert torch.equal(padded[name], free[name])


def test_answers(trained, base, data, tmp_path):
    """By the checkpoint, and by its adapter alone, of which ms-swift doesn't know the tuner."""
    out, _ = trained
    alone = tmp_path / "alone"
    alone.mkdir()
    for file in ADAPTER_FILES:
        shutil.copy(out / "checkpoint-4" / file, alone)
    said = []
    for name, adapter in (
        ("base", ()),
        ("checkpoint", ["--adapters", out / "checkpoint-4"]),
        ("alone", ["--adapters", alone]),
    ):
        words = [
            BIN / "swift",
            "infer",
            "--model",
            base,
            "--model_type",
            "qwen2_vl",
            "--template",
            "qwen2_vl",
            *adapter,
        ]
        words += ["--external_plugins", plug_in(data.parent), TINY, "--val_dataset", data, "--max_new_tokens", 4]
        words += ["--torch_dtype", "float32", "--temperature", 0, "--result_path", tmp_path / f"{name}.jsonl"]
        run(words, data.parent, **FRAMES)
        lines = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        said.append([json.loads(line)["response"] for line in lines])
    base_alone, checkpoint, adapter_alone = said
    assert len(checkpoint) == 8
    assert adapter_alone == checkpoint != base_alone


def test_merging_is_refused(trained, base, data, tmp_path):
    out, _ = trained
    words = [BIN / "swift", "export", "--model", base, "--model_type", "qwen2_vl", "--template", "qwen2_vl"]
    words += ["--external_plugins", plug_in(data.parent), TINY, "--adapters", out / "checkpoint-4"]
    words += ["--merge_lora", "true", "--torch_dtype", "float32", "--output_dir", tmp_path / "merged"]
    said = run(words, data.parent, expect=1)
    assert "ms-swift's --merge_lora true writes the base model with LoRA in its weights" in said
    assert not (tmp_path / "merged").exists()
