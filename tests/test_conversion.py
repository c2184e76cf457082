"""Checkpoints of the published STAVEQ2 code, turned into adapters and back."""

import json
import os
import pickle
import shlex
import subprocess
import warnings
from pathlib import Path

import pytest
import torch
from cases import clips_of, qwen2_vl_arguments, qwen2_vl_config
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_goldens import qwen2_vl_tower, read_golden, relative_error, run

from sta_adapter import STAConfig, inject_sta, load_sta
from sta_adapter.cli import cli
from sta_adapter.errors import CheckpointError, ConfigError, STAWarning
from sta_adapter.integrations.staveq2.conversion import convert_published, convert_to_published
from sta_adapter.integrations.staveq2.sizes import branch_facts

GOLDENS = ["after_0.25", "after_0.5_head80", "after_1.0", "before_0.25"]
QWEN = {"norm": "norm3", "qkv": "temp_attn.qkv", "proj": "temp_attn.proj"}
every_golden = pytest.mark.parametrize("name", GOLDENS)


def published_tensors(tensors, prefix="visual.", names=QWEN):
    """A golden's weights under the published names, with a base model's beside them."""
    found = {prefix + k.removeprefix("base."): v for k, v in tensors.items() if k.startswith("base.")}
    for key, value in tensors.items():
        if key.startswith("sta."):
            _, index, module, *leaf = key.split(".")
            found[".".join([f"{prefix}blocks", index, names[module], *leaf])] = value
    return {key: value.contiguous() for key, value in found.items()}


def published_checkpoint(folder, name="after_0.25", prefix="visual.", change=lambda tensors: tensors):
    """A folder as the published Qwen2-VL code writes it; (folder, header, golden's tensors)."""
    header, tensors = read_golden(f"qwen2_vl_{name}")
    folder.mkdir(parents=True, exist_ok=True)
    save_file(change(published_tensors(tensors, prefix)), folder / "model.safetensors")
    config = {"model_type": "qwen2_vl", "vision_config": json.loads(header["vision_config"])}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, header, tensors


def same_bits(found, expected):
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        assert torch.equal(found[key].view(torch.uint8), value.contiguous().view(torch.uint8)), key


def assert_same_adapter(found, expected):
    same_bits(*(load_file(folder / "sta_adapter.safetensors") for folder in (found, expected)))
    assert (found / "sta_config.json").read_bytes() == (expected / "sta_config.json").read_bytes()


@every_golden
def test_a_converted_adapter_gives_the_published_output(name, tmp_path):
    folder, header, tensors = published_checkpoint(tmp_path / "published", name)
    order = None if header["order"] == "after_spatial" else header["order"]
    description = convert_published(folder, tmp_path / "adapter", order=order)
    assert description["backbone"] == "qwen2_vl"
    assert description["config"]["token_order"] == "published"
    assert description["config"]["order"] == header["order"]
    assert description["config"]["head_scale"] == float(header["head_scale"])
    assert description["config"]["layers"] == "all"
    assert description["encoder"]["num_heads"] == int(header["num_heads"])
    tower = qwen2_vl_tower(header, tensors)
    handle = load_sta(tower, tmp_path / "adapter")
    assert handle.config.order == header["order"]
    assert relative_error(run(tower, tensors), tensors["published_output"]) <= 1e-4


@every_golden
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_there_and_back_is_exact(name, dtype, tmp_path):
    def cast(tensors):
        return {k: v.to(dtype) for k, v in tensors.items()}

    folder, header, _ = published_checkpoint(tmp_path / "published", name, change=cast)
    convert_published(folder, tmp_path / "adapter", order=header["order"])
    file = convert_to_published(tmp_path / "adapter", tmp_path / "back")
    original = load_file(folder / "model.safetensors")
    same_bits(load_file(file), {k: v for k, v in original.items() if "temp_attn" in k or "norm3" in k})
    convert_published(file, tmp_path / "again")  # needs neither config.json nor the order
    assert_same_adapter(tmp_path / "again", tmp_path / "adapter")


