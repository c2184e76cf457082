"""`convert` on files of strangers: numbers, names and kinds of file that no checkpoint has are refused before anything is made of them."""

import json
import os
import shlex
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_conversion import published_checkpoint

from sta_adapter.errors import CheckpointError
from sta_adapter.integrations.staveq2.conversion import convert_published, convert_to_published


@pytest.fixture
def folder(tmp_path):
    return published_checkpoint(tmp_path / "published")[0]


def configured(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["vision_config"].update(depth=10**12),
        lambda c: c["vision_config"].update(num_heads=10**15),
        lambda c: c.update(text_config={"num_hidden_layers": 10**12}),
        lambda c: c.update(num_hidden_layers=10**12),
        lambda c: c["vision_config"].update(depth=-3),
    ],
    ids=["depth", "heads", "layers of text", "layers", "negative"],
)
def test_numbers_that_lists_would_be_made_of(folder, tmp_path, change):
    configured(folder, change)
    with pytest.raises(CheckpointError, match=r"expected at most 10000"):
        convert_published(folder, tmp_path / "out")


@pytest.mark.parametrize("text", ['{"a": ' + "9" * 5000 + "}", '{"a":' * 40 + "1" + "}" * 40, '{"a": 1e999}', "[1]"],
                         ids=["digits", "deep", "infinite", "list"])  # fmt: skip
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_that_no_checkpoint_has(folder, tmp_path, name, text):
    (folder / name).write_text(text)
    with pytest.raises(CheckpointError, match=name):
        convert_published(folder, tmp_path / "out")


@pytest.mark.parametrize("index", [{"weight_map": []}, {"weight_map": {"a": 3}}, {"weight_map": {"a": ["b"]}}])
def test_an_index_of_another_form(folder, tmp_path, index):
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="weight_map must name a file for each tensor"):
        convert_published(folder, tmp_path / "out")


def test_a_configuration_of_another_form(folder, tmp_path):
    configured(folder, lambda c: c.update(vision_config={"depth": "x", "num_heads": None}))
    with pytest.raises(CheckpointError):
        convert_published(folder, tmp_path / "out")


@pytest.mark.parametrize("index", ["999999999999", "9" * 5000])
def test_an_index_of_a_block_that_no_encoder_has(folder, tmp_path, index):
    tensors = load_file(folder / "model.safetensors")
    tensors[f"visual.blocks.{index}.temp_attn.qkv.weight"] = torch.ones(2, 2)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="that an adapter has no place for"):
        convert_published(folder, tmp_path / "out")


@pytest.mark.parametrize("name", ["depth", "num_heads"])
def test_numbers_in_the_header_of_a_file_of_ours(folder, tmp_path, name):
    convert_published(folder, tmp_path / "adapter")
    file = convert_to_published(tmp_path / "adapter", tmp_path / "staveq2.safetensors")
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    description = json.loads(metadata["sta_config"])
    description["encoder"][name] = 10**12
    save_file(load_file(file), file, {**metadata, "sta_config": json.dumps(description)})
    with pytest.raises(CheckpointError, match=f"{name} is 1000000000000, expected at most"):
        convert_published(file, tmp_path / "out")
    save_file(load_file(file), file, {**metadata, "sta_config": '{"a": ' + "9" * 5000 + "}"})
    with pytest.raises(CheckpointError, match="can't be read as JSON"):
        convert_published(file, tmp_path / "out")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "model.safetensors.index.json"])
def test_a_pipe_is_not_waited_for(folder, tmp_path, name):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match="is no regular file"):
        convert_published(folder, tmp_path / "out")


def test_the_command_for_a_pickle_runs_no_part_of_its_name(tmp_path):
    file = tmp_path / "a$(touch ran)'; touch ran;'`touch ran`.bin"
    torch.save({"a": torch.ones(2)}, file)
    with pytest.raises(CheckpointError, match="is a pickle") as caught:
        convert_published(file, tmp_path / "out")
    command = str(caught.value).split("once: ")[1]
    command = command.replace("python", shlex.quote(sys.executable), 1)
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
    assert not (tmp_path / "ran").exists()
    assert load_file(file.with_suffix(".safetensors"))["a"].tolist() == [1, 1]
