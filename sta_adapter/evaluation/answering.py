"""A model's answers to encoded prompts: generated, or chosen among options by their log-likelihood."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)

from sta_adapter.compatibility.calls import takes
from sta_adapter.compatibility.position_seams import forget_earlier_batches
from sta_adapter.compatibility.processors import Processor
from sta_adapter.data.chat_encoding import encode_answer
from sta_adapter.data.chat_template import has_reasoning
from sta_adapter.data.clip_batches import PIXELS, missing_frames
from sta_adapter.data.collator import Collator, pixels_key
from sta_adapter.data.conversation import Sample
from sta_adapter.data.visual_processing import Encoded
from sta_adapter.errors import DataError, DivergenceError
from sta_adapter.evaluation.answer_text import final_answer
from sta_adapter.evaluation.option_matching import named_option
from sta_adapter.injection.handle import get_sta

NO_NUMBERS = (
    "the model's outputs are no numbers (NaN), so that nothing is its answer. If it computes in fp16, take bf16 or fp32 (--dtype); else look "
    "at its weights."
)


@dataclass(frozen=True)
class Prediction:
    """What the model said about one sample.

    `scores` are the options' log-likelihoods, where the most likely one was chosen; `unmatched` says that a generated
    answer could not be read: it names none of the options, or is empty.
    """

    index: int
    source: str
    category: str | None
    answer: str
    prediction: str
    correct: bool
    scores: list[float] | None = None
    unmatched: bool = False


def judge(index: int, sample: Sample, said: str, scores: list[float] | None = None) -> Prediction:
    """Whether what a model wrote, or the option with the highest of `scores`, is the sample's answer."""
    about = (index, sample.source, sample.category, sample.answer, said)
    if scores is not None:
        return Prediction(*about, said == sample.answer, scores)
    if sample.options is None:
        found = _bare_answer(said)
        return Prediction(*about, found == _bare_answer(sample.answer), unmatched=not found)
    named = named_option(said, sample.options, sample.extra.get("option_texts", ()))
    return Prediction(*about, named is not None and sample.options[named] == sample.answer, unmatched=named is None)


def most_likely(index: int, sample: Sample, scores: list[float]) -> Prediction:
    """The option of the highest log-likelihood as the answer; one that is no number is refused, as the first would win."""
    if any(map(math.isnan, scores)):
        raise DivergenceError(f"{sample.source}: {NO_NUMBERS}")
    options = sample.options or []
    return judge(index, sample, options[max(range(len(options)), key=scores.__getitem__)], scores)


@dataclass(frozen=True)
class Question:
    """A sample to be answered."""

    index: int  # the sample's
    sample: Sample  # its answer is not shown to the model
    prompt: Encoded
    options: list[torch.Tensor]  # as tokens; none where the answer is generated


def option_tokens(processor: Processor, sample: Sample, choose: str) -> list[torch.Tensor]:
    """A sample's options as tokens; none where its answer is generated, as `choose` may say.

    Raises:
        DataError: the chat template or the tokenizer can't take one of them.
    """
    options = sample.options if sample.options is not None and choose == "loglikelihood" else []
    thinking = has_reasoning(sample.messages)
    return [encode_answer(processor, sample.prompt, option, thinking) for option in options]


class Numbers(LogitsProcessor):
    """Leaves logits as they are, and refuses such as are no numbers, in which generation would find some word."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """(B, words) the same scores."""
        if scores.isnan().any():
            raise DivergenceError(NO_NUMBERS)
        return scores


class AtLetter(StoppingCriteria):
    """Ends the rows that begin with an option's letter and a mark behind it, which a word that begins with it has not.

    Answers begin at `start`; `options` are how many each row's question has, 0 to let it go on.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, start: int, options: Sequence[int]) -> None:
        self.tokenizer, self.start, self.options = tokenizer, start, options

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        """(B,) which rows have ended."""
        said = self.tokenizer.batch_decode(input_ids[:, self.start :], skip_special_tokens=True)
        ended = [
            bool(count) and _begins_with_letter(text, count) for text, count in zip(said, self.options, strict=True)
        ]
        return torch.tensor(ended, device=input_ids.device)


def _begins_with_letter(said: str, options: int) -> bool:
    found = re.match(r"\s*(?:\(([A-Z])\)|([A-Z])[.):\n])", said)
    return found is not None and ord(found[1] or found[2]) - ord("A") < options


