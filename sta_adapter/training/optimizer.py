"""What an optimizer is given: parameters in groups, each with its learning rate and weight decay."""

from __future__ import annotations

from torch import nn

from sta_adapter.training.config import TrainingConfig


def parameter_groups(model: nn.Module, sta: set[int], config: TrainingConfig) -> list[dict[str, object]]:
    """Optimizer groups: STA or not, with or without weight decay (matrices have it, vectors never)."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups.setdefault((id(parameter) in sta, parameter.dim() > 1), []).append(parameter)
    sta_rate = config.learning_rate if config.sta_learning_rate is None else config.sta_learning_rate
    rates = {False: config.learning_rate, True: sta_rate}
    decays = {False: 0.0, True: config.weight_decay}
    return [
        {"params": found, "lr": rates[is_sta], "weight_decay": decays[matrix]}
        for (is_sta, matrix), found in groups.items()
    ]
