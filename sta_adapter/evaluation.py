"""How often a model is right: exact labels and multiple choice, with controls that take the order of frames away.

Public: `evaluate(model, data, ...)` -> `EvaluationResult`, `Score`, `Prediction`, `wilson`. A sample with `options` is scored by the log-likelihood of
each option as a complete answer (its end of turn included); any other by greedy generation, compared with its answer
but for case, surrounding white space and a full stop.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sta_adapter.data import BadSample, Collator, FrameSettings, Sample, VideoDataset
from sta_adapter.encoding import Encoded, encode_answer
from sta_adapter.errors import ConfigError
from sta_adapter.predictions import PredictionLog

__all__ = ["EvaluationResult", "Prediction", "Score", "evaluate", "wilson"]

Z95 = 1.959963984540054  # two-sided 95 %


@dataclass(frozen=True)
class Score:
    """A share of right answers, with its 95 % Wilson interval."""

    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        """Right answers among all; 0 where there are none."""
        return self.correct / self.total if self.total else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the accuracy."""
        return wilson(self.correct, self.total)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        low, high = self.interval
        return {"accuracy": self.accuracy, "low": low, "high": high, "correct": self.correct, "total": self.total}


@dataclass(frozen=True)
class Prediction:
    """What the model said about one sample; `scores` are the options' log-likelihoods."""

    index: int
    source: str
    category: str | None
    answer: str
    prediction: str
    correct: bool
    scores: list[float] | None = None


@dataclass(frozen=True)
class EvaluationResult:
    """Outcome of one evaluation.

    Attributes:
        predictions: one of each usable sample.
        bad_samples: samples that could not be used, with the reason; they don't count.
        frames: "ordered", "shuffled" or "reversed".
        seconds: how long it took.
    """

    predictions: list[Prediction]
    bad_samples: list[str] = field(default_factory=list)
    frames: str = "ordered"
    seconds: float = 0.0

    @property
    def overall(self) -> Score:
        """Over all samples."""
        return _score(self.predictions)

    @property
    def accuracy(self) -> float:
        """Over all samples."""
        return self.overall.accuracy

    @property
    def categories(self) -> dict[str, Score]:
        """By the samples' category, in the order in which they came."""
        names = dict.fromkeys(p.category for p in self.predictions if p.category is not None)
        return {name: _score([p for p in self.predictions if p.category == name]) for name in names}

    def to_dict(self, *, predictions: bool = True) -> dict[str, Any]:
        """Plain values, for JSON."""
        values: dict[str, Any] = {
            "frames": self.frames,
            "overall": self.overall.to_dict(),
            "categories": {name: score.to_dict() for name, score in self.categories.items()},
            "bad_samples": self.bad_samples,
            "seconds": round(self.seconds, 3),
        }
        if predictions:
            values["predictions"] = [dataclasses.asdict(prediction) for prediction in self.predictions]
        return values


def wilson(correct: int, total: int, z: float = Z95) -> tuple[float, float]:
    """The Wilson interval of a share; (0, 1) where nothing was counted."""
    if total == 0:
        return 0.0, 1.0
    share, spread = correct / total, z * z / total
    middle = share + spread / 2
    half = z * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    low = 0.0 if correct == 0 else (middle - half) / (1 + spread)  # exactly, where rounding would miss it
    return low, 1.0 if correct == total else (middle + half) / (1 + spread)


def _score(predictions: Iterable[Prediction]) -> Score:
    right = [prediction.correct for prediction in predictions]
    return Score(sum(right), len(right))


def evaluate(
    model: nn.Module,
    data: str | Path | VideoDataset,
    *,
    processor: Any = None,
    frames: str = "ordered",
    seed: int = 0,
    frame_settings: FrameSettings | None = None,
    batch_size: int = 8,
    max_new_tokens: int = 32,
    on_bad_sample: str = "skip",
    num_workers: int = 0,
    predictions_file: str | Path | None = None,
    tag: str = "",
    progress: bool = False,
) -> EvaluationResult:
    """Ask the model about every sample and compare with the answers.

    Args:
        model: a full model, with or without STA or LoRA; it is as before afterwards.
        data: a JSON Lines file, or a data set (then its own settings hold).
        processor: the model's processor, where `data` is a file.
        frames: "ordered"; "shuffled" (decoded frames permuted, each clip in its own way) or "reversed" as controls.
        seed: of the shuffling.
        frame_settings: how clips are sampled, where `data` is a file.
        batch_size: samples, or options of samples, at a time.
        max_new_tokens: longest generated answer.
        on_bad_sample: "skip" or "error", where `data` is a file.
        num_workers: processes that decode.
        predictions_file: keeps every prediction at once; given again, samples in it aren't asked a second time.
        tag: names the model in that file, so that another one's predictions aren't taken for it.
        progress: show a bar.

    Raises:
        DataError: the data can't be read.
        ConfigError: `predictions_file` belongs to another evaluation.
    """
    if isinstance(data, VideoDataset):
        dataset = data.as_prompts(frames, seed)
    elif processor is None:
        raise ConfigError("the data is a file, so pass processor=AutoProcessor.from_pretrained(...) as well.")
    else:
        given = VideoDataset(data, processor, frames=frame_settings, on_bad_sample=on_bad_sample)
        dataset = given.as_prompts(frames, seed)
    settings = {
        "frames": frames,
        "seed": seed,
        "max_new_tokens": max_new_tokens,
        "sampling": dataclasses.asdict(dataset.frames),
        "samples": dataset.digest(),
        "tag": tag,
    }
    started = time.perf_counter()
    with PredictionLog(predictions_file, settings) as log, _asking(model):
        missing = [index for index in range(len(dataset)) if index not in log.done]
        asked = _Questioner(model, dataset.processor, max_new_tokens, batch_size)
        for batch in _batches(dataset, missing, batch_size, num_workers, progress):
            good = [(i, item) for i, item in batch if not isinstance(item, BadSample)]
            for index, item in batch:
                if isinstance(item, BadSample):
                    log.add_bad(index, f"{item.source}: {item.reason}")
            for prediction in asked.answer([(i, dataset.samples[i], item) for i, item in good]):
                log.add(prediction.index, dataclasses.asdict(prediction))
        predictions = [Prediction(**log.done[i]) for i in sorted(log.done)]
        return EvaluationResult(predictions, list(log.bad.values()), frames, time.perf_counter() - started)


