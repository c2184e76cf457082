"""The published way to ask InternVideo2-Chat: `chat`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sta_adapter.errors import DataError
from sta_adapter.internvideo.v2_prompt import IMAGE, VIDEO, conversation, prompt_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ChatMixin:
    """`chat`, for a model with `config`, `device` and `generate`."""

    config: Any  # that of the model
    device: torch.device

    def chat(
        self,
        tokenizer: PreTrainedTokenizerBase,
        msg: str,
        user_prompt: str,
        media_type: str,
        media_tensor: Tensor,
        instruction: str | None = None,
        chat_history: Sequence[tuple[str, str]] = (),
        return_history: bool = False,
        generation_config: Mapping[str, object] | None = None,
        qformer_tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> str | tuple[str, list[tuple[str, str]]]:
        """An answer, by the published call.

        Args:
            tokenizer: the language model's.
            msg: text behind the clip, such as at which seconds its frames were taken.
            user_prompt: the question.
            media_type: "video" or "image".
            media_tensor: a clip (T, 3, H, W); with the HD variant's tiles (1, tiles, T, 3, H, W). A picture (1, 3, H,
                W), or several (n, 1, 3, H, W).
            instruction: text in front of all.
            chat_history: questions and answers before.
            return_history: give the history with this answer as well.
            generation_config: options of `generate`; by default it samples up to 200 tokens, as published.
            qformer_tokenizer: of bert-base-uncased; with it the Q-Former reads the instruction too, as in the HD
                variant.

        Returns:
            The answer, or (answer, history).

        Raises:
            DataError: the tensor is of another shape, or an instruction for the Q-Former can't be tokenized.
        """
        clips = _clips(media_type, media_tensor.to(self.device))
        places = [IMAGE if media_type == "image" else VIDEO] * len(clips)
        text = conversation(
            user_prompt, places, message=msg, instruction=instruction or "", history=tuple(chat_history)
        )
        ids = torch.tensor([prompt_tokens(tokenizer, text, self.config)], device=self.device)
        pixels = {"pixel_values": clips[:, 0]} if media_type == "image" else {"pixel_values_videos": clips}
        read: dict[str, Tensor] = {}
        if instruction and qformer_tokenizer is not None:
            told = qformer_tokenizer(instruction, truncation=True, max_length=512, return_tensors="pt").to(self.device)
            read = {"qformer_input_ids": told["input_ids"], "qformer_attention_mask": told["attention_mask"]}
        options = {"max_new_tokens": 200, "do_sample": True, "min_length": 1, **(generation_config or {})}
        if options["do_sample"]:
            options.setdefault("top_p", 0.9)
        out = self.generate(input_ids=ids, **pixels, **read, **options)  # type: ignore[attr-defined]
        answer = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)[0]
        return (answer, [*chat_history, (user_prompt, answer)]) if return_history else answer


def _clips(kind: str, tensor: Tensor) -> Tensor:
    """Clips (n, T, 3, H, W), of pictures with T = 1."""
    shape = tuple(tensor.shape)
    if kind == "video" and tensor.dim() in (4, 6):
        clips = tensor[None] if tensor.dim() == 4 else tensor.flatten(0, 1)
    elif kind == "image" and tensor.dim() in (4, 5):
        clips = tensor[None] if tensor.dim() == 4 else tensor
    else:
        raise DataError(
            f"media_type is {kind!r} and media_tensor of the shape {shape}; expected 'video' with (frames, 3, height, width) or "
            "(1, tiles, frames, 3, height, width), or 'image' with (1, 3, height, width) or (pictures, 1, 3, height, width)."
        )
    if clips.shape[2] != 3 or (kind == "image" and clips.shape[1] != 1):
        raise DataError(
            f"media_tensor is of the shape {shape}; expected {'one frame a picture and ' if kind == 'image' else ''}three "
            "channels in front of height and width."
        )
    return clips
