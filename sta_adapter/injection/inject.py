"""inject_sta: put STA into a model."""

from __future__ import annotations

import torch
from torch import nn

from sta_adapter.config import STAConfig
from sta_adapter.errors import ConfigError
from sta_adapter.injection.backbone import Backbone
from sta_adapter.injection.handle import STAHandle
from sta_adapter.injection.load import watch_peft
from sta_adapter.injection.plan import plan_injection
from sta_adapter.injection.text_positions import warn_of_other_rule


def inject_sta(model: nn.Module, cfg: STAConfig | None = None, *, backbone: str | Backbone | None = None) -> STAHandle:
    """Put stacked temporal attention into a model's vision encoder, by hooks; nothing of the model is replaced.

    The STA modules become children named `sta` of the encoder's blocks, on the block's device, in its floating dtype
    (for quantised blocks: the dtype that they compute in). With the default `init="zero"` the outputs stay what they
    were, bit for bit, until training changes the branch.

    Args:
        model: a full video language model, its vision encoder, or a PeftModel around either.
        cfg: settings; fields that are not given take the backbone's defaults.
        backbone: name of a registered backbone, or a `Backbone`; None finds it from the model's classes.

    Returns:
        The handle by which STA is trained, switched, saved and removed.

    Raises:
        UnknownBackboneError: no backbone fits the model.
        ConfigError: a setting does not fit the model, such as layers that it does not have, or leaves nothing to train.
        InjectionError: the model has STA already, is wrapped for parallel training or compiled, or is not as the
            backbone declares (one without `dummy_inputs`: at the encoder's first forward). Whatever is raised, the
            model is as before.

    Warns:
        STAWarning: the model numbers text by another rule than the one it was trained with; says how to mend it.
    """
    watch_peft()
    plan = plan_injection(model, cfg, backbone)
    if plan.config.gamma_init == 0 and plan.config.init == "zero":
        raise ConfigError(
            "gamma_init=0 and init='zero' leave the branch without any gradient: what each of the two zeros is multiplied by is the other. "
            "Take gamma_init=None or a small number, such as 1e-5, or init='normal': each begins with the base model's output."
        )
    warn_of_other_rule(model)
    with torch.inference_mode(False):  # what is made within it can't train outside
        return plan.attach(plan.build())