def test_an_adapter_of_ours_there_and_back(tmp_path):
    header, tensors = read_golden("qwen2_vl_after_0.25")
    handle = inject_sta(qwen2_vl_tower(header, tensors))
    handle.save_pretrained(tmp_path / "ours")
    file = convert_to_published(tmp_path / "ours", tmp_path / "x.safetensors")
    assert file == tmp_path / "x.safetensors"
    convert_published(file, tmp_path / "again")
    same_bits(*(load_file(tmp_path / f / "sta_adapter.safetensors") for f in ("again", "ours")))
    assert json.loads((tmp_path / "again" / "sta_config.json").read_text())["config"]["token_order"] == "clip"


@pytest.mark.parametrize(
    "rename",
    [
        pytest.param(lambda k: k.removeprefix("visual."), id="bare tower"),
        pytest.param(lambda k: f"model.{k}", id="transformers 5"),
        pytest.param(lambda k: f"base_model.model.{k}", id="PEFT, saved"),
        pytest.param(
            lambda k: "base_model.model." + k.replace("temp_attn.", "temp_attn.modules_to_save.default.").replace(
                "norm3.", "norm3.modules_to_save.default."
            ),
            id="PEFT, whole state",
        ),
        pytest.param(lambda k: k.replace("temp_attn.", "temp_attn.modules_to_save."), id="PEFT, without the name"),
        pytest.param(
            lambda k: k.replace("qkv.", "qkv.modules_to_save.mine.") if "temp_attn" in k else k, id="PEFT, a part"
        ),
    ],
)  # fmt: skip
def test_any_prefix_and_peft_names(rename, tmp_path):
    plain, _, _ = published_checkpoint(tmp_path / "plain")

    def change(tensors):
        changed = {rename(k): v for k, v in tensors.items()}
        for key, value in tensors.items():  # what PEFT keeps of before the training
            if "temp_attn." in key:
                changed[key.replace("temp_attn.", "temp_attn.original_module.")] = value + 1
        return changed

    renamed, _, _ = published_checkpoint(tmp_path / "renamed", change=change)
    for folder in (plain, renamed):
        convert_published(folder, tmp_path / f"{folder.name}-adapter")
    assert_same_adapter(tmp_path / "renamed-adapter", tmp_path / "plain-adapter")


