"""Engine: what answers in the place of a model, by its own processing of prompts and clips; EngineAnswerer asks it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, TypedDict, cast

from sta_adapter.compatibility.processors import Processor
from sta_adapter.data.chat_encoding import Loaded, Prompt
from sta_adapter.data.collator import Collator
from sta_adapter.data.visual_processing import Encoded
from sta_adapter.errors import DataError
from sta_adapter.evaluation.answering import Prediction, Question, judge, most_likely
from sta_adapter.evaluation.result import EvaluationResult


class Engine(Protocol):
    """What `sta_adapter.evaluation.evaluate` takes in the place of a model.

    Attributes:
        max_length: tokens of the longest prompt with its answer.
    """

    max_length: int

    def fingerprint(self) -> dict[str, str]:
        """What every answer depends on."""

    def write(self, prompts: Sequence[tuple[Prompt, list[int]]], max_new_tokens: int) -> list[list[int]]:
        """The tokens that are written behind each prompt, greedily; with each comes the prompt as transformers makes it.

        Raises:
            CompatibilityError: the engine makes other tokens of a prompt; so in `log_likelihoods`.
        """

    def log_likelihoods(
        self, prompts: Sequence[tuple[Prompt, list[int]]], options: Sequence[list[list[int]]]
    ) -> list[list[float]]:
        """The log-likelihood of each of a prompt's options, in nats."""


class EngineAnswerer:
    """Answers of an engine to encoded prompts: as `Answerer` has them of a model."""

    def __init__(self, engine: Engine, processor: Processor, max_new_tokens: int) -> None:
        self.engine = engine
        self.processor = processor
        self.max_new_tokens = max_new_tokens
        self.collate = Collator.of(processor)

    def require_possible(self, question: Question) -> None:
        """Raise DataError for a prompt that the engine has no room for, with its options or the longest answer."""
        needed = len(question.prompt["input_ids"]) + max(map(len, question.options), default=self.max_new_tokens)
        if needed > self.engine.max_length:
            raise DataError(
                f"its prompt and the longest answer have {needed} tokens, more than the {self.engine.max_length} of the "
                "engine; take fewer frames or fewer tokens a frame, or a larger max_model_len."
            )

    def answer(self, questions: list[Question]) -> Iterator[Prediction]:
        """Predictions, those of generated answers first; each kind is asked in one go."""
        generated, scored = ([q for q in questions if bool(q.options) is chosen] for chosen in (False, True))
        if generated:
            said = self.engine.write([_prompt(question.prompt) for question in generated], self.max_new_tokens)
            texts = self.processor.tokenizer.batch_decode(said, skip_special_tokens=True)
            for question, text in zip(generated, texts, strict=True):
                yield judge(question.index, question.sample, text.strip())
        if scored:
            options = [[option.tolist() for option in question.options] for question in scored]
            scores = self.engine.log_likelihoods([_prompt(question.prompt) for question in scored], options)
            for question, found in zip(scored, scores, strict=True):
                yield most_likely(question.index, question.sample, found)


def _prompt(item: Encoded) -> tuple[Prompt, list[int]]:
    loaded = cast(Loaded, item)  # with the prompt, as the data set is for an engine
    return cast(Prompt, loaded.prompt), loaded["input_ids"].tolist()


class Agreement(TypedDict):
    """How far an engine's answers are those of transformers."""

    samples: int  # that both could use
    equal: int  # answers among them
    correct: dict[str, int]  # of the "engine" and of "transformers"
    largest_difference: float | None  # of an option's log-likelihood, in nats, where options were scored


def agreement(found: EvaluationResult, expected: EvaluationResult) -> Agreement:
    """How far an engine's answers are those of transformers to the same questions, which are expected."""
    ours, theirs = ({p.index: p for p in result.predictions} for result in (found, expected))
    pairs = [(ours[index], theirs[index]) for index in sorted(ours.keys() & theirs.keys())]
    differences = [
        abs(a - b)
        for one, two in pairs
        if one.scores and two.scores
        for a, b in zip(one.scores, two.scores, strict=True)
    ]
    return {
        "samples": len(pairs),
        "equal": sum(one.prediction == two.prediction for one, two in pairs),
        "correct": {
            "engine": sum(one.correct for one, _ in pairs),
            "transformers": sum(two.correct for _, two in pairs),
        },
        "largest_difference": max(differences, default=None),
    }
