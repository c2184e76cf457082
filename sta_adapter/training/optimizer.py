"""What an optimizer is given: parameters in groups, each with its learning rate and weight decay."""

from __future__ import annotations

from typing import Any

from torch import nn

from sta_adapter.training.config import TrainingConfig

__all__ = ["parameter_groups"]


def parameter_groups(model: nn.Module, sta: set[int], config: TrainingConfig) -> list[dict[str, Any]]:
    """Optimizer groups: STA or not, with or without weight decay (matrices have it, vectors never)."""
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            key = (id(parameter) in sta, parameter.dim() > 1)
            sta_rate = config.sta_learning_rate
            rate = config.learning_rate if sta_rate is None or not key[0] else sta_rate
            decay = config.weight_decay if key[1] else 0.0
            groups.setdefault(key, {"params": [], "lr": rate, "weight_decay": decay})["params"].append(parameter)
    return list(groups.values())
