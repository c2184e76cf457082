"""Whether the optimizer that trains a model has STA's parameters: one that was made before them leaves STA as it is."""

from __future__ import annotations

import functools
import weakref

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from sta_adapter.injection.backbone import Backbone
from sta_adapter.injection.target import sta_modules

STEPS = 3  # without STA, after which that is told: parts of a model may have optimizers of their own, and take turns


class StepsOfModel:
    """Watches the steps that a model's weights make, for whether its STA makes them too; begins anew with each STA that PEFT puts in its place."""

    def __init__(self, encoder: nn.Module, spec: Backbone, model: nn.Module) -> None:
        self._encoder, self._model, self._spec = weakref.ref(encoder), weakref.ref(model), spec
        self.begun = False  # whether an optimizer of the model's weights has made a step
        self._known: weakref.ref[nn.Module] | None = None  # one of the modules of which it is known, or told
        self._passed_by = False  # since the latest forward
        self._without = 0
        _watch_optimizers()
        _WATCHED.add(self)

    def look(self, optimizer: Optimizer) -> None:
        """An optimizer has made a step; where each parameter has its own, there are many of them in one backward."""
        encoder, model = self._encoder(), self._model()
        if encoder is None or model is None:
            return
        modules = list(sta_modules(encoder, self._spec).values())
        trained = [p for module in modules for p in module.parameters() if p.requires_grad]
        settled = not trained or (self._known is not None and self._known() is modules[0])
        if settled and self.begun:
            return
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self.begun = self.begun or any(id(p) in held for p in model.parameters())
        if settled:
            return
        if any(id(p) in held for p in trained):
            self._settle(modules[0])
        elif any(id(p) in held for p in model.parameters()):
            self._passed_by = True

    def remark(self) -> str:
        """What there is to say at a forward of the training; mostly nothing."""
        self._without, self._passed_by = self._without + self._passed_by, False
        encoder = self._encoder()
        if self._without < STEPS or encoder is None:
            return ""
        self._settle(next(iter(sta_modules(encoder, self._spec).values()), encoder))
        return (
            f"an optimizer of this model's weights has made {STEPS} steps and has none of STA's, which require a gradient and stay as they are. "
            "Was it made before inject_sta, or before LoRA was added, when PEFT copies STA's modules? Make it of what requires a gradient now: "
            "[p for p in model.parameters() if p.requires_grad]."
        )

    def _settle(self, module: nn.Module) -> None:
        self._known, self._passed_by, self._without = weakref.ref(module), False, 0


_WATCHED: weakref.WeakSet[StepsOfModel] = weakref.WeakSet()


@functools.cache
def _watch_optimizers() -> None:
    register_optimizer_step_post_hook(_look)


def _look(optimizer: Optimizer, *_: object) -> None:
    """Hook of all optimizers, of which a compiler traces nothing."""
    if not torch.compiler.is_compiling():
        for watched in list(_WATCHED):
            watched.look(optimizer)
