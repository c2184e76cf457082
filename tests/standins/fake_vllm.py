"""Small stand-ins of what the plug-in uses of vLLM: the registry, a model class with its tower, an engine's configuration.

The tower has what is peculiar to vLLM's: no configuration, `grid_thw` as lists, fused norms that take the new summand by the
name `residual`, and blocks whose `__call__` goes past their hooks.
"""

import dataclasses
import sys
import types

import torch
from torch import nn

NAME = "Qwen2_5_VLForConditionalGeneration"
MODULE = "vllm.model_executor.models.qwen2_5_vl"
WIDTH, HEADS, DEPTH = 16, 2, 3


class RMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.variance_epsilon = 1e-6

    def forward(self, x, residual=None):
        total = x if residual is None else x + residual
        normed = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight
        return normed if residual is None else (normed, total)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(), RMSNorm()
        self.attn, self.mlp = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def __call__(self, *args, **kwargs):
        return self.forward(*args, **kwargs)

    def forward(self, x):
        normed, stream = self.norm2(x, residual=self.attn(self.norm1(x)))
        return stream + self.mlp(normed).tanh()


class Qwen2_5_VisionTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads, self.spatial_merge_size = HEADS, 2
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Linear(12, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))

    def forward(self, x, grid_thw):
        x = self.patch_embed.proj(x).unsqueeze(1)
        for block in self.blocks:
            x = block(x)
        return x.squeeze(1)


class Processor:
    def __init__(self, info, dummy_inputs):
        self.info = info

    def _get_mm_hashes(self, inputs):
        return {kind: [str(item) for item in items] for kind, items in inputs.items()}


@dataclasses.dataclass
class Factories:
    info: object = None
    processor: object = Processor
    dummy_inputs: object = None


class Model(nn.Module):
    _processor_factory = Factories()
    supports_tower_connector_lora = True

    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        self.config = vllm_config.model_config.hf_config
        torch.manual_seed(3)
        self.visual = Qwen2_5_VisionTransformer()

    def load_weights(self, weights):
        loaded = set()
        for name, values in weights:
            self.get_parameter(name).data.copy_(values)
            loaded.add(name)
        return loaded


class Registry:
    def __init__(self):
        self.models = {}

    def register_model(self, name, path):
        module, cls = path.split(":")
        self.models[name] = types.SimpleNamespace(module_name=module, class_name=cls)

    def inspect_model_cls(self, architectures, model_config):
        return "facts", architectures[0]


def install(monkeypatch):
    """Stand in for the package `vllm`; returns its registry."""
    registry = Registry()
    package, models = types.ModuleType("vllm"), types.ModuleType(MODULE)
    package.ModelRegistry = registry
    setattr(models, NAME, type(NAME, (Model,), {}))
    monkeypatch.setitem(sys.modules, "vllm", package)
    monkeypatch.setitem(sys.modules, MODULE, models)
    video = types.ModuleType("vllm.multimodal.video")
    video.VIDEO_LOADER_REGISTRY = types.SimpleNamespace(
        found={}, register=lambda name: lambda cls: video.VIDEO_LOADER_REGISTRY.found.__setitem__(name, cls)
    )
    monkeypatch.setitem(sys.modules, "vllm.multimodal.video", video)
    lora = types.ModuleType("vllm.lora.peft_helper")
    lora.PEFTHelper = type("PEFTHelper", (), {"from_local_dir": classmethod(lambda cls, path, longest: path)})
    monkeypatch.setitem(sys.modules, "vllm.lora.peft_helper", lora)
    distributed = types.ModuleType("vllm.distributed")
    distributed.get_pp_group = lambda: types.SimpleNamespace(is_first_rank=True)
    monkeypatch.setitem(sys.modules, "vllm.distributed", distributed)
    for parent in ("vllm.multimodal", "vllm.lora", "vllm.model_executor", "vllm.model_executor.models"):
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    return registry


def engine_config(lora_config=None, tp_mode="weights", compilation=None, stages=1, sent=False, **overrides):
    """An engine's configuration with these `hf_overrides`; `sent`: another engine may send it what its encoder gave."""
    flags = {"cudagraph_mm_encoder": False, "compile_mm_encoder": False, **(compilation or {})}
    hf_config = types.SimpleNamespace(_name_or_path="a/base", **overrides)
    multimodal = types.SimpleNamespace(mm_encoder_tp_mode=tp_mode, allow_missing_mm_embeddings=sent)
    return types.SimpleNamespace(
        compilation_config=types.SimpleNamespace(**flags),
        lora_config=lora_config,
        parallel_config=types.SimpleNamespace(pipeline_parallel_size=stages),
        model_config=types.SimpleNamespace(hf_config=hf_config, multimodal_config=multimodal, model="a/base"),
    )
