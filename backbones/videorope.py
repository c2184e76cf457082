"""VideoRoPE (arXiv 2502.05173): Qwen2-VL whose language model has other positions and frequencies.

`apply_videorope` turns a current transformers' Qwen2-VL into it; its authors' model file for transformers 4.45.2 is
known as well. The vision encoder is Qwen2-VL's, and so is the place of STA.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sta_adapter.backbones.qwen2_vl import BACKBONE as QWEN2_VL
from sta_adapter.backbones.qwen2_vl_positions import drop_hooks, find_owner, install, installed_rule, uninstall
from sta_adapter.errors import ConfigError, InjectionError
from sta_adapter.hooks import find_injections

FREQUENCY_METHOD = "recomposition_frequencies"


@dataclasses.dataclass(frozen=True)
class VideoRopePositions:
    """Frames `scale_factor` apart on the temporal axis, rows and columns around their frame's position."""

    scale_factor: float
    dtype = torch.float32

    def clip(self, start: float, frames: int, rows: int, columns: int) -> tuple[Tensor, float]:
        """See `PositionRule`; the text goes on behind the last frame."""
        frame = torch.arange(frames, dtype=self.dtype) * self.scale_factor + start
        row = frame[:, None] + torch.arange(rows) - (rows - 1) // 2
        column = frame[:, None] + torch.arange(columns) - (columns - 1) // 2
        shape = (frames, rows, columns)
        axes = [frame[:, None, None], row[:, :, None], column[:, None, :]]
        return torch.stack([axis.expand(shape) for axis in axes]).flatten(1), frame[-1].item() + 1


class InterleavedFrequencies:
    """Which axis turns which frequency: row and column by turns, and the lowest ones temporal.

    In transformers 5 it is called by the rotary module; in 4 it is a forward hook of it.

    Args:
        sections: frequencies of the temporal, row and column axis, as in Qwen2-VL's `mrope_section`.
    """

    def __init__(self, sections: Sequence[int]) -> None:
        self.spatial = sum(sections) - sections[0]

    def __call__(self, *call: Any) -> Any:
        """With (3, batch, tokens, pairs): its mix (batch, tokens, 2 * pairs); with (module, args, output): the output mixed."""
        if len(call) == 1:
            return self.mix(call[0])
        cos, sin = call[2]
        if cos.dim() != 4:
            raise InjectionError(
                f"the rotary embedding gives the shape {tuple(cos.shape)}; expected (3, batch, tokens, head size). This "
                "version of transformers is not known; 4.57.6 and 5.23 are."
            )
        return tuple(self.mix(x[..., : x.shape[-1] // 2]).expand_as(x) for x in (cos, sin))

    def mix(self, freq: Tensor) -> Tensor:
        """From (3, batch, tokens, pairs), one row for each axis, to (batch, tokens, 2 * pairs)."""
        mixed = freq[0].clone()
        for axis in (1, 2):
            mixed[..., axis - 1 : self.spatial : 2] = freq[axis, ..., axis - 1 : self.spatial : 2]
        return torch.cat([mixed, mixed], dim=-1)


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
    """
    if isinstance(scale_factor, bool) or not isinstance(scale_factor, (int, float)) or not 0 < scale_factor < math.inf:
        raise ConfigError(f"scale_factor is {scale_factor!r}; expected a number above 0.")
    install(model, VideoRopePositions(float(scale_factor)))
    rotary = find_owner(model).language_model.rotary_emb
    sections = getattr(rotary, "mrope_section", None) or rotary.config.rope_scaling["mrope_section"]
    frequencies = InterleavedFrequencies(sections)
    if hasattr(rotary, FREQUENCY_METHOD):
        setattr(rotary, FREQUENCY_METHOD, frequencies)
    else:
        rotary.register_forward_hook(frequencies)
    _rename(model, QWEN2_VL.name, BACKBONE.name)
    return model


def remove_videorope(model: nn.Module) -> nn.Module:
    """Take `apply_videorope` back; nothing happens where it was not called.

    Raises:
        InjectionError: the model is no Qwen2-VL of transformers 4.52 or newer.
    """
    owner = find_owner(model)
    if isinstance(installed_rule(owner), VideoRopePositions):
        uninstall(model)
        rotary = owner.language_model.rotary_emb
        vars(rotary).pop(FREQUENCY_METHOD, None)
        drop_hooks(rotary, InterleavedFrequencies)
        _rename(model, BACKBONE.name, QWEN2_VL.name)
    return model


def _rename(model: nn.Module, before: str, after: str) -> None:
    """STA that is in the model already belongs to the other backbone now."""
    for _, injection in find_injections(model):
        if injection.backbone == before:
            injection.backbone = after


def uses_videorope(model: nn.Module, encoder: nn.Module) -> bool:
    """Whether the Qwen2-VL around this vision encoder is VideoRoPE: by `apply_videorope`, or its authors' model file.

    In that file, `which_rope` names the positions; until it is set, they are an argument of each call.
    """
    for module in model.modules():
        applied = isinstance(installed_rule(module), VideoRopePositions)
        published = hasattr(module, "get_t_scale_rope_index") and _names_videorope(getattr(module, "which_rope", None))
        if (applied or published) and any(m is encoder for m in module.modules()):
            return True
    return False


def _names_videorope(which_rope: object) -> bool:
    return which_rope is None or "videorope" in str(which_rope)


BACKBONE = dataclasses.replace(QWEN2_VL, name="videorope", accepts=uses_videorope, priority=10)