def shard(folder, keep_all=True):
    """Split a checkpoint in two, with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {"model-1-of-2.safetensors": names[::2], "model-2-of-2.safetensors": names[1::2]}
    for file, keys in halves.items():
        if keep_all or file.startswith("model-1"):
            save_file({k: tensors[k] for k in keys}, folder / file)
    weight_map = {key: file for file, keys in halves.items() for key in keys}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards(tmp_path):
    folder, _, _ = published_checkpoint(tmp_path / "published")
    convert_published(folder, tmp_path / "one")
    shard(folder)
    convert_published(folder, tmp_path / "two")
    same_bits(*(load_file(tmp_path / f / "sta_adapter.safetensors") for f in ("two", "one")))


def test_only_the_needed_tensors_are_read(tmp_path, monkeypatch):
    import safetensors

    folder, _, _ = published_checkpoint(tmp_path / "published")
    read = []

    class Spy:
        def __init__(self, *args, **kwargs):
            self.file = safe_open(*args, **kwargs)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def keys(self):
            return self.file.keys()

        def metadata(self):
            return self.file.metadata()

        def get_slice(self, key):
            return self.file.get_slice(key)  # of which the shape alone is asked

        def get_tensor(self, key):
            read.append(key)
            return self.file.get_tensor(key)

    monkeypatch.setattr(safetensors, "safe_open", Spy)
    convert_published(folder, tmp_path / "adapter")
    assert len(read) == 3 * 6
    assert all("temp_attn" in key or "norm3" in key for key in read)


def test_layers_come_from_the_indices(tmp_path):
    def without_the_middle(tensors):
        return {k: v for k, v in tensors.items() if not k.startswith(("visual.blocks.1.temp", "visual.blocks.1.norm3"))}

    folder, header, tensors = published_checkpoint(tmp_path / "published", change=without_the_middle)
    description = convert_published(folder, tmp_path / "adapter")
    assert description["config"]["layers"] == [0, 2]
    assert description["encoder"]["depth"] == 3
    assert list(load_sta(qwen2_vl_tower(header, tensors), tmp_path / "adapter").blocks) == [0, 2]


def test_a_configuration_that_leaves_out_defaults(tmp_path):
    """transformers writes only what differs from its defaults: 16 heads, here."""
    folder, header, _ = published_checkpoint(tmp_path / "published")
    vision = json.loads(header["vision_config"])
    assert vision.pop("num_heads") == 16
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2_vl", "vision_config": vision}))
    assert convert_published(folder, tmp_path / "adapter")["encoder"]["head_dim"] == 8


def test_a_file_alone_takes_heads_or_a_configuration(tmp_path):
    folder, _, _ = published_checkpoint(tmp_path / "published")
    expected = convert_published(folder, tmp_path / "adapter")
    (tmp_path / "alone").mkdir()
    file = tmp_path / "alone" / "weights.safetensors"
    os.replace(folder / "model.safetensors", file)
    with pytest.raises(CheckpointError, match=r"heads of the encoder can't be known: .*config.json is missing"):
        convert_published(file, tmp_path / "x")
    assert convert_published(file, tmp_path / "x", config=folder / "config.json") == expected
    assert convert_published(file, tmp_path / "x", backbone="qwen2_vl", heads=16, overwrite=True) == expected
    with pytest.raises(ConfigError, match=r"holds sta_adapter\.safetensors, sta_config\.json, which would be lost"):
        convert_published(file, tmp_path / "x", heads=16)


def test_an_encoder_of_one_head():
    state = {"blocks.0.to_qkv.weight": torch.zeros(3 * 8, 8)}
    assert branch_facts(state, {"width": 8, "heads": 1}) == {"num_heads": 1, "head_dim": 8}


def test_internvideo2(tmp_path):
    names = {"norm": "norm3", "qkv": "temporal_attn.qkv", "proj": "temporal_attn.proj", "gamma": "ls3.gamma"}
    _, tensors = read_golden("internvideo2_after")
    published = published_tensors(tensors, "vision_encoder.", names)
    save_file(published, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_config": {"vision_encoder": {"d_model": 64}}}))
    description = convert_published(tmp_path, tmp_path / "adapter", heads=4)
    assert description["backbone"] == "internvideo2"
    config = description["config"]
    assert (config["head_scale"], config["token_order"], config["rope_theta"]) == (1.0, "clip", None)
    assert config["gamma_init"] == 1e-5
    assert description["encoder"] == {"width": 64, "depth": 2, "num_heads": 4, "head_dim": 16}
    back = load_file(convert_to_published(tmp_path / "adapter", tmp_path / "back", prefix="vision_encoder."))
    same_bits(back, {k: v for k, v in published.items() if any(n in k for n in ("temporal_attn", "norm3", "ls3"))})


def test_a_gamma_without_its_module(tmp_path):
    names = {"norm": "norm3", "qkv": "temporal_attn.qkv", "proj": "temporal_attn.proj", "gamma": "ls3"}
    _, tensors = read_golden("internvideo2_after")
    save_file(published_tensors(tensors, "", names), tmp_path / "model.safetensors")
    convert_published(tmp_path, tmp_path / "adapter", heads=4)
    found = load_file(tmp_path / "adapter" / "sta_adapter.safetensors")
    assert torch.equal(found["blocks.1.gamma"], tensors["sta.1.gamma"])


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def only_a_pickle(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))


def lose_a_shard(folder):
    shard(folder, keep_all=False)


def other_heads(folder):
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["num_heads"] = 3
    (folder / "config.json").write_text(json.dumps(config))


def other_width(folder):
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["embed_dim"] = 64
    (folder / "config.json").write_text(json.dumps(config))


def fewer_blocks(folder):
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["depth"] = 2
    (folder / "config.json").write_text(json.dumps(config))


def edit(change):
    def apply(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


QKV = "visual.blocks.1.temp_attn.qkv.weight"


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        pytest.param(truncate, "model.safetensors is damaged or no safetensors file", id="truncated"),
        pytest.param(only_a_pickle, "is a pickle.*never read here.*save_file", id="pickle"),
        pytest.param(lose_a_shard, "and model-2-of-2.safetensors is not in .*download the checkpoint again", id="lost shard"),
        pytest.param(other_heads, "96 rows; expected 3 .*3 heads on a width of 128", id="heads"),
        pytest.param(other_width, "are 128 wide, but the configuration's encoder is 64 wide", id="width"),
        pytest.param(fewer_blocks, r"weights for the blocks \[2\], but the encoder has 2 blocks", id="depth"),
        pytest.param(lambda f: (f / "config.json").write_text("{"), "config.json can't be read as JSON", id="config"),
        pytest.param(
            lambda f: (f / "model.safetensors").unlink(), "holds no safetensors file; found: config.json", id="no weights"
        ),
        pytest.param(edit(lambda t: t.pop(QKV)), "missing blocks.1.to_qkv.weight", id="missing tensor"),
        pytest.param(
            edit(lambda t: t.update({QKV: t[QKV][:48].clone()})), r"has the shape \(48, 128\), expected", id="shape"
        ),
        pytest.param(
            edit(lambda t: t.update({"visual.blocks.1.temp_attn.q_norm.weight": torch.ones(8)})),
            "no place for: visual.blocks.1.temp_attn.q_norm.weight",
            id="unknown tensor",
        ),
        pytest.param(edit(lambda t: t.update({f"other.{QKV}": t[QKV].clone()})), "are the same tensor", id="twice"),
        pytest.param(edit(lambda t: t[QKV].fill_(float("nan"))), "NaN or infinity", id="not finite"),
        pytest.param(
            edit(lambda t: [t.pop(k) for k in list(t) if "temp_attn" in k or "norm3" in k]),
            "holds no tensor of STA under a published name",
            id="no STA",
        ),
    ],
)  # fmt: skip
def test_bad_checkpoints(damage, match, tmp_path):
    folder, _, _ = published_checkpoint(tmp_path / "published")
    damage(folder)
    with pytest.raises(CheckpointError, match=match):
        convert_published(folder, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_bad_sources(tmp_path):
    with pytest.raises(CheckpointError, match="there is no file or folder"):
        convert_published(tmp_path / "nowhere", tmp_path / "adapter")
    (tmp_path / "a.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"a\.bin is a pickle"):
        convert_published(tmp_path / "a.bin", tmp_path / "adapter")
    (tmp_path / "a.txt").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="is no safetensors file"):
        convert_published(tmp_path / "a.txt", tmp_path / "adapter")
    folder, _, _ = published_checkpoint(tmp_path / "published")
    with pytest.raises(ConfigError, match="order='sideways'"):
        convert_published(folder, tmp_path / "adapter", order="sideways")
    with pytest.raises(CheckpointError, match="there is no configuration"):
        convert_published(folder, tmp_path / "adapter", config=tmp_path / "none.json")


@pytest.mark.parametrize(
    "name", ["$(touch bad).bin", "a'; touch bad; '.bin", "`touch bad`.bin", "-x.bin", "a\nb.bin", 'a", "b.bin']
)
def test_the_command_that_is_shown_for_a_pickle_is_safe(tmp_path, monkeypatch, name):
    """What stands in the message, given to a shell with another Python, does just that for that file."""
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.ones(2)}, Path(name))
    with pytest.raises(CheckpointError, match="is a pickle") as raised:
        convert_published(Path(name), tmp_path / "out")
    command = str(raised.value).partition("make safetensors of it once: ")[2]
    python, option, code, *rest = shlex.split(command)
    assert (python, option, rest) == ("python", "-c", [name, str(Path(name).with_suffix(".safetensors"))])
    compile(code, "shown", "exec")
    subprocess.run(["sh", "-c", command.replace("python", "true", 1)], check=True)
    assert not (tmp_path / "bad").exists()


def test_command_line(tmp_path):
    folder, _, _ = published_checkpoint(tmp_path / "published")
    result = CliRunner().invoke(cli, ["convert", str(folder), str(tmp_path / "adapter"), "--order", "before_spatial"])
    assert result.exit_code == 0, result.output
    assert "qwen2_vl, 3 of 3 blocks, 4 heads of 8, order=before_spatial, token_order=published" in result.output
    result = CliRunner().invoke(cli, ["convert", str(tmp_path / "adapter"), str(tmp_path / "p"), "--to-published"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "p" / "staveq2.safetensors").exists()
    result = CliRunner().invoke(cli, ["convert", "a", "b", "--to-published", "--heads", "4"])
    assert isinstance(result.exception, ConfigError)
    help_text = CliRunner().invoke(cli, ["convert", "--help"]).output
    assert "Example: sta-adapter convert STAVEQ2-2B my-adapter\n" in help_text


def test_the_full_model_takes_a_converted_adapter(tmp_path):
    """The names of a whole checkpoint, and the configuration as transformers writes it."""
    from transformers import Qwen2VLForConditionalGeneration

    model = Qwen2VLForConditionalGeneration(qwen2_vl_config()).eval()
    handle = inject_sta(model)
    handle.save_pretrained(tmp_path / "ours")
    handle.remove()
    model.save_pretrained(tmp_path / "published")
    with safe_open(convert_to_published(tmp_path / "ours", tmp_path / "sta"), "pt") as file:
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    save_file(weights, tmp_path / "published" / "sta.safetensors")  # without our header
    description = convert_published(tmp_path / "published", tmp_path / "adapter")
    assert description["encoder"] == {"width": 32, "depth": 3, "num_heads": 1, "head_dim": 8}
    load_sta(model, tmp_path / "adapter")
    arguments = qwen2_vl_arguments(clips_of(2))
    tower = model.model.visual if hasattr(model.model, "visual") else model.visual
    assert tower(**arguments) is not None


def test_a_converted_adapter_knows_the_sizes_of_its_language_model(tmp_path):
    """Qwen2-VL's models share one vision encoder: by its sizes alone the adapter of one would go into another."""
    from transformers import Qwen2VLForConditionalGeneration

    folder, header, _ = published_checkpoint(tmp_path / "published")
    own = {"num_heads": 16, **json.loads(header["vision_config"])}
    config = qwen2_vl_config()
    config.vision_config.update(own)
    config.save_pretrained(folder)
    convert_published(folder, tmp_path / "adapter")
    load_sta(Qwen2VLForConditionalGeneration(config), tmp_path / "adapter")
    file = convert_to_published(tmp_path / "adapter", tmp_path / "back")
    convert_published(file, tmp_path / "again")
    assert_same_adapter(tmp_path / "again", tmp_path / "adapter")
    larger = Qwen2VLForConditionalGeneration(config)
    getattr(larger.config, "text_config", larger.config).num_hidden_layers = 5
    for name in ("adapter", "again"):
        with pytest.raises(CheckpointError, match="another language model: num_hidden_layers: 2 in the adapter, 5 in"):
            load_sta(larger, tmp_path / name)


def test_what_the_published_code_does_not_have_is_told(tmp_path):
    header, tensors = read_golden("qwen2_vl_after_0.25")
    handle = inject_sta(qwen2_vl_tower(header, tensors), STAConfig(causal=True, window=2))
    handle.save_pretrained(tmp_path / "ours")
    told = (
        r"something else with these weights: token_order is 'clip', there 'published'; causal is True, there False; "
        r"window is 2, there None\."
    )
    with pytest.warns(STAWarning, match=told):
        convert_to_published(tmp_path / "ours", tmp_path / "x.safetensors")
    folder, _, _ = published_checkpoint(tmp_path / "published")
    convert_published(folder, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert_to_published(tmp_path / "adapter", tmp_path / "y.safetensors")
