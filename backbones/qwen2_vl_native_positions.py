"""Which rule the installed transformers numbers text by in a Qwen2-VL or Qwen2.5-VL, found by asking it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sta_adapter.backbones.qwen2_vl_position_rules import (
    OriginalPositions,
    RowsAndColumns,
    Sequential,
    WholeSeconds,
    WholeSecondsRowsAndColumns,
    tokens_per_second,
)
from sta_adapter.compatibility.position_seams import ROPE_INDEX
from sta_adapter.compatibility.seams import parameter_names
from sta_adapter.injection.backbone import number_of

RULES = {
    rule.name: rule
    for rule in (OriginalPositions, RowsAndColumns, WholeSeconds, WholeSecondsRowsAndColumns, Sequential)
}
UNKNOWN = "unknown"
# of the clip that a model is asked about: the rules differ in where its text goes on, and when
FRAMES, SECONDS = 4, 1.75


def native_rule(owner: nn.Module) -> str:
    """Which rule the installed transformers has, by what it answers for one clip."""
    with torch.device("cpu"):
        try:
            found = _ask(owner)
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
            return UNKNOWN  # of which inject_sta and load_sta warn, as of every rule that isn't the training's
        text = torch.arange(2).expand(3, -1)
        for name, rule in RULES.items():
            clip, after = rule(tokens_per_second(owner)).clip(2, FRAMES, 1, 1, SECONDS)
            if torch.equal(found, torch.cat([text, clip, text + int(after)], dim=1)):
                return name
    return UNKNOWN


def _ask(owner: nn.Module) -> Tensor:
    """The positions (3, tokens) that transformers' own method gives to a clip between two tokens of text each."""
    merge = number_of(getattr(owner.config, "vision_config", None), "spatial_merge_size")
    start, video, end = (number_of(owner.config, f"{x}_token_id") for x in ("vision_start", "video", "vision_end"))
    ids = torch.tensor([[0, start, *[video] * FRAMES, end, 0]])
    known: dict[str, Tensor] = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "video_grid_thw": torch.tensor([[FRAMES, merge, merge]]),
        "second_per_grid_ts": torch.tensor([SECONDS]),
        "mm_token_type_ids": 2 * (ids == video).int(),
    }
    method = getattr(type(owner), ROPE_INDEX)
    names = parameter_names(method, f"{type(owner).__name__}.{ROPE_INDEX}")
    positions, _ = method(owner, **{name: value for name, value in known.items() if name in names})
    return positions[:, 0]
