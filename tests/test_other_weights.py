"""Weights that are kept otherwise than as plain parameters: quantised, offloaded, or made of other tensors."""

import pytest
import torch
import torch.nn.functional as F
from cases import Clip, make_internvideo2, make_qwen2_vl, qwen2_vl_prompt, randomize, seeded
from peft import get_peft_model
from torch import nn
from torch.nn.utils import parametrizations, prune

from sta_adapter import STAConfig, get_sta, inject_sta, load_sta
from sta_adapter.attention.module import TemporalAttention
from sta_adapter.errors import CheckpointError
from sta_adapter.injection.fingerprint import fingerprint_model


class NarrowTensor(torch.Tensor):
    """Whole numbers and a scale, as torchao has them: linear layers, copies and moves are all that it is known to take."""

    @staticmethod
    def __new__(cls, numbers, scale):
        return torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=scale.dtype, device=numbers.device)

    def __init__(self, numbers, scale):
        self.numbers, self.scale = numbers, scale

    def __tensor_flatten__(self):
        return ["numbers", "scale"], None

    @classmethod
    def of(cls, weight):
        scale = weight.detach().abs().max() / 127
        return cls((weight.detach() / scale).round().to(torch.int8), scale)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            tokens, weight, bias = (*args, (kwargs or {}).get("bias"))[:3]
            return F.linear(tokens, weight.numbers * weight.scale, bias)
        return super().__torch_function__(function, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.detach.default, torch.ops.aten._to_copy.default):
            return cls(args[0].numbers, args[0].scale)
        raise NotImplementedError(f"{function} of a NarrowTensor")


class QuantisedLinear(nn.Module):
    """As torch's own quantised layers, `weight` is a method."""

    def __init__(self, layer):
        super().__init__()
        self.out_features = layer.out_features
        self.packed = (layer.weight.detach(), layer.bias)

    def weight(self):
        return self.packed[0]

    def forward(self, tokens):
        return F.linear(tokens, *self.packed)


