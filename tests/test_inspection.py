"""`sta-adapter inspect`: what it says must be what injection does, and no weight is ever made."""

import importlib
import json

import pytest
import torch
import transformers
from cases import case_parameters, make_qwen2_vl, qwen2_vl_config, seeded
from click.testing import CliRunner
from qwen2_vl_prompts import NATIVE, transformers_version

from sta_adapter import STAConfig, inject_sta
from sta_adapter.cli import cli
from sta_adapter.cli.inspect import describe, parse_layers
from sta_adapter.errors import CheckpointError, ConfigError, UnknownBackboneError
from sta_adapter.inspection import ClipSize, empty_model, inspect_model

QWEN2_VL_2B = {  # as on the Hub
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "model_type": "qwen2_vl",
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "tie_word_embeddings": True,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_config": {
        "depth": 32,
        "embed_dim": 1280,
        "mlp_ratio": 4,
        "num_heads": 16,
        "in_chans": 3,
        "hidden_size": 1536,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
    },
}
REMOTE_CONFIG = """
from transformers import PretrainedConfig

class MineConfig(PretrainedConfig):
    model_type = "mine"
"""
REMOTE_MODEL = """
import torch
from transformers import PreTrainedModel
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel
from .configuration_mine import MineConfig

class MineModel(PreTrainedModel):
    config_class = MineConfig

    def __init__(self, config):
        super().__init__(config)
        self.rates = [rate.item() for rate in torch.linspace(0, 0.1, 3)]  # as drop path in many encoders
        sizes = {"depth": 3, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4}
        self.visual = Qwen2VisionTransformerPretrainedModel._from_config(Qwen2VLVisionConfig(**sizes))
        self.post_init()
"""


