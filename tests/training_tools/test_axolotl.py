"""STA in axolotl, by its own command and YAML."""

import json
import os
from pathlib import Path

import pytest
import yaml
from runs import BIN, KILLED, Page, check_adapter, run, same_weights

from sta_adapter.errors import ConfigError
from sta_adapter.integrations.convert_data import convert_data


@pytest.fixture(scope="module")
def data(clips):
    return convert_data(clips / "clips.jsonl", clips / "axolotl.jsonl", to="axolotl").path


def axolotl(base, data, out, expect=0, launcher=("--launcher", "python"), path=(), **changed):
    kernels = {f"lora_{name}_kernel": False for name in ("mlp", "qkv", "o", "embedding")}
    settings = {
        "base_model": str(base), "processor_type": "AutoProcessor", "chat_template": "tokenizer_default",
        "plugins": ["axolotl_decoder.Decoder", "sta_adapter.integrations.axolotl.STAPlugin"], "adapter": "lora", "lora_r": 8, "lora_alpha": 8,
        "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "seed": 0, "skip_prepare_dataset": True, "remove_unused_columns": False,
        "sample_packing": False, "sequence_len": 2048, "micro_batch_size": 2, "gradient_accumulation_steps": 1, "max_steps": 4,
        "datasets": [{"path": str(data), "ds_type": "json", "type": "chat_template", "field_messages": "messages"}],
        "save_steps": 2, "num_epochs": 1, "learning_rate": 1.0e-3, "optimizer": "adamw_torch", "lr_scheduler": "cosine",
        "gradient_checkpointing": True, "bf16": False, "fp16": False, "tf32": False, "output_dir": str(out), "logging_steps": 1,
        "dataset_prepared_path": str(out.parent / "prepared"), "dataset_num_proc": 1, "dataloader_num_workers": 0, **kernels, **changed,
    }  # fmt: skip
    file = out.parent / f"{out.name}.yaml"
    file.write_text(yaml.safe_dump(settings))
    words = [BIN / "axolotl", "train", file, *launcher]
    found = os.pathsep.join([str(Path(__file__).parent), *path])
    return run(words, data.parent, expect, AXOLOTL_DO_NOT_TRACK="1", PYTHONPATH=found)


@pytest.fixture(scope="module")
def trained(base, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("axolotl") / "out"
    axolotl(base, data, out, launcher=(), sta={"head_scale": 0.5})
    return out


def test_sft(trained, base, clips):
    for folder in (trained, trained / "checkpoint-4"):
        check_adapter(folder, base, clips)
    assert json.loads((trained / "sta_config.json").read_text())["config"]["head_scale"] == 0.5


def test_the_page(base, clips, tmp_path):
    page = Page("axolotl", base, clips, tmp_path)
    page.run(page.command("sta-adapter convert-data"))
    settings = yaml.safe_load(page.block("yaml"))
    on_a_cpu = {"bf16": False, "tf32": False, "plugins": ["axolotl_decoder.Decoder", *settings["plugins"]]}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump({**settings, **on_a_cpu}))
    page.run(page.block("bash"), AXOLOTL_DO_NOT_TRACK="1", PYTHONPATH=str(Path(__file__).parent))
    check_adapter(tmp_path / "my-adapter", base, clips)
    page.run(page.command("sta-adapter evaluate"))


def test_resuming_after_a_kill_gives_the_same_bits(trained, base, data, tmp_path):
    out = tmp_path / "out"
    axolotl(base, data, out, expect=1, path=[KILLED], sta={"head_scale": 0.5})
    assert not (out / "checkpoint-4").exists()
    axolotl(base, data, out, sta={"head_scale": 0.5}, resume_from_checkpoint=str(out / "checkpoint-2"))
    same_weights(trained, out)


def test_going_on_with_an_adapter(trained, base, data, clips, tmp_path):
    axolotl(base, data, tmp_path / "out", lora_model_dir=str(trained), max_steps=1, learning_rate=0.0)
    same_weights(trained, tmp_path / "out")


def test_two_processes(base, data, clips, tmp_path):
    launcher = ["--launcher", "torchrun", "--", "--nproc-per-node=2"]
    axolotl(base, data, tmp_path / "out", launcher=launcher, max_steps=2)
    check_adapter(tmp_path / "out", base, clips)


def test_bf16_and_checkpointing(base, data, clips, tmp_path):
    axolotl(base, data, tmp_path / "out", max_steps=2, bf16=True)
    check_adapter(tmp_path / "out", base, clips)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sta": {"stage": 1}}, "stage 1 has no LoRA"),
        ({"adapter": None}, "set adapter: lora"),
        ({"sample_packing": True}, "set sample_packing: false"),
        ({"rl": "dpo"}, "hands no clips to the model"),
        ({"merge_lora": True}, "sta-adapter export ADAPTER OUT --merge-lora BASE"),
    ],
    ids=["stage 1", "no LoRA", "packing", "preferences", "merging"],
)
def test_what_would_not_train_is_refused(changed, message):
    from axolotl.utils.dict import DictDefault

    from sta_adapter.integrations.axolotl import STAPlugin

    with pytest.raises(ConfigError, match=message):
        STAPlugin().register(DictDefault({"adapter": "lora", **changed}))


def test_a_refusal_comes_before_anything_is_loaded(base, data, tmp_path):
    said = axolotl(base, data, tmp_path / "out", expect=1, sample_packing=True)
    assert "set sample_packing: false" in said
    assert "Loading weights" not in said