def narrow(module):
    """Quantise all linear layers, in place."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(NarrowTensor.of(layer.weight), requires_grad=False)


def with_sta(model, **config):
    handle = inject_sta(model, STAConfig(**config))
    for index, block in handle.blocks.items():
        randomize(block, index)
    return handle


@torch.no_grad()
def logits(model):
    return model(**qwen2_vl_prompt(3)).logits


def test_sta_in_a_base_of_quantised_tensors(tmp_path):
    model = seeded(make_qwen2_vl)
    narrow(model)
    base, marks = logits(model), fingerprint_model(model)
    handle = with_sta(model)
    assert {parameter.dtype for parameter in handle.parameters()} == {torch.float32}
    expected = logits(model)
    assert not torch.equal(expected, base)
    handle.freeze_base()
    model.train()(**qwen2_vl_prompt(3)).logits.square().mean().backward()
    assert all(parameter.grad.any() for parameter in handle.blocks[0].to_out.parameters())
    handle.save_pretrained(tmp_path)
    assert torch.equal(logits(handle.remove().eval()), base)
    load_sta(model, tmp_path)
    assert torch.equal(logits(model), expected)
    assert fingerprint_model(model)["base"] == marks["base"]
    weight = model.lm_head.weight
    weight.numbers[0, 0] += 1
    assert fingerprint_model(model)["base"] != marks["base"]


def quantise_whole(handle):
    for block in handle.blocks.values():
        block.to_qkv, block.to_out = QuantisedLinear(block.to_qkv), QuantisedLinear(block.to_out)


def narrow_sta(handle):
    for block in handle.blocks.values():
        narrow(block)


@pytest.mark.parametrize(
    ("quantise", "tolerance"), [(quantise_whole, 0), (narrow_sta, 0.05)], ids=["torch's layers", "tensors"]
)
def test_quantised_sta_computes_and_is_not_saved(tmp_path, quantise, tolerance):
    handle = with_sta(seeded(make_qwen2_vl))
    expected = logits(handle.model)
    quantise(handle)
    assert (logits(handle.model) - expected).abs().max() <= tolerance
    with pytest.raises(CheckpointError, match=r"can't be saved: the weight of one of its layers, a \w*Linear, is quan"):
        handle.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_parametrized_weight_is_saved_as_what_it_is(tmp_path):
    handle = with_sta(seeded(make_qwen2_vl))
    for block in handle.blocks.values():
        parametrizations.weight_norm(block.to_out)
        block.to_out.parametrizations.weight.original0.data *= 2
    handle.save_pretrained(tmp_path)
    loaded = load_sta(seeded(make_qwen2_vl), tmp_path)
    assert torch.equal(logits(loaded.model), logits(handle.model))


def test_a_weight_made_anew_at_each_forward_is_not_saved(tmp_path):
    handle = with_sta(seeded(make_qwen2_vl))
    layer = handle.blocks[1].to_qkv
    prune.l1_unstructured(layer, "weight", 0.5)
    with pytest.raises(CheckpointError, match="made anew at each forward"):
        handle.save_pretrained(tmp_path)
    prune.remove(layer, "weight")
    handle.save_pretrained(tmp_path)
    assert torch.equal(logits(load_sta(seeded(make_qwen2_vl), tmp_path).model), logits(handle.model))


@pytest.mark.parametrize("config", [{}, {"gamma_init": 0.5}, {"order": "before_spatial"}], ids=str)
@pytest.mark.parametrize(("autocast", "tolerance"), [(False, 0), (True, 0.01)], ids=["float32", "autocast"])
def test_sta_that_accelerate_offloads(tmp_path, config, autocast, tolerance):
    accelerate = pytest.importorskip("accelerate")
    handle = with_sta(seeded(make_internvideo2), **config)
    video = Clip(3).pixels(3, 8, 8).transpose(0, 1)[None]
    with torch.no_grad(), torch.autocast("cpu", enabled=autocast):
        expected = handle.model(video)
        accelerate.cpu_offload(handle.model, execution_device="cpu")
        assert all(parameter.is_meta for parameter in handle.parameters())
        assert (handle.model(video) - expected).abs().max() <= tolerance
    with pytest.raises(CheckpointError, match=r"on the meta device.*remove_hook_from_module\(model, recurse=True\)"):
        handle.save_pretrained(tmp_path)
    accelerate.hooks.remove_hook_from_module(handle.model, recurse=True)
    handle.save_pretrained(tmp_path)
    assert get_sta(handle.model) is handle
    with torch.no_grad(), torch.autocast("cpu", enabled=autocast):
        assert torch.equal(load_sta(seeded(make_internvideo2), tmp_path).model(video), expected)


def test_shapes_alone():
    """On the meta device, where nothing is computed, to count what would be."""
    model = seeded(make_internvideo2)
    with_sta(model)
    model.to("meta")
    video = torch.empty(2, 3, 3, 8, 8, device="meta")
    assert model(video).shape == model.to_empty(device="cpu")(torch.zeros(2, 3, 3, 8, 8)).shape


def test_a_model_whose_weights_lie_in_parts():
    """As DeepSpeed's ZeRO-3 loads a model: parameters are empty, with their shapes beside them."""
    whole, parts = seeded(make_qwen2_vl), seeded(make_qwen2_vl)
    for number, parameter in enumerate(parts.parameters()):
        parameter.ds_id, parameter.ds_shape, parameter.data = number, parameter.shape, torch.empty(0)
    one, other = (inject_sta(model).blocks for model in (whole, parts))
    assert {i: [p.shape for p in b.parameters()] for i, b in one.items()} == {
        i: [p.shape for p in b.parameters()] for i, b in other.items()
    }


@pytest.fixture
def flattened():
    """A function that has FSDP's first version around a model and its blocks, and a group of one process for it."""
    from torch import distributed
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)

    def flatten(model, *kinds):
        how = {"auto_wrap_policy": ModuleWrapPolicy(set(kinds)), "use_orig_params": True}
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **how)

    yield flatten
    distributed.destroy_process_group()


def test_sta_that_fsdps_first_version_wraps_by_itself(flattened, tmp_path):
    """As it does for its size, or where it is told to."""
    handle = with_sta(seeded(make_qwen2_vl), init="normal")
    expected = logits(handle.model)
    wrapped = flattened(handle.model, type(handle.encoder.blocks[0]), TemporalAttention)
    assert torch.equal(logits(wrapped), expected)
    get_sta(wrapped).save_pretrained(tmp_path)
    assert torch.equal(logits(load_sta(seeded(make_qwen2_vl), tmp_path).model), expected)


def test_flattened_weights_are_not_saved(tmp_path):
    """As FSDP's first version leaves them on each of several processes: a part without its shape, or none of it."""
    handle = with_sta(seeded(make_qwen2_vl))
    layer = handle.blocks[1].to_out
    layer.weight = nn.Parameter(layer.weight.detach().flatten()[:5])
    with pytest.raises(CheckpointError, match=r"is quantised, flattened, or made anew .*summon_full_params"):
        handle.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_lora_that_fsdps_first_version_flattens_is_not_saved(flattened, tmp_path):
    handle = inject_sta(seeded(make_qwen2_vl))
    model = get_peft_model(handle.model, handle.lora_config(r=2))
    wrapped = flattened(model, type(handle.encoder.blocks[0]))
    with pytest.raises(CheckpointError, match="LoRA can't be saved with an adapter here: FSDP of version 1 flattens"):
        get_sta(wrapped).save_pretrained(tmp_path)
