"""STA in LLaMA-Factory, by its own launcher and its own YAML."""

import json
import sys

import pytest
import yaml
from runs import check_adapter, evaluate, run, same_weights

from sta_adapter.integrations.convert_data import convert_data


@pytest.fixture(scope="module")
def data(clips):
    convert_data(clips / "pairs.jsonl", clips / "pairs-lf.jsonl", to="llamafactory")
    return convert_data(clips / "clips.jsonl", clips / "clips-lf.jsonl", to="llamafactory").path


def factory(base, data, out, expect=0, environment=None, **changed):
    settings = {
        "model_name_or_path": str(base), "template": "qwen2_vl", "stage": "sft", "do_train": True, "finetuning_type": "lora",
        "lora_rank": 8, "lora_target": "all", "dataset": "clips-lf", "dataset_dir": str(data.parent), "video_maxlen": 8,
        "video_fps": 8.0, "video_max_pixels": 1024, "cutoff_len": 2048, "preprocessing_num_workers": 1, "output_dir": str(out),
        "dataloader_num_workers": 0, "max_steps": 4, "save_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 2,
        "learning_rate": 1.0e-3, "use_cpu": True, "bf16": False, "report_to": "none", "overwrite_cache": True, **changed,
    }  # fmt: skip
    file = out.parent / f"{out.name}.yaml"
    file.write_text(yaml.safe_dump(settings))
    words = [sys.executable, "-m", "sta_adapter.integrations.llamafactory", "train", file]
    return run(words, data.parent, expect, DISABLE_VERSION_CHECK="1", **(environment or {}))


@pytest.fixture(scope="module")
def trained(base, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("factory") / "out"
    factory(base, data, out, sta={"head_scale": 0.5})
    return out


def test_sft(trained, base, clips, tmp_path):
    for folder in (trained, trained / "checkpoint-4"):
        check_adapter(folder, base, clips)
    assert json.loads((trained / "sta_config.json").read_text())["config"]["head_scale"] == 0.5
    evaluate(trained, base, clips, tmp_path / "evaluation")


def test_resuming_gives_the_same_bits(trained, base, data, tmp_path):
    resumed = {"resume_from_checkpoint": str(trained / "checkpoint-2"), "sta": {"head_scale": 0.5}}
    factory(base, data, tmp_path / "again", **resumed)
    same_weights(trained, tmp_path / "again")


def test_two_processes_by_its_launcher(base, data, clips, tmp_path):
    several = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2"}
    factory(base, data, tmp_path / "out", max_steps=2, environment=several, ddp_find_unused_parameters=False)
    check_adapter(tmp_path / "out", base, clips)


def test_dpo(base, data, clips, tmp_path):
    factory(base, data, tmp_path / "out", stage="dpo", dataset="pairs-lf", max_steps=2)
    check_adapter(tmp_path / "out", base, clips)


def test_bf16(base, data, clips, tmp_path):
    factory(base, data, tmp_path / "out", max_steps=2, bf16=True)
    check_adapter(tmp_path / "out", base, clips)


def test_wrong_settings(base, data, tmp_path):
    said = factory(base, data, tmp_path / "out", expect=1, sta={"head_scal": 1})
    assert "error: unknown setting 'head_scal' (did you mean 'head_scale'?)" in said
    said = factory(base, data, tmp_path / "out", expect=1, finetuning_type="full")
    assert "finetuning_type is 'full', and STA goes in together with LoRA" in said