def _batches(
    dataset: VideoDataset, indices: Sequence[int], size: int, num_workers: int, progress: bool
) -> Iterator[list[tuple[int, Encoded | BadSample]]]:
    from torch.utils.data import DataLoader, Subset

    loader = DataLoader(
        Subset(dataset, indices), size, num_workers=0 if dataset.cached else num_workers, collate_fn=list
    )
    batches: Iterable[Any] = loader
    if progress:
        from tqdm.auto import tqdm

        batches = tqdm(loader, desc=f"evaluate ({dataset.frame_order})", dynamic_ncols=True)
    start = 0
    for items in batches:
        yield list(zip(indices[start : start + len(items)], items, strict=True))
        start += len(items)


@contextlib.contextmanager
def _asking(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


Question = tuple[int, Sample, Encoded]


class _Questioner:
    """Answers of a model to encoded prompts, in batches padded on the left."""

    def __init__(self, model: Any, processor: Any, max_new_tokens: int, batch_size: int) -> None:
        self.model = model
        self.processor = processor
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        self.collate = Collator.of(processor, side="left")
        self.device = next(model.parameters()).device

    def answer(self, questions: list[Question]) -> Iterator[Prediction]:
        """Predictions, those of open questions first."""
        open_questions = [q for q in questions if q[1].options is None]
        if open_questions:
            yield from self._generate(open_questions)
        for question in questions:
            if question[1].options is not None:
                yield self._choose(question)

    def _batch(self, items: list[Encoded]) -> dict[str, torch.Tensor]:
        batch = self.collate(items)
        return {key: value.to(self.device) for key, value in batch.items() if isinstance(value, torch.Tensor)}

    def _generate(self, questions: list[Question]) -> Iterator[Prediction]:
        batch = self._batch([item for _, _, item in questions])
        tokenizer, own = self.processor.tokenizer, self.model.generation_config.eos_token_id
        ends = [own] if isinstance(own, int) else list(own or [])
        out = self.model.generate(
            **batch,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            repetition_penalty=1.0,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=sorted({*ends, tokenizer.eos_token_id} - {None}) or None,
            pad_token_id=self.collate.pad_id,
        )
        said = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for (index, sample, _), text in zip(questions, said, strict=True):
            right = _plain(text) == _plain(sample.answer)
            yield Prediction(index, sample.source, sample.category, sample.answer, text.strip(), right)

    def _choose(self, question: Question) -> Prediction:
        """The option that is likeliest as a complete answer."""
        index, sample, item = question
        options = sample.options or []
        scores: list[float] = []
        answers = [encode_answer(self.processor, sample.prompt, option) for option in options]
        for start in range(0, len(options), self.batch_size):
            scores += self._log_likelihoods(item, answers[start : start + self.batch_size])
        best = options[max(range(len(options)), key=scores.__getitem__)]
        return Prediction(index, sample.source, sample.category, sample.answer, best, best == sample.answer, scores)

    def _log_likelihoods(self, prompt: Encoded, answers: list[torch.Tensor]) -> list[float]:
        rows = [_extended(prompt, answer) for answer in answers]
        batch, longest = self._batch(rows), max(map(len, answers))
        last = {}
        parameters = inspect.signature(self.model.forward).parameters
        base = getattr(self.model, "get_base_model", lambda: self.model)()
        if "logits_to_keep" in {*parameters, *inspect.signature(base.forward).parameters}:
            last["logits_to_keep"] = longest + 1
        logits = self.model(**batch, **last).logits[:, -longest - 1 : -1].float()
        targets = batch["input_ids"][:, -longest:]
        chosen = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
        return [float(row[longest - len(answer) :].sum()) for row, answer in zip(chosen, answers, strict=True)]


def _extended(prompt: Encoded, answer: torch.Tensor) -> Encoded:
    """A prompt with an answer's tokens behind it."""
    longer = {**prompt, "input_ids": torch.cat([prompt["input_ids"], answer])}
    for key in ("mm_token_type_ids", "token_type_ids"):
        if key in longer:
            longer[key] = torch.cat([prompt[key], torch.zeros_like(answer)])
    return longer


def _plain(text: str) -> str:
    return " ".join(text.split()).removesuffix(".").casefold()
