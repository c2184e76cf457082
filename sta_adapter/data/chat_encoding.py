"""Turn a conversation with decoded clips into what a model takes, with labels on the assistant's words alone.

It works for any chat template that renders a longer conversation as the shorter one plus more; where a template
doesn't, or where a token would straddle the border between prompt and answer, a `DataError` says so. The prompt's
tokens are exactly those that generation would see.
"""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sta_adapter.compatibility import processors
from sta_adapter.data.clip_batches import put_together, row_lengths, split_unequal, takes_one_kind
from sta_adapter.data.clip_times import step_seconds, told_seconds
from sta_adapter.errors import DataError
from sta_adapter.video.resize import resize_frames

__all__ = ["Encoded", "IGNORE", "Prompt", "Visual", "encode", "encode_answer", "encode_prompt", "temporal_patch"]

IGNORE = -100
Encoded = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Visual:
    """A decoded clip or image.

    Attributes:
        kind: "video" or "image".
        pixels: `(T, H, W, 3)` uint8, of one frame for an image.
        metadata: when frames begin, as transformers tells it: fps, frames_indices (over fps: seconds), total_num_frames, duration.
        resized: whether the pixels have their final size, so that the processor must not resize them.
    """

    kind: str
    pixels: np.ndarray
    metadata: dict[str, Any] | None = None
    resized: bool = False


@dataclass(frozen=True)
class Prompt:
    """A prompt as an engine takes it that processes clips by itself.

    Attributes:
        tokens: the rendered conversation, with one placeholder for each clip or image.
        visuals: these, in their final size where `settings` say so.
        settings: of the video processor.
        temporal_patch: how many frames the model merges into one.
        placeholders: the token ids that stand for what the encoder sees.
    """

    tokens: list[int]
    visuals: list[Visual]
    settings: dict[str, Any]
    temporal_patch: int = 1
    placeholders: frozenset[int] = frozenset()

    @classmethod
    def of(cls, processor: Any, messages: list[dict[str, Any]], visuals: list[list[Visual]]) -> Prompt:
        """The prompt of a conversation; arguments as for `encode_prompt`."""
        flat = [visual for group in visuals for visual in group]
        clips = [visual for visual in flat if visual.kind == "video"]
        sized, settings = _sized(processor, clips)
        final = iter(sized)
        shown = [next(final) if visual.kind == "video" else visual for visual in flat]
        tokens = _tokens(processor.tokenizer, render(processor, messages, prompt=True))
        return cls(tokens, shown, settings, temporal_patch(processor), _placeholders(processor))


def _placeholders(processor: Any) -> frozenset[int]:
    words = (getattr(processor, f"{kind}_token", None) for kind in ("image", "video"))
    return frozenset(processor.tokenizer.convert_tokens_to_ids(word) for word in words if isinstance(word, str))


def encode(processor: Any, messages: list[dict[str, Any]], visuals: list[list[Visual]]) -> Encoded:
    """Encode a conversation for training.

    Args:
        processor: a transformers processor with a tokenizer and a chat template.
        messages: as in `Sample.messages`.
        visuals: the decoded clips and images of each message, in order.

    Returns:
        `input_ids` and `labels`, each `(L,)`, and the processor's other tensors; labels are `IGNORE` outside the answers.

    Raises:
        DataError: there is no answer, or the chat template doesn't allow to tell the answers' tokens from the rest.
    """
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise DataError("no message with role 'assistant'; expected an answer to learn.")
    if not any(messages[index].get("loss", True) for index in answers):
        raise DataError("every answer has 'loss': false; expected one to learn.")
    messages = messages[: answers[-1] + 1]
    pieces, labels, done, first = [], [], "", 0
    for index in answers:
        before = _grown(done, render(processor, messages[:index], prompt=True))
        after = _grown(before, render(processor, messages[: index + 1]))
        pieces.append(_piece(processor, done, before, [v for group in visuals[first:index] for v in group]))
        labels.append(torch.full_like(pieces[-1]["input_ids"], IGNORE))
        pieces.append(_piece(processor, before, after, visuals[index]))
        if index == answers[-1]:
            pieces[-1] = _ended(processor.tokenizer, pieces[-1])
        ids = pieces[-1]["input_ids"]
        learns = messages[index].get("loss", True)
        labels.append(_learned(processor.tokenizer, ids) if learns else torch.full_like(ids, IGNORE))
        done, first = after, index + 1
    return {**_join(pieces), "labels": torch.cat(labels)}


