"""The tiny base made ready for the demo."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from sta_adapter.compatibility.releases import transformers_release
from sta_adapter.injection.handle import STAHandle
from sta_adapter.injection.text_positions import use_positions_of
from sta_adapter.loading import load_model
from sta_adapter.tiny_base import TINY_BASE, TINY_BASE_FRAMES

ATTENTION = "flash_frames_at_once"  # transformers hands the frames' lengths to functions whose name holds "flash"


@contextmanager
def two_threads() -> Iterator[None]:
    """Compute with two threads: the same sums on every machine with two cores or more. What was set before comes back."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def save_adapter(handle: STAHandle, folder: Path) -> None:
    """Save the adapter, with the frames that it was trained on, which other folders than the tiny base's don't tell."""
    handle.save_pretrained(folder)
    file = folder / "sta_config.json"
    description = json.loads(file.read_text(encoding="utf-8")) | {"frames": TINY_BASE_FRAMES}
    file.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def tiny_model(base: Path = TINY_BASE) -> nn.Module:
    """A fresh tiny base on the CPU, or one that was taught since, from its folder."""
    model = load_model(base, dtype="fp32", device="cpu")
    use_positions_of(model, None)
    attend_frames_at_once(model)
    return model


def attend_frames_at_once(model: nn.Module) -> None:
    """Spare the CPU transformers' loop over frames in the vision encoder; releases before 5 stay as they are."""
    import transformers

    if transformers_release() >= (5, 0):
        transformers.AttentionInterface.register(ATTENTION, _attend)
        visual = cast("transformers.PreTrainedModel", model.get_submodule("model.visual"))
        visual.config._attn_implementation = ATTENTION


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    cu_seq_lens_q: Tensor,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention within frames; query, key and value are (1, heads, frames * positions, D), all frames of one size."""
    lengths = cu_seq_lens_q.diff()
    if len(lengths.unique()) > 1:
        raise ValueError(f"the demo's frames are of one size, found {lengths.unique().tolist()} positions")
    q, k, v = (x[0].unflatten(1, (len(lengths), -1)).transpose(0, 1) for x in (query, key, value))
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)[None], None
