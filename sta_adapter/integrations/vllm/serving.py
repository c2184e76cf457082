"""STA in one of vLLM's models: built with it, filled when the base's weights load, checked when they are finished."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from torch import Tensor, nn

from sta_adapter.adapter.base_model import ANY, check_base
from sta_adapter.adapter.format import WEIGHTS, read_weights
from sta_adapter.attention.module import CHILD
from sta_adapter.errors import CheckpointError
from sta_adapter.injection.handle import STAHandle
from sta_adapter.injection.plan import Plan, plan_injection
from sta_adapter.injection.validate import validate_target
from sta_adapter.integrations.vllm.refusals import check_encoder_settings, check_tower, encodes_elsewhere, setting
from sta_adapter.integrations.vllm.request import ServedAdapter, asks_for_sta, requested

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def put_sta(model: nn.Module, vllm_config: object) -> ServedSTA | None:
    """Put STA into a model that has no weights yet; None when the engine was given no adapter, or encodes elsewhere."""
    hf_config: PretrainedConfig = setting(setting(vllm_config, "model_config"), "hf_config")
    if not asks_for_sta(hf_config):
        return None
    adapter = requested(hf_config)
    spec = adapter.backbone
    check_encoder_settings(adapter, vllm_config)
    if spec.find_encoder(model) is None and encodes_elsewhere(vllm_config):
        SERVED[model] = adapter.digest
        return None
    check_tower(adapter, model)
    plan = plan_injection(model, adapter.config, spec, run_blocks=False)
    check_base(adapter.folder, adapter.description, model, plan.encoder, ANY if adapter.any_base else None)
    if spec.clip_source is None:  # nothing around the tower tells of clips, so that hooks stay within it
        plan = dataclasses.replace(plan, model=plan.target.encoder)
    modules = plan.allocate(adapter.folder / WEIGHTS, read_weights(adapter.folder, adapter.description))
    for module in modules.values():
        module.requires_grad_(False)
    served = ServedSTA(model, hf_config, plan, plan.attach(modules, has_values=False), adapter)
    SERVED[model] = adapter.digest
    return served


class ServedSTA:
    """The STA of one engine's model."""

    def __init__(
        self, model: nn.Module, hf_config: PretrainedConfig, plan: Plan, handle: STAHandle, adapter: ServedAdapter
    ) -> None:
        self.hf_config = hf_config
        self.plan = plan
        self.handle = handle
        self.adapter = adapter
        self.prefix = next(name for name, module in model.named_modules() if module is plan.target.encoder)
        self.is_loaded = False
        self.is_checked = False
        plan.target.encoder.register_forward_pre_hook(self._before_first_call, prepend=True)

    def of_the_base(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Weights without STA's, which come from the adapter alone; a base that was saved as a whole may hold some.

        STA that is sent to a running engine, as trainers send what they have trained, is refused.
        """
        for name, values in weights:
            self.refuse_sent(name)
            if CHILD not in name.split("."):
                yield name, values

    def refuse_sent(self, name: str) -> None:
        """Refuse what has a name within STA, once the engine runs."""
        if self.is_loaded and CHILD in name.split("."):
            raise CheckpointError(
                f"{name} was sent to an engine that runs, and its STA is that of the adapter's files, by which its caches are "
                "keyed: save the adapter that was trained, and start a new engine with it."
            )

    def load(self) -> set[str]:
        """Fill STA from the adapter's files, at the start and at each reload of the base; gives the parameters' names in the model."""
        adapter = requested(self.hf_config)
        state = read_weights(adapter.folder, adapter.description)
        loaded = set()
        for index, module in self.handle.blocks.items():
            for name, parameter in list(module.named_parameters()):
                values = state[f"blocks.{index}.{name}"]
                loader = getattr(parameter, "weight_loader", None)  # vLLM's, while it reloads
                if loader is not None:
                    loader(parameter, values)
                else:
                    parameter.data.copy_(values)
                loaded.add(f"{self.prefix}.{self.plan.target.backbone.blocks}.{index}.sta.{name}")
        self.is_loaded = True
        return loaded

    def check(self) -> None:
        """Check that STA has its weights and that the blocks are as the backbone declares, in a run."""
        if not self.is_loaded:
            raise CheckpointError(
                "the base's weights came in a way that passes by its load_weights, and so STA's were not loaded. "
                "Use the load format 'auto', 'safetensors' or another that reads a checkpoint."
            )
        self.is_checked = True
        try:
            with self.handle.disabled():
                validate_target(self.plan.target)
        except BaseException:
            self.is_checked = False
            raise

    def _before_first_call(self, encoder: nn.Module, args: tuple[object, ...]) -> None:
        """Forward pre-hook of the tower, in front of STA's own: nothing is encoded unchecked."""
        if not self.is_checked:
            self.check()


SERVED: weakref.WeakKeyDictionary[nn.Module, str] = (
    weakref.WeakKeyDictionary()
)  # this process's models, their STA's digest
