"""STA in LLaMA-Factory, by its own launcher and its own YAML."""

import json
import math
import sys

import pytest
import torch
import yaml
from runs import KILLED, Page, check_adapter, run, same_weights
from safetensors.torch import load_file

from sta_adapter.errors import ConfigError
from sta_adapter.integrations.convert_data import convert_data
from sta_adapter.integrations.llamafactory import take_settings


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


def test_sft(trained, base, clips):
    for folder in (trained, trained / "checkpoint-4"):
        check_adapter(folder, base, clips)
    assert json.loads((trained / "sta_config.json").read_text())["config"]["head_scale"] == 0.5


def test_the_page(base, clips, tmp_path):
    page = Page("llamafactory", base, clips, tmp_path)
    page.run(page.command("sta-adapter convert-data"))
    on_a_cpu = {"use_cpu": True, "report_to": "none"}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump({**yaml.safe_load(page.block("yaml")), **on_a_cpu}))
    page.run(page.block("bash"), DISABLE_VERSION_CHECK="1")
    check_adapter(tmp_path / "my-adapter", base, clips)
    page.run(page.command("sta-adapter evaluate"))


def test_resuming_after_a_kill_gives_the_same_bits(trained, base, data, tmp_path):
    factory(base, data, tmp_path / "out", expect=1, environment={"PYTHONPATH": KILLED}, sta={"head_scale": 0.5})
    assert not (tmp_path / "out/checkpoint-4").exists()
    said = factory(base, data, tmp_path / "out", sta={"head_scale": 0.5})  # the same command again
    assert "Resuming training from" in said
    same_weights(trained, tmp_path / "out")


def test_two_processes_by_its_launcher(base, data, clips, tmp_path):
    several = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2"}
    factory(base, data, tmp_path / "out", max_steps=2, environment=several, ddp_find_unused_parameters=False)
    check_adapter(tmp_path / "out", base, clips)


def first_loss(out):
    return json.loads((out / "trainer_log.jsonl").read_text().splitlines()[0])["loss"]


def test_dpo(trained, base, data, clips, tmp_path):
    """The first loss is log 2 where the model that is trained equals the reference."""
    settings = {"stage": "dpo", "dataset": "pairs-lf"}
    factory(base, data, tmp_path / "out", max_steps=2, **settings)
    check_adapter(tmp_path / "out", base, clips)
    assert first_loss(tmp_path / "out") == pytest.approx(math.log(2), abs=1e-4)

    after = {"adapter_name_or_path": str(trained), "max_steps": 1, **settings}
    factory(base, data, tmp_path / "from-base", **after)
    assert abs(first_loss(tmp_path / "from-base") - math.log(2)) > 1e-3
    factory(base, data, tmp_path / "from-itself", **after, ref_model=str(base), ref_model_adapters=str(trained))
    assert first_loss(tmp_path / "from-itself") == pytest.approx(math.log(2), abs=1e-4)
    check_adapter(tmp_path / "from-itself", base, clips)


def test_bf16_and_checkpointing(base, data, clips, tmp_path):
    said = factory(base, data, tmp_path / "out", max_steps=2, bf16=True, disable_gradient_checkpointing=False)
    assert "Gradient checkpointing enabled" in said
    check_adapter(tmp_path / "out", base, clips)


def test_packing(base, data, tmp_path):
    """Two samples in one row train STA as two rows do; without borders between them they are refused."""
    two = {"max_samples": 2, "max_steps": 1, "cutoff_len": 256, "optim": "sgd", "learning_rate": 1.0}
    factory(base, data, tmp_path / "rows", **two)
    said = factory(base, data, tmp_path / "packed", **two, neat_packing=True)
    assert "Num examples = 1" in said
    rows, packed = (load_file(tmp_path / name / "sta_adapter.safetensors") for name in ("rows", "packed"))
    for name in rows:
        assert torch.allclose(rows[name], packed[name], atol=1e-5), name
    assert rows["blocks.0.to_out.weight"].abs().max() > 1e-3  # begins at zero
    with pytest.raises(ConfigError, match="set neat_packing: true"):
        take_settings({**two, "packing": True})


def test_exporting_is_refused(trained, base, tmp_path):
    settings = {
        "model_name_or_path": str(base), "adapter_name_or_path": str(trained), "template": "qwen2_vl",
        "finetuning_type": "lora", "export_dir": str(tmp_path / "merged"), "export_device": "cpu",
    }  # fmt: skip
    (tmp_path / "export.yaml").write_text(yaml.safe_dump(settings))
    words = [sys.executable, "-m", "sta_adapter.integrations.llamafactory", "export", tmp_path / "export.yaml"]
    said = run(words, tmp_path, expect=1, DISABLE_VERSION_CHECK="1")
    assert "error: llamafactory-cli export writes the base model with LoRA in its weights" in said
    assert not (tmp_path / "merged").exists()


def test_wrong_settings(base, data, tmp_path):
    said = factory(base, data, tmp_path / "out", expect=1, sta={"head_scal": 1})
    assert "error: unknown setting 'head_scal' (did you mean 'head_scale'?)" in said
    with pytest.raises(ConfigError, match="finetuning_type is 'full', and STA goes in together with LoRA"):
        take_settings({"finetuning_type": "full"})