def encode_prompt(processor: Any, messages: list[dict[str, Any]], visuals: list[list[Visual]]) -> Encoded:
    """Encode a conversation that waits for an answer; arguments and result as for `encode`, without labels."""
    text = render(processor, messages, prompt=True)
    return _piece(processor, "", text, [visual for group in visuals for visual in group])


def encode_answer(processor: Any, messages: list[dict[str, Any]], answer: str) -> torch.Tensor:
    """Token ids `(L,)` of an answer to the conversation, its end of turn included."""
    before = render(processor, messages, prompt=True)
    turn = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    after = _grown(before, render(processor, [*messages, turn]))
    ids = _ended(processor.tokenizer, _piece(processor, before, after, []))["input_ids"]
    return ids[_learned(processor.tokenizer, ids) != IGNORE]


def render(processor: Any, messages: list[dict[str, Any]], *, prompt: bool = False) -> str:
    """The conversation as the chat template writes it, with one placeholder for each clip or image.

    Args:
        processor: has the chat template.
        messages: the conversation.
        prompt: end with the words that ask for the assistant's answer.
    """
    _require_unicode(messages)
    bare = [{"role": message["role"], "content": [_bare(part) for part in message["content"]]} for message in messages]
    try:
        return processor.apply_chat_template(bare, tokenize=False, add_generation_prompt=prompt)
    except Exception as error:
        roles = ", ".join(message["role"] for message in messages) or "none"
        raise DataError(
            f"the chat template can't render the roles ({roles}): {type(error).__name__}: {error}"
        ) from error


def _require_unicode(messages: list[dict[str, Any]]) -> None:
    """Half a character, as a text that was cut within an emoji has it, is none that a tokenizer takes."""
    for text in (part["text"] for message in messages for part in message["content"] if part["type"] == "text"):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            found = ascii(text[error.start : error.end])
            raise DataError(
                f"the text holds {found} at character {error.start}, which is half a character (a surrogate without its other "
                "half); expected whole ones. Whatever wrote the file cut a text within an emoji: mend the text."
            ) from error


def _bare(part: dict[str, Any]) -> dict[str, Any]:
    return {"type": "text", "text": part["text"]} if part["type"] == "text" else {"type": part["type"]}


def _grown(shorter: str, longer: str) -> str:
    """`longer`, if it begins with `shorter`."""
    if longer.startswith(shorter):
        return longer
    same = next((i for i, (a, b) in enumerate(zip(shorter, longer, strict=False)) if a != b), len(longer))
    raise DataError(
        f"the chat template rewrites earlier turns when a turn is added: {shorter[same : same + 40]!r} became "
        f"{longer[same : same + 40]!r}; expected it only to append. Use a template without that (pass another chat template)."
    )


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []


def _piece(processor: Any, before: str, after: str, visuals: list[Visual]) -> Encoded:
    """Encode what `after` adds to `before`: each clip is processed once, in the piece that it stands in."""
    start, tokens = _tokens(processor.tokenizer, before), _tokens(processor.tokenizer, after)
    if tokens[: len(start)] != start:
        raise DataError(
            f"a token straddles the border between {before[-20:]!r} and {after[len(before) :][:20]!r}; expected the prompt's "
            "tokens to be a prefix of the whole. Remove white space at the start of the answer."
        )
    added, text = tokens[len(start) :], after[len(before) :]
    _check_placeholders(processor, text, visuals)
    if not visuals:
        return {"input_ids": torch.tensor(added, dtype=torch.long)}
    if start and _tokens(processor.tokenizer, text) != added:
        raise DataError(
            f"the tokenizer reads {text[:40]!r} differently on its own; clips after the first answer need that."
        )
    return _process(processor, text, visuals)


