"""Plan: an injection, checked before anything is changed, or at the first call, and carried out."""

from __future__ import annotations

import dataclasses
import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from sta_adapter._validate import shown
from sta_adapter.adapter.format import compare_tensors
from sta_adapter.attention.module import CHILD, TemporalAttention
from sta_adapter.compatibility.seams import add_load_hook, operations_are_watched, uncompiled
from sta_adapter.config import STAConfig
from sta_adapter.distributed import execution_device, is_sharded
from sta_adapter.errors import ConfigError, InjectionError, STAWarning
from sta_adapter.injection.backbone import Backbone
from sta_adapter.injection.clip_source import attach_clip_source
from sta_adapter.injection.data_parallel import attach_agreement
from sta_adapter.injection.handle import STAHandle
from sta_adapter.injection.hooks import (
    BlockPostHook,
    BlockPreHook,
    EncoderPostHook,
    EncoderPreHook,
    Hook,
    NormPreHook,
    find_injections,
    remove_hooks,
)
from sta_adapter.injection.methods import remove_methods
from sta_adapter.injection.registry import locate
from sta_adapter.injection.saved_sta import LoadStatePreHook
from sta_adapter.injection.state import Injection
from sta_adapter.injection.target import InjectionTarget, find_language_model, resolve_target
from sta_adapter.injection.validate import validate_call, validate_target
from sta_adapter.injection.whole_model import attach_saving

WRAPPERS = {
    "DistributedDataParallel": "before wrapping the model in DistributedDataParallel",
    "DataParallel": "and train with DistributedDataParallel, which nn.DataParallel's copies of modules don't replace",
    "FullyShardedDataParallel": "before wrapping the model in FullyShardedDataParallel",
    "FSDPModule": "before fully_shard(model)",
    "DeepSpeedEngine": "before deepspeed.initialize",
    "OptimizedModule": "into the original model, then torch.compile it",
}
_LOCK = threading.RLock()  # another thread's first forward waits for the verdict of a check
PLAIN_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checked injection that has not happened yet."""

    model: nn.Module
    target: InjectionTarget
    config: STAConfig

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the blocks that get a branch."""
        return tuple(range(len(self.target.blocks))) if self.config.layers == "all" else self.config.layers

    @property
    def num_heads(self) -> int:
        """Heads of the branch: the paper's max(1, round(head_scale * heads))."""
        return max(1, round(self.config.head_scale * self.target.heads))

    @property
    def encoder(self) -> dict[str, object]:
        """What an adapter's description says of the encoder, and its backbone."""
        target = self.target
        return {
            "backbone": target.backbone.name,
            "width": target.width,
            "depth": len(target.blocks),
            "num_heads": self.num_heads,
            "head_dim": target.head_dim,
        }

    def build(self, device: torch.device | str | None = None) -> dict[int, TemporalAttention]:
        """Fresh STA modules by block index, not yet in the model; `device` overrides the blocks' own.

        Raises:
            InjectionError: their weights were taken to the meta device, where the blocks' own are not.
        """
        modules = {index: self._build(self.target.blocks[index], device) for index in self.layers}
        for index, module in modules.items() if device is None else ():
            if module.to_qkv.weight.is_meta and _placement(self.target.blocks[index])[0].type != "meta":
                raise InjectionError(
                    "STA's weights came out on the meta device, where they have no values, and the encoder's are not there: is this within "
                    "accelerate's init_empty_weights()? Leave it out, or end it before."
                )
        return modules

    def allocate(self, file: Path, state: Mapping[str, torch.Tensor]) -> dict[int, TemporalAttention]:
        """STA modules in memory of the blocks' devices, without values, which a file's tensors must fit.

        Raises:
            CheckpointError: they don't; every difference is listed.
        """
        modules = self.build("meta")  # nothing is initialised that the file replaces
        compare_tensors(
            file, state, {f"blocks.{i}.{k}": v for i, m in modules.items() for k, v in m.state_dict().items()}
        )
        with torch.inference_mode(False):  # what is made within it can't train outside
            for index, module in modules.items():
                module.to_empty(device=_placement(self.target.blocks[index])[0])
        return modules

    def _build(self, block: nn.Module, device: torch.device | str | None) -> TemporalAttention:
        found_device, dtype = _placement(block)
        return TemporalAttention(
            self.target.width,
            self.num_heads,
            self.target.head_dim,
            self.config,
            norm=self.target.norm_kind,
            norm_eps=self.target.norm_eps,
            qkv_bias=self.target.backbone.qkv_bias,
            device=device or found_device,
            dtype=dtype,
        )

    def attach(self, modules: dict[int, TemporalAttention], has_values: bool = True) -> STAHandle:
        """Put the modules and the hooks into the model; undone when anything fails half-way."""
        target, injection = self.target, Injection(self.config, self.target.backbone, len(self.target.blocks))
        injection.watch(self.model, modules if has_values else {})
        try:
            for index, module in modules.items():
                block = target.blocks[index]
                block.add_module(CHILD, module)
                module.train(block.training)
                block.register_forward_pre_hook(BlockPreHook(injection), with_kwargs=True)
                block.register_forward_hook(BlockPostHook(injection))
                if self.config.order == "after_spatial":
                    target.norms[index].register_forward_pre_hook(NormPreHook(injection, block), with_kwargs=True)
            if target.backbone.dummy_inputs is None:
                target.encoder.register_forward_pre_hook(FirstCallPreHook(injection), with_kwargs=True)
            target.encoder.register_forward_pre_hook(EncoderPreHook(injection), with_kwargs=True)
            target.encoder.register_forward_hook(EncoderPostHook(injection), always_call=True)
            add_load_hook(self.model, LoadStatePreHook(injection))
            attach_saving(self.model, target.encoder, injection)
            if (source := target.backbone.clip_source) is not None:
                attach_clip_source(self.model, target.encoder, source, injection)
            if (language_model := find_language_model(self.model, target.encoder)) is not None:
                attach_agreement(self.model, target.encoder, language_model, injection)
        except BaseException:
            for index in modules:
                target.blocks[index]._modules.pop(CHILD, None)
            for part in self.model.modules():
                remove_hooks(part, injection)
                remove_methods(part, injection)
            raise
        return STAHandle.of(self.model, target.encoder, injection)


