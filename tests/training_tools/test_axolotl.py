"""STA in axolotl, by its own command and YAML."""

import json
from pathlib import Path

import pytest
import yaml
from runs import BIN, check_adapter, evaluate, run

from sta_adapter.integrations.convert_data import convert_data


@pytest.fixture(scope="module")
def data(clips):
    return convert_data(clips / "clips.jsonl", clips / "axolotl.jsonl", to="axolotl").path


def axolotl(base, data, out, expect=0, **changed):
    kernels = {f"lora_{name}_kernel": False for name in ("mlp", "qkv", "o", "embedding")}
    settings = {
        "base_model": str(base), "processor_type": "AutoProcessor", "chat_template": "tokenizer_default",
        "plugins": ["axolotl_decoder.Decoder", "sta_adapter.integrations.axolotl.STAPlugin"], "adapter": "lora", "lora_r": 8, "lora_alpha": 8,
        "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "skip_prepare_dataset": True, "remove_unused_columns": False,
        "sample_packing": False, "sequence_len": 2048, "micro_batch_size": 2, "gradient_accumulation_steps": 1, "max_steps": 4,
        "datasets": [{"path": str(data), "ds_type": "json", "type": "chat_template", "field_messages": "messages"}],
        "save_steps": 2, "num_epochs": 1, "learning_rate": 1.0e-3, "optimizer": "adamw_torch", "lr_scheduler": "cosine",
        "gradient_checkpointing": True, "bf16": False, "fp16": False, "tf32": False, "output_dir": str(out), "logging_steps": 1,
        "dataset_prepared_path": str(out.parent / "prepared"), "dataset_num_proc": 1, "dataloader_num_workers": 0, **kernels, **changed,
    }  # fmt: skip
    file = out.parent / f"{out.name}.yaml"
    file.write_text(yaml.safe_dump(settings))
    words = [BIN / "python", "-m", "axolotl.cli.train", file]
    return run(words, data.parent, expect, AXOLOTL_DO_NOT_TRACK="1", PYTHONPATH=str(Path(__file__).parent))


def test_sft(base, data, clips, tmp_path):
    axolotl(base, data, tmp_path / "out", sta={"head_scale": 0.5})
    for folder in (tmp_path / "out", tmp_path / "out/checkpoint-4"):
        check_adapter(folder, base, clips)
    assert json.loads((tmp_path / "out/sta_config.json").read_text())["config"]["head_scale"] == 0.5
    evaluate(tmp_path / "out", base, clips, tmp_path / "evaluation")


def test_wrong_settings(base, data, tmp_path):
    said = axolotl(base, data, tmp_path / "out", expect=1, sta={"stage": 1})
    assert "stage 1 has no LoRA" in said