@pytest.fixture
def real_sizes(tmp_path):
    """A folder with the configuration of Qwen2-VL-2B, and nothing else."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN2_VL_2B))
    return tmp_path


def invoke(*arguments):
    result = CliRunner().invoke(cli, ["inspect", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout if hasattr(result, "stdout") else result.output


def test_qwen2_vl_2b_by_the_numbers(real_sizes):
    model = empty_model(real_sizes)
    assert type(model).__name__ == "Qwen2VLForConditionalGeneration"
    assert all(p.is_meta for p in model.parameters())
    report = inspect_model(model)
    assert report["backbone"] == "qwen2_vl"
    assert (report["encoder"]["width"], report["encoder"]["heads"], report["encoder"]["blocks"]) == (1280, 16, 32)
    block = 2 * 1280 + (1280 + 1) * 3 * 320 + (320 + 1) * 1280  # norm, to_qkv, to_out
    assert [b["parameters"] for b in report["blocks"]] == [block] * 32
    assert {b["heads"] for b in report["blocks"]} == {4}
    assert round(report["parameters"]["sta"] / 1e6, 1) == 52.6
    assert round(report["parameters"]["encoder"] / 1e6) == 665


def test_arithmetic_by_hand(real_sizes):
    """Per token and block: 12 width squared and 2 N width against 4 width H and 2 T H, H = 4 heads of 80."""
    for clip in (ClipSize(), ClipSize(8, 16, 16)):
        found = inspect_model(empty_model(real_sizes), clip=clip)["arithmetic"]
        patches = clip.rows * clip.columns
        base = 32 * (12 * 1280**2 + 2 * patches * 1280) + 1280 * 3 * 2 * 14 * 14
        added = 32 * (4 * 1280 * 320 + 2 * clip.frames * 320)
        assert found["percent"] == pytest.approx(100 * added / base)
        assert found["encoder_gflop"] == pytest.approx(2e-9 * base * clip.frames * patches)
        assert found["sta_gflop"] == pytest.approx(2e-9 * added * clip.frames * patches)
        assert 7 < found["percent"] < 8.5


def test_memory_of_a_stream_by_hand(real_sizes):
    model = empty_model(real_sizes)
    assert inspect_model(model)["stream"] is None
    found = inspect_model(model, STAConfig(causal=True, window=64), clip=ClipSize(8, 16, 24))["stream"]
    assert found["bytes"] == 2 * 4 * 80 * (16 * 24) * 64 * 32 * 4
    assert (found["window"], found["positions"], found["dtype"]) == (64, 384, "float32")
    text = invoke(real_sizes, "--window", "64", "--clip", "8x16x24")
    assert "stream" in text
    assert "keeps 1,920.0 MiB in float32, for 384 positions a frame and a window of 64" in " ".join(text.split())


def test_memory_of_a_stream_is_what_it_will_keep():
    handle = inject_sta(seeded(make_qwen2_vl), STAConfig(causal=True, window=3))
    with handle.stream() as stream:
        handle.encoder(torch.randn(8, 96), grid_thw=torch.tensor([[1, 2, 4]]))
    handle.remove()
    report = inspect_model(handle.model, STAConfig(causal=True, window=3), clip=ClipSize(1, 2, 4))
    assert report["stream"]["bytes"] == stream.bytes > 0


def test_a_window_for_an_encoder_that_looks_across_frames():
    case = next(p.values[0] for p in case_parameters() if p.id == "internvideo2")
    report = inspect_model(case.make(), STAConfig(causal=True, window=3))
    assert report["stream"] is None
    assert any("not known to compute each frame by itself" in warning for warning in report["warnings"])


def test_half_the_layers_cost_half(real_sizes):
    model = empty_model(real_sizes)
    whole, half = (inspect_model(model, STAConfig(layers=layers)) for layers in ("all", tuple(range(0, 32, 2))))
    assert half["parameters"]["sta"] * 2 == whole["parameters"]["sta"]
    assert half["arithmetic"]["percent"] * 2 == pytest.approx(whole["arithmetic"]["percent"])
    assert [b["index"] for b in half["blocks"]] == list(range(0, 32, 2))


@pytest.mark.parametrize("order", ["after_spatial", "before_spatial"])
@pytest.mark.parametrize("case", case_parameters())
def test_it_says_what_injection_does(case, order, tmp_path):
    model = seeded(case.make)
    if not hasattr(transformers, type(model).__name__) or case.backbone == "videorope":  # applied to a made model
        pytest.skip("not a model that a configuration alone names")
    if model.config.model_type not in transformers.CONFIG_MAPPING or (
        case.id.startswith("siglip2") and transformers_version() < (4, 52)
    ):
        pytest.skip("this release doesn't find the encoder by its configuration")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    settings = STAConfig(order=order, layers=(0, 1))
    report = inspect_model(empty_model(tmp_path), settings)
    handle = inject_sta(model, settings)
    assert report["backbone"] == handle.backbone == case.backbone
    assert report["config"] == handle.config.to_dict()
    assert report["parameters"]["sta"] == handle.num_parameters()
    assert [block["index"] for block in report["blocks"]] == list(handle.blocks)
    for block, module in zip(report["blocks"], handle.blocks.values(), strict=True):
        assert (block["heads"], block["head_size"]) == (module.num_heads, module.head_dim)
        hooks = [type(h).__name__ for h in model.get_submodule(block["hook"])._forward_pre_hooks.values()]
        assert ("NormPreHook" if order == "after_spatial" else "BlockPreHook") in hooks
    assert 0 < report["arithmetic"]["percent"] < 200


def test_the_printed_report(real_sizes):
    lines = invoke(real_sizes).splitlines()
    assert max(map(len, lines)) <= 80
    text = " ".join(" ".join(lines).split())
    path = "visual.blocks.*.norm2" if transformers.__version__ < "4.52" else "model.visual.blocks.*.norm2"
    assert f"0-31 {path} 1280 4 1,643,200 x 32" in text
    assert "32 in all 52,582,400" in text
    assert "52.6 M added: 7.9 % of the tower's 665.3 M" in text
    assert "+7.4 %: 1.73 TFLOP on the tower's 23.41 TFLOP, for 16 frames of 32x32 patches" in text
    assert "head_scale 0.25, RoPE 10000" in text


def test_options(real_sizes):
    text = invoke(real_sizes / "config.json", "--layers", "0-2,8", "--head-scale", "0.5", "--order", "before_spatial")
    rows = [line.split() for line in text.splitlines() if "visual.blocks." in line]
    assert [(row[0], row[2], row[3]) for row in rows] == [("0-2", "1280", "8"), ("8", "1280", "8")]
    assert [row[1].split("visual.")[1] for row in rows] == ["blocks.*", "blocks.8"]


def test_json(real_sizes):
    report = json.loads(invoke(real_sizes, "--json", "--clip", "4x16x16"))
    assert len(report["blocks"]) == 32
    assert report["blocks"][31]["hook"].endswith("visual.blocks.31.norm2")
    assert report["arithmetic"]["clip"] == {"frames": 4, "rows": 16, "columns": 16}


def test_text_positions_are_warned_of_where_they_differ(real_sizes):
    warnings = inspect_model(empty_model(real_sizes))["warnings"]
    if NATIVE == "original":
        assert warnings == []
        return
    assert len(warnings) == 1
    told = f"numbers the text after a clip by the rule {NATIVE!r}, and the model was trained with 'original'"
    assert told in warnings[0]
    assert callable(importlib.import_module("sta_adapter.text_positions").use_positions)  # which the warning names
    assert "sta_adapter.text_positions.use_positions(model)" in warnings[0]


def test_no_file_but_the_configuration_is_needed_and_random_numbers_go_on(real_sizes):
    before = torch.get_rng_state()
    empty_model(real_sizes)
    assert torch.equal(torch.get_rng_state(), before)
    assert [p.name for p in real_sizes.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("files", "match"),
    [
        pytest.param({}, "holds no config.json; found: nothing", id="empty"),
        pytest.param({"sta_config.json": "{}"}, "found: sta_config.json. Pass a model's folder", id="adapter"),
        pytest.param({"config.json": "{"}, "can't make the model", id="no JSON"),
        pytest.param({"config.json": '{"model_type": "nothing-like-it"}'}, "can't make the model", id="unknown kind"),
        pytest.param(
            {"config.json": '{"model_type": "mine", "auto_map": {"AutoConfig": "configuration_mine.MineConfig"}}'},
            "^'.*' comes with Python code of its own .mine.*--trust-remote-code",
            id="remote code",
        ),
    ],
)
def test_models_that_can_not_be_made(files, match, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=match):
        empty_model(tmp_path)


@pytest.mark.parametrize("name", ["nowhere/at/all", "./nowhere", "nowhere.json"])
def test_a_path_that_is_not_there(name):
    with pytest.raises(CheckpointError, match=f"there is no folder or file '{name}'"):
        empty_model(name)


def test_remote_code_runs_only_when_trusted(tmp_path, monkeypatch):
    folder = tmp_path / "mine"
    folder.mkdir()
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    auto = {"AutoConfig": "configuration_mine.MineConfig", "AutoModel": "modeling_mine.MineModel"}
    config = {"model_type": "mine", "architectures": ["MineModel"], "auto_map": auto}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration_mine.py").write_text(REMOTE_CONFIG)
    (folder / "modeling_mine.py").write_text(REMOTE_MODEL)
    with pytest.raises(CheckpointError, match="code of its own"):
        invoke(folder)
    assert not (tmp_path / "modules").exists()
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    assert json.loads(invoke(folder, "--trust-remote-code", "--json"))["model"] == "MineModel"


def test_a_model_without_a_backbone(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    with pytest.raises(UnknownBackboneError, match=r"no backbone matches 'BertModel'; known: .*qwen2_vl"):
        invoke(tmp_path)


@pytest.mark.parametrize("text", ["", "a", "3-1", "1-", "-1", "1;2"])
def test_layers_that_are_none(text):
    with pytest.raises(ConfigError, match="expected block indices such as"):
        parse_layers(text)


@pytest.mark.parametrize("text", ["", "8", "0x4x4", "8x16", "8x16x-1"])
def test_clips_that_are_none(text):
    with pytest.raises(ConfigError, match="expected FRAMESxROWSxCOLUMNS"):
        ClipSize.parse(text)


def test_layers_as_written():
    assert parse_layers("all") == "all"
    assert parse_layers("0-3, 8") == (0, 1, 2, 3, 8)


def test_a_bare_tower_has_no_share_of_a_model():
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

    tower = Qwen2VisionTransformerPretrainedModel._from_config(qwen2_vl_config().vision_config)
    lines = describe(inspect_model(tower), "a clip")
    assert not any("model's" in line for line in lines)
    assert any("GFLOP" in line for line in lines)


def test_long_items_stay_beside_their_name_and_sizes_have_units():
    from sta_adapter.cli.inspect import _bytes, _item, _rope

    lines = _item("warning", "word " * 40)
    assert lines[0].startswith("warning     word")
    assert all(line.startswith(" " * 12 + "word") for line in lines[1:])
    assert _bytes(3 << 19) == "1.5 MiB"
    assert (_rope({"rope_theta": None}), _rope({"rope_theta": 1e4})) == ("none", "10000")


def test_help_begins_with_an_example():
    assert "Example: sta-adapter inspect Qwen/Qwen2-VL-2B-Instruct\n" in invoke("--help")