def plan_injection(
    model: nn.Module,
    cfg: STAConfig | None = None,
    backbone: str | Backbone | None = None,
    *,
    run_blocks: bool = True,
    preferred: str = "",
) -> Plan:
    """Everything that `inject_sta` checks, with its arguments and errors; only to `run_blocks` needs the model's weights.

    `preferred` is of `locate`.
    """
    if not isinstance(model, nn.Module):
        raise InjectionError(f"inject_sta takes a torch module, found {type(model).__name__}.")
    if cfg is not None and not isinstance(cfg, STAConfig):
        raise ConfigError(f"cfg is a {type(cfg).__name__}; expected an STAConfig, or None for the backbone's defaults.")
    _refuse_wrapped(model)
    if find_injections(model.modules()) or any(isinstance(m, TemporalAttention) for m in model.modules()):
        raise InjectionError(
            "this model has STA already. Use get_sta(model) for its handle, or handle.remove() before injecting again."
        )
    target = locate(model, backbone, preferred)
    config = (cfg or STAConfig()).with_defaults(target.backbone.defaults)
    depth = len(target.blocks)
    missing = [i for i in config.layers if i >= depth] if config.layers != "all" else []
    if missing:
        raise ConfigError(f"layers {shown(missing)} don't exist: the encoder has {depth} blocks, 0 to {depth - 1}.")
    if config.token_order == "published" and not target.backbone.published_token_order:
        raise ConfigError(
            f"token_order='published' is for weights trained with the released Qwen2-VL code; for {target.backbone.name!r} "
            "there is no such order. Use token_order='clip'."
        )
    taken = [index for index, block in enumerate(target.blocks) if hasattr(block, CHILD)]
    if taken:
        raise InjectionError(f"blocks {taken} have an attribute {CHILD!r} already, the name that STA's modules need.")
    if run_blocks:
        validate_target(target)
    return Plan(model, target, config)


def _refuse_wrapped(model: nn.Module) -> None:
    """Refuse models whose wrapper would not see parameters that come later."""
    for module in model.modules():
        for cls in type(module).__mro__:
            if cls.__name__ in WRAPPERS and not cls.__module__.startswith("sta_adapter"):
                raise InjectionError(
                    f"the model is wrapped in {cls.__name__} already, which would not synchronise, shard or compile STA's "
                    f"parameters. Inject {WRAPPERS[cls.__name__]}."
                )
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise InjectionError(f"{type(module).__name__} is compiled already. Inject first, then call compile().")


def _placement(block: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype for a block's STA module.

    The dtype is that of most of the block's weights; a quantised layer (4-bit, 8-bit, float8) counts with the dtype
    that it computes in, or not at all.
    """
    counts: dict[torch.dtype, int] = {}
    for dtype, size in _compute_dtypes(block):
        counts[dtype] = counts.get(dtype, 0) + size
    device = next((p.device for p in block.parameters()), torch.device("cpu"))
    if device.type == "meta":  # accelerate keeps an offloaded block's weights elsewhere
        device = execution_device(block) or device
    return device, max(counts, key=lambda d: counts[d]) if counts else torch.get_default_dtype()


def _compute_dtypes(block: nn.Module) -> Iterator[tuple[torch.dtype, int]]:
    for module in block.modules():
        compute: object = getattr(module, "compute_dtype", None)
        for parameter in module.parameters(recurse=False):
            if parameter.dtype in PLAIN_DTYPES:
                yield parameter.dtype, parameter.numel()
            elif isinstance(compute, torch.dtype):
                yield compute, parameter.numel()


class FirstCallPreHook(Hook):
    """Forward pre-hook of the encoder: before its first forward the blocks are checked, once.

    The encoder runs as far as its first block, and the first and last block by themselves, without STA and without
    gradients; modes and random states stay as they are.
    """

    def __init__(self, injection: Injection) -> None:
        super().__init__(injection)
        self.done = False

    @uncompiled
    def __call__(self, encoder: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        """Change nothing.

        Raises:
            InjectionError: the blocks are not as the backbone declares; at every call, until STA is removed.

        Warns:
            STAWarning: its blocks can't be run by themselves: the encoder is sharded, or this call is traced.
        """
        if self.done or not self.injection.is_enabled:
            return
        if torch.compiler.is_compiling() or operations_are_watched():
            self._warn(
                "a tracer or a transform looks at its operations", "Add dummy_inputs, or run the encoder once before"
            )
            return
        with _LOCK:
            if self.done:
                return
            if is_sharded(encoder.parameters()):
                self._warn("the encoder is sharded", "Add dummy_inputs, or run the encoder once before sharding")
                self.done = True
                return
            self.done = self._check(encoder, args, kwargs)

    def _warn(self, reason: str, remedy: str) -> None:
        warnings.warn(
            f"backbone {self.injection.spec.name!r} has no dummy_inputs and {reason}, so whether its norm is the one in front of "
            f"the MLP is unverified. {remedy}.",
            STAWarning,
            stacklevel=3,
        )

    def _check(self, encoder: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> bool:
        self.injection.thread.in_check = True
        try:
            with self.injection.disabled():
                return validate_call(resolve_target(self.injection.spec, encoder), args, kwargs)
        finally:
            self.injection.thread.in_check = False
