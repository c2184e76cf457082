"""Clips of unequal lengths in LLaVA-OneVision, whose classes take stacked ones: encoded as one long clip, and taken apart again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sta_adapter.compatibility.calls import bound_arguments
from sta_adapter.compatibility.releases import incompatible
from sta_adapter.data.clip_batches import missing_frames

# transformers 5.24: repeats what `generate` has encoded for beams and several answers, before it repeats the prompts
REPEAT = "_expand_multimodal_outputs"


def packed_videos(model: Any, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call `get_video_features`; clips of unequal lengths, filled up with frames of NaN, are encoded as one long clip.

    Its features are taken apart again, with the model's newline behind each clip, as the model has it behind every one.
    """
    name = next((key for key in ("pixel_values_videos", "pixel_values") if key in kwargs), "")
    videos = kwargs[name] if name else args[0] if args else None
    if not isinstance(videos, torch.Tensor) or videos.dim() != 5 or not missing_frames(videos).any():
        return method(*args, **kwargs)
    there = ~missing_frames(videos)
    lengths, packed = there.sum(1).tolist(), videos[there][None]
    args, kwargs = (args, {**kwargs, name: packed}) if name else ((packed, *args[1:]), kwargs)
    output = method(*args, **kwargs, clip_lengths=lengths)
    features = output if isinstance(output, torch.Tensor) else getattr(output, "pooler_output", None)
    frames = sum(lengths)
    if not isinstance(features, torch.Tensor) or features.dim() != 3 or features.shape[1] % frames > 1:
        raise incompatible("transformers", f"{type(model).__name__}'s features of videos are {type(features).__name__}")
    tokens, ended = divmod(features.shape[1], frames)  # newer releases put the last newline there by themselves
    inner = model if hasattr(model, "image_newline") else model.model
    newline = inner.image_newline[None, None].to(features)
    parts = [
        part
        for clip in torch.split(features[:, : frames * tokens], [length * tokens for length in lengths], 1)
        for part in (clip, newline)
    ]
    joined = torch.cat(parts if ended else parts[:-1], 1)
    if output is features:
        return joined
    output.pooler_output = joined
    return output


def repeated_videos(model: Any, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call `_expand_multimodal_outputs`; clips that `packed_videos` has joined are repeated sample by sample.

    The method takes a joined row for one clip, and would repeat that as a whole: other samples' clips stood at a prompt's places.
    """
    given: dict[str, Any] = bound_arguments(model, args, kwargs, REPEAT)
    videos = given["mm_encoder_output"].get("video")
    if videos is None or len(videos.pooler_output) != 1:
        return method(*args, **kwargs)
    ids, token = given["input_ids"], model.config.video_token_id
    places = (
        ids == token
        if ids is not None and ids.numel()
        else _is_word(given["inputs_embeds"], token, model.get_input_embeddings())
    )
    parts = torch.split(videos.pooler_output, places.sum(1).tolist(), dim=1)
    videos.pooler_output = torch.cat([part for part in parts for _ in range(given.get("expand_size", 1))], dim=1)
    others = {kind: output for kind, output in given["mm_encoder_output"].items() if kind != "video"}
    return {**method(**{**given, "mm_encoder_output": others}), "video": videos}


def _is_word(embeddings: torch.Tensor, token: int, embed: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """(B, L) where embeddings (B, L, C) are a token's."""
    word = embed(torch.tensor(token, device=embeddings.device))
    return (embeddings == word).all(-1)
