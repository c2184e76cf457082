"""STA in ms-swift's own commands."""

import json
from pathlib import Path

import pytest
from runs import BIN, check_adapter, evaluate, run, same_weights

from sta_adapter.integrations.convert_data import convert_data

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


def test_sft(trained, base, clips, tmp_path):
    out, said = trained
    assert "--strict true makes it an error" in said
    check_adapter(out / "checkpoint-4", base, clips)
    check_adapter(out, base, clips)
    config = json.loads((out / "checkpoint-4/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (16, 16)  # the recipe's
    evaluate(out, base, clips, tmp_path)


def test_resuming_gives_the_same_bits(trained, base, data, tmp_path):
    out, _ = trained
    swift("sft", base, data, tmp_path / "again", "--resume_from_checkpoint", out / "checkpoint-2")
    same_weights(out / "checkpoint-4", tmp_path / "again/checkpoint-4")


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


def test_dpo_after_sft(trained, base, clips, data, tmp_path):
    out, _ = trained
    words = ["--rlhf_type", "dpo", "--adapters", out / "checkpoint-4", "--ref_adapters", out / "checkpoint-4"]
    swift("rlhf", base, data.with_name("swift-pairs.jsonl"), tmp_path / "out", *words, steps=2)
    check_adapter(tmp_path / "out/checkpoint-2", base, clips)


def test_answers(trained, base, data, tmp_path):
    out, _ = trained
    words = [
        BIN / "swift",
        "infer",
        "--model",
        base,
        "--model_type",
        "qwen2_vl",
        "--template",
        "qwen2_vl",
        "--adapters",
        out / "checkpoint-4",
    ]
    words += [
        "--external_plugins",
        plug_in(data.parent),
        TINY,
        "--val_dataset",
        data,
        "--max_new_tokens",
        4,
        "--torch_dtype",
        "float32",
    ]
    run([*words, "--result_path", tmp_path / "said.jsonl"], data.parent, **FRAMES)
    assert len((tmp_path / "said.jsonl").read_text().splitlines()) == 8
