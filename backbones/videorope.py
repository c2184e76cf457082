"""VideoRoPE (arXiv 2502.05173): Qwen2-VL whose language model has other positions and frequencies.

`apply_videorope` turns a current transformers' Qwen2-VL into it; its authors' model file for transformers 4.45.2 is
known as well. The vision encoder is Qwen2-VL's, and so is the place of STA.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn

from sta_adapter.backbones.qwen2_vl import BACKBONE as QWEN2_VL
from sta_adapter.backbones.qwen2_vl_positions import find_owner, install, installed_rule, uninstall
from sta_adapter.backbones.videorope_frequencies import InterleavedFrequencies
from sta_adapter.compatibility.position_seams import FREQUENCY_METHOD, has_frequency_method
from sta_adapter.compatibility.seams import drop_hooks
from sta_adapter.errors import ConfigError
from sta_adapter.injection.backbone import Backbone
from sta_adapter.injection.hooks import find_injections

QWEN2_VL_MODEL = ("Qwen2VLModel",)


@dataclasses.dataclass(frozen=True)
class VideoRopePositions:
    """Frames `scale_factor` apart on the temporal axis, rows and columns around their frame's position."""

    scale_factor: float
    name = "videorope"
    dtype = torch.float32

    def clip(
        self, start: float, frames: int, rows: int, columns: int, seconds: float | None = None
    ) -> tuple[Tensor, float]:
        """See `PositionRule`; the text goes on behind the last frame."""
        frame = torch.arange(frames, dtype=self.dtype) * self.scale_factor + start
        row = frame[:, None] + torch.arange(rows) - (rows - 1) // 2
        column = frame[:, None] + torch.arange(columns) - (columns - 1) // 2
        shape = (frames, rows, columns)
        axes = [frame[:, None, None], row[:, :, None], column[:, None, :]]
        return torch.stack([axis.expand(shape) for axis in axes]).flatten(1), frame[-1].item() + 1


def apply_videorope(model: nn.Module, scale_factor: float = 2.0) -> nn.Module:
    """Turn a Qwen2-VL of transformers 4.52 or newer into VideoRoPE, whose checkpoints then run on it.

    Args:
        model: Qwen2-VL, also as a PeftModel.
        scale_factor: how far apart frames are, in positions of text; 2.0 in the published checkpoints.

    Returns:
        The same model, changed; `remove_videorope` takes the change back.

    Raises:
        InjectionError: the model is no Qwen2-VL of these versions, or has VideoRoPE or another position rule already.
        ConfigError: scale_factor is no number above 0.
        CompatibilityError: this transformers computes positions or frequencies in a way that is not known.
    """
    if isinstance(scale_factor, bool) or not isinstance(scale_factor, (int, float)) or not 0 < scale_factor < math.inf:
        raise ConfigError(f"scale_factor is {scale_factor!r}; expected a number above 0.")
    rotary = find_owner(model, QWEN2_VL_MODEL).language_model.rotary_emb
    sections = getattr(rotary, "mrope_section", None) or rotary.config.rope_scaling["mrope_section"]
    frequencies = InterleavedFrequencies(sections)
    by_method = has_frequency_method(type(rotary))
    install(model, VideoRopePositions(float(scale_factor)))
    if by_method:
        setattr(rotary, FREQUENCY_METHOD, frequencies)
    else:
        rotary.register_forward_hook(frequencies)
    _rename(model, QWEN2_VL, BACKBONE)
    return model


def remove_videorope(model: nn.Module) -> nn.Module:
    """Take `apply_videorope` back; nothing happens where it was not called.

    Raises:
        InjectionError: the model is no Qwen2-VL of transformers 4.52 or newer.
    """
    owner = find_owner(model, QWEN2_VL_MODEL)
    if isinstance(installed_rule(owner), VideoRopePositions):
        uninstall(model)
        rotary = owner.language_model.rotary_emb
        vars(rotary).pop(FREQUENCY_METHOD, None)
        drop_hooks(rotary, lambda hook: isinstance(hook, InterleavedFrequencies))
        _rename(model, BACKBONE, QWEN2_VL)
    return model


def _rename(model: nn.Module, before: Backbone, after: Backbone) -> None:
    """STA that is in the model already belongs to the other backbone now."""
    for _, injection in find_injections(model.modules()):
        if injection.spec.name == before.name:
            injection.spec = after


def uses_videorope(model: nn.Module, encoder: nn.Module) -> bool:
    """Whether the Qwen2-VL around this vision encoder is VideoRoPE: by `apply_videorope`, or its authors' model file.

    In that file, `which_rope` names the positions; until it is set, they are an argument of each call.
    """
    for module in model.modules():
        applied = isinstance(installed_rule(module), VideoRopePositions)
        named = getattr(module, "which_rope", None)
        published = hasattr(module, "get_t_scale_rope_index") and (named is None or "videorope" in str(named))
        if (applied or published) and any(m is encoder for m in module.modules()):
            return True
    return False


BACKBONE = dataclasses.replace(QWEN2_VL, name="videorope", accepts=uses_videorope, priority=10, vllm=None)