def _check_placeholders(processor: Any, text: str, visuals: list[Visual]) -> None:
    for kind in ("image", "video"):
        expected = sum(visual.kind == kind for visual in visuals)
        token = processors.placeholder(processor, kind, required=expected > 0)
        if token is not None and text.count(token) != expected:
            raise DataError(
                f"the rendered text has {text.count(token)} times {token}, expected {expected}, one for each {kind}. "
                "Either the chat template has no place for it, or the sample's text contains the token itself."
            )


def _process(processor: Any, text: str, visuals: list[Visual]) -> Encoded:
    """Calls of the processor, with arrays, never paths, and without any sampling of its own."""
    pieces = split_unequal(processor, text, visuals)
    return (
        _process_once(processor, text, visuals)
        if len(pieces) == 1
        else _join([_process_once(processor, words, group) for words, group in pieces])
    )


def _process_once(processor: Any, text: str, visuals: list[Visual]) -> Encoded:
    clips = [visual for visual in visuals if visual.kind == "video"]
    images = [visual.pixels[0] for visual in visuals if visual.kind == "image"]
    if clips and images and takes_one_kind(processor):
        raise DataError("this model takes either pictures or clips in one sample, not both; leave one of them out.")
    part = processors.visual_part(processor)
    sizes = processors.Sizes.of(part)
    sampled = bool(clips) and processors.takes_clips(processor)
    if sampled and "BaseVideoProcessor" not in {cls.__name__ for cls in type(part).__mro__}:
        raise DataError(
            f"clips can't be put through {type(part).__name__} as this release of transformers has it: it takes neither times "
            "nor frames that are chosen already. Use transformers 4.57 or newer for this model."
        )
    if any(clip.resized for clip in clips) and not sizes.packs:
        raise DataError("this model's processor brings all frames to one size; leave out min_pixels and max_pixels.")
    clips, settings = _sized(processor, clips)
    kwargs: dict[str, Any] = {"videos_kwargs": settings}
    if sampled:
        settings["do_sample_frames"] = False
        if all(clip.metadata for clip in clips):
            settings["video_metadata"] = [clip.metadata for clip in clips]
    out = processor(
        text=[text],
        images=images or None,
        videos=[clip.pixels.transpose(0, 3, 1, 2) for clip in clips] or None,
        add_special_tokens=False,
        return_tensors="pt",
        **{key: value for key, value in kwargs.items() if value and clips},
    )
    encoded = {key: value for key, value in out.items() if isinstance(value, torch.Tensor)}
    encoded.pop("attention_mask", None)
    for key in ("input_ids", "mm_token_type_ids", "token_type_ids"):
        if key in encoded:
            encoded[key] = encoded[key][0]
    _check_frames(processor, encoded, clips)
    steps = [step_seconds(clip.metadata, temporal_patch(processor)) for clip in clips if clip.metadata is not None]
    if len(steps) == len(clips):
        encoded.update(told_seconds(encoded, steps))
    return {**encoded, **row_lengths(processor, encoded, visuals)}


def _sized(processor: Any, clips: list[Visual]) -> tuple[list[Visual], dict[str, Any]]:
    """Clips of which all or none have their final size, and the settings by which the video processor keeps it."""
    part = processors.visual_part(processor)
    settings: dict[str, Any] = {}
    if any(clip.resized for clip in clips):  # the switch holds for all, so that the others get their sizes here as well
        clips = [clip if clip.resized else _resized_by(part, clip) for clip in clips]
        settings["do_resize"] = False
    if hasattr(getattr(processor, "video_processor", None), "cap_pixels_per_frame"):
        settings["cap_pixels_per_frame"] = False  # the same sizes whatever the default becomes
    return clips, settings