class Answerer:
    """Answers of a model to encoded prompts, in batches padded on the left; arguments as for `evaluate`."""

    def __init__(
        self,
        model: nn.Module,
        processor: Processor,
        max_new_tokens: int,
        batch_size: int,
        stop_at_letter: bool = False,
    ) -> None:
        self.model: Any = model  # of a class that generates
        self.processor = processor
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        self.stop_at_letter = stop_at_letter
        self.collate = Collator.of(processor, side="left")
        self.device = next(model.parameters()).device

    def answer(self, questions: list[Question]) -> Iterator[Prediction]:
        """Predictions, those of generated answers first."""
        for group in self._alike([question for question in questions if not question.options]):
            yield from self._generate(group)
        yield from map(self._choose, (question for question in questions if question.options))

    def require_possible(self, question: Question) -> None:
        """Raise DataError for a prompt that only a model with STA takes."""
        videos = question.prompt.get("pixel_values_videos")
        unequal = videos is not None and videos.dim() == 5 and bool(missing_frames(videos).any())
        if unequal and get_sta(self.model) is None:
            raise DataError(
                "its clips are of unequal lengths, which this model takes in one sample only with STA; give them one nframes."
            )

    def _alike(self, questions: list[Question]) -> list[list[Question]]:
        """In batches that any model takes: stacked clips and pictures of one length, and of one kind where need be."""
        groups: dict[tuple[object, ...], list[Question]] = {}
        for question in questions:
            item = question.prompt
            stacked = tuple((key, item[key].shape[1:]) for key in PIXELS if key in item and item[key].dim() == 5)
            groups.setdefault((pixels_key(item) if self.collate.one_kind else "", stacked), []).append(question)
        return list(groups.values())

    def batch(self, items: list[Encoded]) -> tuple[dict[str, torch.Tensor], contextlib.AbstractContextManager[None]]:
        """Arguments of the model, and a context in which STA is told the clips of what comes as rows of frames."""
        batch = {key: value for key, value in self.collate(items).items() if isinstance(value, torch.Tensor)}
        forget_earlier_batches(self.model, batch)
        lengths, handle = batch.pop("clip_lengths", None), get_sta(self.model)
        told = contextlib.nullcontext() if lengths is None or handle is None else handle.clips(lengths.tolist())
        return {key: value.to(self.device) for key, value in batch.items()}, told

    def write(
        self, prompts: list[Encoded], said: Callable[[str], None] | None = None, options: Sequence[int] = ()
    ) -> list[str]:
        """What the model writes behind each prompt, greedily.

        `said` is told the text of a single prompt so far, as it grows. `options` are how many each prompt has, whose letter
        then ends the answer; 0 for those that go on.
        """
        batch, told = self.batch(prompts)
        tokenizer, own = self.processor.tokenizer, self.model.generation_config.eos_token_id
        ends = [own] if isinstance(own, int) else list(own or [])
        start = batch["input_ids"].shape[1]
        stop = {"stopping_criteria": StoppingCriteriaList([AtLetter(tokenizer, start, options)])} if options else {}
        with told:
            out = self.model.generate(
                **batch,
                **stop,
                logits_processor=LogitsProcessorList([Numbers()]),
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_p=None,
                top_k=None,
                repetition_penalty=1.0,
                max_new_tokens=self.max_new_tokens,
                eos_token_id=sorted({*ends, tokenizer.eos_token_id} - {None}) or None,
                pad_token_id=self.collate.pad_id,
                streamer=None if said is None else _Growing(tokenizer, said),
            )
        texts = tokenizer.batch_decode(out[:, start:], skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _generate(self, questions: list[Question]) -> Iterator[Prediction]:
        options = [len(question.sample.options or ()) for question in questions] if self.stop_at_letter else []
        said = self.write([question.prompt for question in questions], options=options)
        for question, text in zip(questions, said, strict=True):
            yield judge(question.index, question.sample, text)

    def _choose(self, question: Question) -> Prediction:
        """The option that is most likely as a complete answer."""
        scores: list[float] = []
        for start in range(0, len(question.options), self.batch_size):
            scores += self._log_likelihoods(question.prompt, question.options[start : start + self.batch_size])
        return most_likely(question.index, question.sample, scores)

    def _log_likelihoods(self, prompt: Encoded, answers: list[torch.Tensor]) -> list[float]:
        rows = [_extended(prompt, answer) for answer in answers]
        (batch, told), longest = self.batch(rows), max(map(len, answers))
        last = {}
        base = getattr(self.model, "get_base_model", lambda: self.model)()
        if takes(self.model, "logits_to_keep") or takes(base, "logits_to_keep"):
            last["logits_to_keep"] = longest + 1
        with told:
            logits = self.model(**batch, **last).logits[:, -longest - 1 : -1].float()
        targets = batch["input_ids"][:, -longest:]
        chosen = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
        return [float(row[longest - len(answer) :].sum()) for row, answer in zip(chosen, answers, strict=True)]


class _Growing(TextStreamer):
    """Tells the whole text of an answer each time that a word is added to it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, said: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.said = said
        self.text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """What transformers calls with the words that will change no more."""
        self.text += text
        if text:
            self.said(self.text.strip())


def _extended(prompt: Encoded, answer: torch.Tensor) -> Encoded:
    """A prompt with an answer's tokens behind it."""
    longer = {**prompt, "input_ids": torch.cat([prompt["input_ids"], answer])}
    for key in ("mm_token_type_ids", "token_type_ids"):
        if key in longer:
            longer[key] = torch.cat([prompt[key], torch.zeros_like(answer)])
    return longer


def _bare_answer(text: str) -> str:
    """An answer without reasoning, markup, case, and the full stop at its end."""
    return " ".join(final_answer(text).split()).removesuffix(".").casefold()
