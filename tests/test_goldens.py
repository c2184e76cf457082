"""Numbers made by running the published code (see tests/goldens/README.md)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from sta_adapter import STAConfig, inject_sta

FOLDER = Path(__file__).parent / "goldens"
NAMES = {"norm": "norm", "qkv": "to_qkv", "proj": "to_out", "gamma": "gamma"}
every_golden = pytest.mark.parametrize(
    "name", ["after_0.25", "after_0.5_head80", "after_1.0", "before_0.25"], ids=lambda name: f"qwen2_vl_{name}"
)


def read_golden(name):
    """(header, tensors) of a golden file."""
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        return file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def renamed(key):
    """The name in our module of a golden's `qkv.weight` and its like."""
    head, _, rest = key.partition(".")
    return NAMES[head] + (f".{rest}" if rest else "")


def load_golden_weights(handle, tensors):
    """Put a golden's STA weights into the model, every one of them and no other."""
    for index, module in handle.blocks.items():
        prefix = f"sta.{index}."
        module.load_state_dict({renamed(k[len(prefix) :]): v for k, v in tensors.items() if k.startswith(prefix)})


def relative_error(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


def assert_golden_gradients(handle, tensors, tolerance=1e-4):
    """Compare the gradients that the golden holds with those in the model."""
    keys = [key for key in tensors if key.startswith("grad.sta.")]
    assert keys
    for key in keys:
        index, name = key.removeprefix("grad.sta.").split(".", 1)
        found = handle.blocks[int(index)].get_parameter(renamed(name)).grad
        assert (found - tensors[key]).norm() <= tolerance * tensors[key].norm(), key


def qwen2_vl_tower(header, tensors):
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

    config = Qwen2VLVisionConfig(**json.loads(header["vision_config"]))
    tower = Qwen2VisionTransformerPretrainedModel._from_config(config).float()
    tower.load_state_dict({k.removeprefix("base."): v for k, v in tensors.items() if k.startswith("base.")})
    return tower


def run(tower, tensors):
    output = tower(tensors["pixel_values"], grid_thw=tensors["grid_thw"])
    return output if isinstance(output, torch.Tensor) else output.pooler_output


@every_golden
def test_qwen2_vl_output_and_gradients(name):
    header, tensors = read_golden(f"qwen2_vl_{name}")
    tower = qwen2_vl_tower(header, tensors)
    assert relative_error(run(tower, tensors), tensors["base_output"]) <= 1e-5
    handle = inject_sta(tower, STAConfig(head_scale=float(header["head_scale"]), order=header["order"]))
    assert {module.num_heads for module in handle.blocks.values()} == {int(header["num_heads"])}
    load_golden_weights(handle, tensors)
    output = run(tower, tensors)
    assert relative_error(output, tensors["sta_output"]) <= 1e-4
    output.square().mean().backward()
    assert_golden_gradients(handle, tensors)


@every_golden
def test_qwen2_vl_published_token_order(name):
    header, tensors = read_golden(f"qwen2_vl_{name}")
    tower = qwen2_vl_tower(header, tensors)
    config = STAConfig(head_scale=float(header["head_scale"]), order=header["order"], token_order="published")
    load_golden_weights(inject_sta(tower, config), tensors)
    output = run(tower, tensors)
    assert relative_error(output, tensors["published_output"]) <= 1e-4
    assert relative_error(output, tensors["sta_output"]) > 1e-2


@every_golden
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_every_attention_backend_agrees(name, backend):
    header, tensors = read_golden(f"qwen2_vl_{name}")
    tower = qwen2_vl_tower(header, tensors)
    config = STAConfig(head_scale=float(header["head_scale"]), order=header["order"], attention=backend)
    load_golden_weights(inject_sta(tower, config), tensors)
    assert relative_error(run(tower, tensors), tensors["sta_output"]) <= 1e-4
