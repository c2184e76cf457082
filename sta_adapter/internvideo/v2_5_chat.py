"""`chat` and `batch_chat` of InternVideo2.5-Chat, with the arguments and the prompts of the published code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from sta_adapter.errors import LayoutError
from sta_adapter.internvideo.v2_5_prompt import END, IMAGE, IMAGE_TOKEN, conversation, image_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


History = list[tuple[str, str]]


class ChatMethods:
    """What the chat model says to questions in words."""

    config: Any  # that of the model
    device: torch.device
    num_image_token: int
    img_context_token_id: int | None
    generate: Callable[..., Any]  # of the model, with its other bases'
    system_message: str | None = None

    def chat(
        self,
        tokenizer: PreTrainedTokenizerBase,
        pixel_values: Tensor | None,
        question: str,
        generation_config: dict[str, object],
        history: History | None = None,
        return_history: bool = False,
        num_patches_list: Sequence[int] | None = None,
    ) -> str | tuple[str, History]:
        """An answer, in words.

        Args:
            tokenizer: the model's; a processor does as well.
            pixel_values: (F, 3, H, W), all rows of the conversation; None for one of text alone.
            question: with an `<image>` for each entry of `num_patches_list` that isn't in `history`; without any, one
                is put in front. Clips are written as in training, `Frame1: <image>` and so on, a line for each frame.
            generation_config: arguments of `generate`.
            history: earlier questions and answers, as returned.
            return_history: whether the history, with this question and its answer, is returned as well.
            num_patches_list: rows of each `<image>`; all of them in one if left out.

        Raises:
            LayoutError: rows, `num_patches_list` and `<image>` don't go together.
        """
        if history is None and pixel_values is not None and IMAGE not in question:
            question = f"{IMAGE}\n{question}"
        rows = 0 if pixel_values is None else len(pixel_values)
        counts = list(num_patches_list or ([rows] if rows else []))
        earlier = list(history or ())
        prompt = conversation(self.config.template, earlier, question, self.system_message)
        if sum(counts) != rows or prompt.count(IMAGE) != len(counts):
            raise LayoutError(
                f"pixel_values have {rows} rows, num_patches_list is {counts}, and the prompt has {prompt.count(IMAGE)} times "
                f"{IMAGE}; expected an {IMAGE} for each entry, and as many rows as they add up to."
            )
        answer, *_ = self._answers(tokenizer, pixel_values, [self._filled(prompt, counts)], generation_config)
        return (answer, [*earlier, (question, answer)]) if return_history else answer

    def batch_chat(
        self,
        tokenizer: PreTrainedTokenizerBase,
        pixel_values: Tensor | None,
        questions: Sequence[str],
        generation_config: dict[str, object],
        num_patches_list: Sequence[int] | None = None,
    ) -> list[str]:
        """Answers to several questions at once, each about rows of its own.

        Args:
            tokenizer: the model's; a processor does as well.
            pixel_values: (F, 3, H, W), the rows of all questions; None where none has any.
            questions: each with at most one `<image>`; without it, one is put in front where there are pixels.
            generation_config: arguments of `generate`.
            num_patches_list: rows of each question.

        Raises:
            LayoutError: rows and questions don't go together.
        """
        counts = list(num_patches_list or [0] * len(questions))
        rows = 0 if pixel_values is None else len(pixel_values)
        if len(counts) != len(questions) or sum(counts) != rows:
            raise LayoutError(
                f"{len(questions)} questions, num_patches_list {counts} and {rows} rows of pixels; expected the rows of each "
                "question, and as many rows as they add up to."
            )
        prompts = []
        for question, count in zip(questions, counts, strict=True):
            shown = f"{IMAGE}\n{question}" if pixel_values is not None and IMAGE not in question else question
            prompt = conversation(self.config.template, [], shown, self.system_message)
            if count % self.config.local_num_frames or prompt.count(IMAGE) > 1:
                raise LayoutError(
                    f"the question {question[:40]!r} has {count} rows and {prompt.count(IMAGE)} times {IMAGE}; expected one, of "
                    f"a multiple of {self.config.local_num_frames} rows, whose tokens are merged together."
                )
            prompts.append(self._filled(prompt, [count] * prompt.count(IMAGE)))  # without pixels there may be none
        return self._answers(tokenizer, pixel_values, prompts, generation_config)

    def _filled(self, prompt: str, counts: Sequence[int]) -> str:
        first, *rest = prompt.split(IMAGE)
        return first + "".join(
            image_tokens(self.num_image_token * count) + text for count, text in zip(counts, rest, strict=True)
        )

    def _answers(
        self,
        tokenizer: PreTrainedTokenizerBase,
        pixel_values: Tensor | None,
        prompts: list[str],
        generation_config: dict[str, object],
    ) -> list[str]:
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        self.img_context_token_id = cast(int, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        ids, mask = inputs["input_ids"].to(self.device), inputs["attention_mask"].to(self.device)
        options = {**generation_config, "eos_token_id": tokenizer.convert_tokens_to_ids(END)}
        options.setdefault("pad_token_id", tokenizer.pad_token_id)
        said = self.generate(pixel_values=pixel_values, input_ids=ids, attention_mask=mask, **options)
        texts = tokenizer.batch_decode(said[:, ids.shape[1] :], skip_special_tokens=True)
        return [text.split(END)[0].strip() for text in texts]
