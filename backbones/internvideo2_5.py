"""InternVideo2.5-Chat: InternViT with the frames as its batch, and where its chat model says that a clip ends.

Rows are frames, in order, as the model's own token merging takes them. They are one clip, unless something says
otherwise; what the user tells comes first (`handle.clips([...])`, `clip_lengths=[...]` in any of the calls). Then:

- `batch_chat(num_patches_list=[n, m])`: one clip a question;
- `chat(...)`: an `<image>` of several rows is a clip. Where each frame has an `<image>`, as in the documented use, the
  labels tell, `Frame1: <image> Frame2: <image>`: a clip goes on as long as the numbers grow; tiled frames have equal rows;
- `forward` and `generate` (and `embed`, which ours call): one clip a sample, counted by its image tokens, when these are in one piece.
All else (two rows behind two unlabelled `<image>`, a `model.forward(...)` past all hooks) is an error. InternVL 2.5, whose chat
model has the same class, cuts a picture into rows: tell `clip_lengths=[1] * rows` there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from sta_adapter.attention.layout import ClipLayout, ClipLengths
from sta_adapter.backbones.frames import attention_heads, pixel_dummy, pixel_layout, pixel_positions, row_clips
from sta_adapter.backbones.internvideo2 import INTERN_LORA
from sta_adapter.backbones.internvl import feature_clips
from sta_adapter.errors import LayoutError, UnknownClipsError
from sta_adapter.injection.backbone import Backbone, ClipSource, EncoderCall

PLACEHOLDER = re.compile(r"(?:\bframe[\s_-]*(\d+)\s*:?\s*)?<image>", re.IGNORECASE)


def vit_layout(call: EncoderCall) -> ClipLayout:
    """Layout of rows (F, 1 + N, C), from `pixel_values` (F, 3, H, W) or `pixel_embeds` (F, 1 + N, C)."""
    if isinstance(embeds := call.arguments.get("pixel_embeds"), torch.Tensor):
        return row_clips(len(embeds), embeds.shape[1] - 1, call.clip_lengths, prefix=1, must_be_told=False)
    return pixel_layout(must_be_told=False)(call)


def chat_clips(model: nn.Module, arguments: Mapping[str, object]) -> ClipLengths | None:
    """Clips of `chat`'s rows: from `num_patches_list` and the labels in the prompt."""
    counts, history = arguments.get("num_patches_list") or None, arguments.get("history") or ()
    if arguments.get("pixel_values") is None or not isinstance(counts, Iterable) or not isinstance(history, Iterable):
        return None
    rows = [int(n) for n in counts]
    labels = PLACEHOLDER.findall("\n".join([*(text for turn in history for text in turn), str(arguments["question"])]))
    if len(labels) == len(rows) and all(labels):
        return _labelled_clips(rows, [int(label) for label in labels])
    if len(rows) == 1 or (not labels and set(rows) == {1}):
        return (sum(rows),)
    if min(rows) > 1 and not any(labels):
        return tuple(rows)
    raise _unknown(f"{len(rows)} <image> of {rows} rows in one prompt")


def _labelled_clips(rows: Sequence[int], numbers: Sequence[int]) -> ClipLengths:
    starts = [i for i in range(len(rows)) if i == 0 or numbers[i] <= numbers[i - 1]]
    clips = [rows[a:b] for a, b in zip(starts, [*starts[1:], len(rows)], strict=True)]
    for clip in clips:
        if len(set(clip)) > 1:
            raise LayoutError(
                f"the frames of a clip have {list(clip)} tiles; a position can be followed through the frames only if "
                "all have as many. Cut every frame in the same way (max_num=1 for one tile), or use handle.disabled()."
            )
    return tuple((len(clip), clip[0]) for clip in clips)


def batch_chat_clips(model: nn.Module, arguments: Mapping[str, object]) -> ClipLengths | None:
    """Clips of `batch_chat`'s rows: one a question."""
    rows = arguments.get("num_patches_list") or arguments.get("image_counts")
    if arguments.get("pixel_values") is None or not rows or not isinstance(rows, Iterable):
        return None
    return tuple(int(n) for n in rows if n)


def sample_clips(model: nn.Module, arguments: Mapping[str, object]) -> ClipLengths | None:
    """Clips of the rows of `forward` or `generate`: one a sample, by the image tokens in `input_ids` (B, L)."""
    pixels, ids = arguments.get("pixel_values"), arguments.get("input_ids")
    encoded = arguments.get("visual_features") is not None
    if not isinstance(pixels, torch.Tensor) or not isinstance(ids, torch.Tensor) or len(pixels) == 1 or encoded:
        return None
    flags = arguments.get("image_flags")
    if isinstance(flags, torch.Tensor) and not flags.any():
        return (1,) * len(pixels)  # samples of text alone bring a picture that no token stands for
    token, per_row = getattr(model, "img_context_token_id", None), getattr(model, "num_image_token", None)
    if token is None or per_row is None:
        if len(ids) > 1:
            raise _unknown(f"{len(pixels)} rows for {len(ids)} samples whose image tokens aren't known")
        return None
    found = ids == token
    pieces = found[:, 0].long() + (found[:, 1:] & ~found[:, :-1]).sum(1)
    lengths = tuple(n // per_row for n in found.sum(1).tolist() if n)
    if pieces.max() > 1 or sum(lengths) != len(pixels):
        raise _unknown(f"{len(pixels)} rows for samples with {pieces.tolist()} runs of {found.sum(1).tolist()} tokens")
    return lengths


def _unknown(found: str) -> UnknownClipsError:
    return UnknownClipsError(
        f"where the clips end can't be known: {found} may be frames of one clip or separate pictures. Tell the frames of each "
        "by clip_lengths=[...] or handle.clips([...]), or label them in chat(...): 'Frame1: <image> Frame2: <image>'."
    )


BACKBONE = Backbone(
    name="internvideo2_5",
    encoder_classes=("InternVisionModel",),
    layout=vit_layout,
    separate_frames=True,
    heads=attention_heads,
    blocks="encoder.layers",
    clip_source=ClipSource(
        model_classes=("InternVLChatModel", "InternVideo2_5ForConditionalGeneration"),
        methods={"chat": chat_clips, "batch_chat": batch_chat_clips, "extract_feature": feature_clips}
        | dict.fromkeys(("forward", "generate", "embed"), sample_clips),
    ),
    lora=INTERN_LORA,
    dummy_inputs=pixel_dummy,
    positions=pixel_positions,
)