def _resized_by(part: Any, clip: Visual) -> Visual:
    """A clip in the size that the processor would give to it."""
    frames = clip.pixels[:1].repeat(processors.Sizes.of(part).frames, axis=0).transpose(0, 3, 1, 2)
    names = inspect.signature(part.preprocess).parameters
    options: dict[str, Any] = {"images": None} if "images" in names else {}
    options |= {"do_sample_frames": False} if hasattr(part, "do_sample_frames") else {}
    found = part.preprocess(videos=[frames], return_tensors="pt", **options) if "videos" in names else {}
    if "video_grid_thw" not in found:
        raise DataError(
            "a clip of this sample has min_pixels or max_pixels and another has none, and the size that "
            f"{type(part).__name__} would give to it can't be known; give limits to all of them or to none."
        )
    height, width = (int(size) * part.patch_size for size in found["video_grid_thw"][0, 1:])
    return dataclasses.replace(clip, pixels=resize_frames(clip.pixels, height, width), resized=True)


def _check_frames(processor: Any, encoded: Encoded, clips: list[Visual]) -> None:
    """The model must see the frames that were decoded, no fewer."""
    grid = encoded.get("video_grid_thw")
    if grid is None:
        return
    step = temporal_patch(processor)
    seen, given = [int(t) * step for t in grid[:, 0]], [len(clip.pixels) for clip in clips]
    if len(seen) == len(given) and any(t not in (n, n + -n % step) for t, n in zip(seen, given, strict=True)):
        raise DataError(f"the processor made {seen} frames of {given} decoded ones; expected it not to sample again.")


def temporal_patch(processor: Any) -> int:
    """How many frames the model merges into one."""
    return processors.Sizes.of(processors.visual_part(processor)).frames


def _ended(tokenizer: Any, piece: Encoded) -> Encoded:
    """The last turn must end with a token to stop at: templates that leave it out get the end-of-text token."""
    ids = piece["input_ids"]
    if tokenizer.eos_token_id is None or _end(tokenizer, ids.tolist()) is not None:
        return piece
    return {**piece, "input_ids": torch.cat([ids, ids.new_tensor([tokenizer.eos_token_id])])}


def _learned(tokenizer: Any, ids: torch.Tensor) -> torch.Tensor:
    """Labels of an answer: all of it up to and with its end-of-turn token, not the white space after that."""
    end = _end(tokenizer, ids.tolist())
    labels = ids.clone()
    if end is not None:
        labels[end + 1 :] = IGNORE
    return labels


def _end(tokenizer: Any, ids: list[int]) -> int | None:
    """Index of the special token that nothing but white space follows."""
    special = set(tokenizer.all_special_ids)
    for index in range(len(ids) - 1, -1, -1):
        if ids[index] in special:
            return index
        if tokenizer.decode(ids[index:]).strip():
            return None
    return None


def _join(pieces: list[Encoded]) -> Encoded:
    """Put pieces together: what has one value a token along the sequence (0 where a piece has none), the rest along clips."""
    joined: Encoded = {}
    if sum("batch_num_images" in piece for piece in pieces) > 1:
        raise DataError(
            "this model reads several pictures of a sample otherwise than each by itself, and here they stand in several turns "
            "or between clips of unequal lengths. Put them into one turn, in front of the clips."
        )
    for key in dict.fromkeys(key for piece in pieces for key in piece):
        per_token = key in ("input_ids", "mm_token_type_ids", "token_type_ids")
        parts = [
            piece[key] if key in piece else torch.zeros_like(piece["input_ids"])
            for piece in pieces
            if key in piece or per_token
        ]
        joined[key] = torch.cat(parts) if per_token else put_together(key, parts)
    return joined
