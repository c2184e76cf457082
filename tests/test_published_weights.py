"""Weights of published checkpoints: safetensors and pickles, whole and in parts, and what is wrong with them."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sta_adapter.errors import CheckpointError
from sta_adapter.internvideo import builder_of
from sta_adapter.internvideo.weights import dtype_of_weights, fill, iterate_weights, weight_files

TENSORS = {"0.weight": torch.arange(6.0).view(2, 3), "0.bias": torch.ones(2), "1.weight": torch.full((2,), 3.0)}


def model():
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2, bias=False))


def filled(folder, **how):
    made = model()
    fill(made, iterate_weights(weight_files(folder)), source=folder, **{"dtype": torch.float32, **how})
    return made


def save(folder, layout):
    folder.mkdir(exist_ok=True)
    first, second = dict(list(TENSORS.items())[:2]), dict(list(TENSORS.items())[2:])
    if layout == "safetensors":
        save_file(TENSORS, folder / "model.safetensors")
    elif layout == "bin":
        torch.save(TENSORS, folder / "pytorch_model.bin")
    elif layout == "old_bin":
        torch.save(TENSORS, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    elif layout == "nested":
        torch.save({"module": TENSORS, "step": 3}, folder / "stage2.pt")
    else:
        base, end = ("model", "safetensors") if layout == "shards" else ("pytorch_model", "bin")
        for number, part in enumerate((first, second), 1):
            name = folder / f"{base}-0000{number}-of-00002.{end}"
            save_file(part, name) if end == "safetensors" else torch.save(part, name)
        names = {key: f"{base}-0000{1 + (key in second)}-of-00002.{end}" for key in TENSORS}
        (folder / f"{base}.{end}.index.json").write_text(json.dumps({"weight_map": names}))
    return folder


@pytest.mark.parametrize("layout", ["safetensors", "shards", "bin", "old_bin", "bin_shards", "nested"])
def test_every_published_layout_is_read(layout, tmp_path):
    made = filled(save(tmp_path / "base", layout))
    for name, tensor in made.state_dict().items():
        torch.testing.assert_close(tensor, TENSORS[name], rtol=0, atol=0)
    assert all(parameter.requires_grad for parameter in made.parameters())


@pytest.mark.parametrize("key", ["model", "module", "state_dict"])
def test_weights_beside_what_training_keeps(key, tmp_path):
    torch.save({key: TENSORS, "step": 3}, tmp_path / "state.pt")
    assert dict(iterate_weights(weight_files(tmp_path))).keys() == TENSORS.keys()


def test_weights_are_copies_in_the_type_asked_for(tmp_path):
    folder = save(tmp_path / "base", "safetensors")
    made = filled(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in made.parameters()} == {torch.bfloat16}
    again = filled(folder)
    again[0].weight.data.zero_()
    torch.testing.assert_close(filled(folder)[0].weight.data, TENSORS["0.weight"], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"0.bias": None}, "0.bias missing"),
        ({"2.weight": torch.ones(1)}, "2.weight without a place"),
        ({"0.bias": torch.ones(5)}, r"0.bias is \(5,\), expected \(2,\)"),
    ],
    ids=["missing", "foreign", "other_size"],
)
def test_weights_that_do_not_fit_are_named(change, said, tmp_path):
    kept = {name: tensor for name, tensor in {**TENSORS, **change}.items() if tensor is not None}
    save_file(kept, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=said):
        filled(tmp_path)


class Payload:
    def __reduce__(self):
        return (print, ("code ran",))


def test_a_pickle_with_code_is_refused(tmp_path, capsys):
    torch.save({"0.weight": Payload()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="is never done"):
        filled(tmp_path)
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"\x80\x02", b"\x80\x02}q\x00"], ids=["empty", "begun", "cut off"])
def test_a_pickle_of_which_little_is_there_is_damaged(tmp_path, content):
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin can't be read as weights alone: EOFError"):
        filled(tmp_path)


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="holds no weights"):
        filled(tmp_path)
    folder = save(tmp_path / "base", "shards")
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors is not in"):
        filled(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    with pytest.raises(CheckpointError, match="outside of its folder"):
        filled(folder)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="can't be read as safetensors"):
        filled(tmp_path)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="no table of weights"):
        list(iterate_weights([tmp_path / "list.pt"]))


def test_the_dtype_is_that_asked_for_else_the_configurations_else_bfloat16():
    assert dtype_of_weights(torch.float16, {"dtype": "float32"}) == torch.float16
    assert dtype_of_weights("float32", {}) == torch.float32
    assert dtype_of_weights("auto", {"torch_dtype": "torch.float16"}) == torch.float16
    assert dtype_of_weights("auto", {}) == torch.bfloat16
    with pytest.raises(CheckpointError, match="dtype is 'float99'; expected one of torch's"):
        dtype_of_weights("auto", {"dtype": "float99"})


def test_a_folder_with_several_files_is_ambiguous(tmp_path):
    for name in ("a.pt", "b.pt"):
        torch.save(TENSORS, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"holds a\.pt, b\.pt"):
        weight_files(tmp_path)
    assert weight_files(tmp_path / "a.pt") == [tmp_path / "a.pt"]


@pytest.mark.parametrize(
    "config", [{}, {"model_type": "qwen2_vl"}, {"auto_map": {"AutoModel": "modeling_internvl_chat.InternVLChatModel"}}]
)
def test_what_transformers_makes_itself_has_no_builder(config):
    assert builder_of(config) is None


V2_5, V2 = "sta_adapter.internvideo.v2_5_loading", "sta_adapter.internvideo.v2_loading"


@pytest.mark.parametrize(
    ("config", "module"),
    [
        ({"auto_map": {"AutoModel": "modeling_internvl_chat_hico2.InternVLChatModel"}}, V2_5),
        ({"auto_map": {"AutoModel": "owner/name--modeling_videochat2.InternVideo2_VideoChat2"}}, V2),
        ({"model_type": "internvideo2_5_chat"}, V2_5),
        ({"model_type": "internvideo2_chat"}, V2),
        ({"model_type": "qwen2_vl", "auto_map": {"AutoModel": "modeling_other.Model"}}, None),
        ({"model_type": ["internvideo2_chat"], "auto_map": "modeling_videochat2"}, None),
        ({}, None),
    ],
    ids=["2.5", "2", "2.5 saved", "2 saved", "other", "odd", "empty"],
)
def test_what_makes_a_model_is_told_by_its_configuration(config, module):
    assert getattr(builder_of(config), "__name__", None) == module
