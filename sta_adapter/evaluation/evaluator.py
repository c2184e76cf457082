"""How often a model is right: exact labels and multiple choice, with controls that take the order of frames away.

A sample with `options` is scored by the log-likelihood of each option as a complete answer (its end of turn included),
or by the option that a generated answer names; any other by greedy generation, compared with its answer but for
reasoning, markup, case, surrounding white space and a full stop.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, Subset

from sta_adapter.data.bad_sample import BadSample
from sta_adapter.data.dataset import VideoDataset
from sta_adapter.data.fingerprint import fingerprint_processor, fingerprint_samples
from sta_adapter.data.visual_processing import Encoded
from sta_adapter.data.worker_process import worker_errors
from sta_adapter.errors import ConfigError
from sta_adapter.evaluation.answering import Answerer, Prediction, Question, judge
from sta_adapter.evaluation.engine import Engine, EngineAnswerer
from sta_adapter.evaluation.eval_mode import eval_mode
from sta_adapter.evaluation.prediction_log import PredictionLog
from sta_adapter.injection.fingerprint import fingerprint_model
from sta_adapter.video.frame_settings import FrameSettings

__all__ = ["EvaluationResult", "Prediction", "Score", "evaluate", "wilson"]

CHOICES = ("loglikelihood", "generate")
PREDICTION_FORMAT = 2  # raised when the same settings mean other prompts, pixels or scores than before
EXAMPLES, LONGEST_SAID = 3, 200  # of answers that could not be read
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
class EvaluationResult:
    """Outcome of one evaluation.

    Attributes:
        predictions: one of each usable sample.
        bad_samples: samples that could not be used, with the reason; they don't count.
        frame_order: "ordered", "shuffled" or "reversed".
        seconds: how long it took.
    """

    predictions: list[Prediction]
    bad_samples: list[str] = field(default_factory=list)
    frame_order: str = "ordered"
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
        unread = [prediction for prediction in self.predictions if prediction.unmatched]
        values: dict[str, Any] = {
            "frames": self.frame_order,
            "overall": self.overall.to_dict(),
            "categories": {name: score.to_dict() for name, score in self.categories.items()},
            "unmatched": len(unread),
            "unmatched_examples": [
                {"source": p.source, "said": p.prediction[:LONGEST_SAID]} for p in unread[:EXAMPLES]
            ],
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
    model: nn.Module | Engine,
    data: str | Path | VideoDataset,
    *,
    processor: Any = None,
    frame_order: str = "ordered",
    seed: int = 0,
    frame_settings: FrameSettings | None = None,
    batch_size: int = 8,
    max_new_tokens: int = 32,
    choose: str = "loglikelihood",
    on_bad_sample: str = "skip",
    num_workers: int = 0,
    predictions_file: str | Path | None = None,
    tag: str = "",
    overwrite: bool = False,
    progress: bool | str = False,
) -> EvaluationResult:
    """Ask the model about every sample and compare with the answers.

    Args:
        model: a full model, with or without STA or LoRA, which is as before afterwards; or an engine, such as
            `sta_adapter.integrations.vllm.engine.VLLMEngine`.
        data: a file of samples or tar shards, see `read_samples`; or a data set (then its own settings hold).
        processor: the model's processor, where `data` is a file.
        frame_order: "ordered"; "shuffled" (decoded frames permuted, each clip in its own way) or "reversed" as controls.
        seed: of the shuffling.
        frame_settings: how clips are sampled, where `data` is a file.
        batch_size: samples, or options of samples, at a time.
        max_new_tokens: longest generated answer.
        choose: how a question with options is answered: by the option of the highest "loglikelihood", or "generate": by what the
            model writes, as far as it names one option by its letter or text, as published benchmarks are scored.
        on_bad_sample: "skip" or "error", where `data` is a file.
        num_workers: processes that decode.
        predictions_file: keeps every prediction at once; given again, what is in it isn't asked a second time, as long as all
            that it depends on is the same: the model's weights and settings, the question, the clip, sampling and processor.
        tag: another name or state that those predictions depend on.
        overwrite: throw away what `predictions_file` holds.
        progress: show a bar; a text says on it what is measured.

    Raises:
        DataError: the data can't be read.
        ConfigError: `predictions_file` belongs to another evaluation, or an argument has no effect beside the others.
    """
    if choose not in CHOICES:
        raise ConfigError(f"choose is {choose!r}, expected one of {', '.join(CHOICES)}.")
    if overwrite and predictions_file is None:
        raise ConfigError("overwrite has no effect without predictions_file; leave it out.")
    if isinstance(data, VideoDataset):
        _check_idle(data, processor, frame_settings, on_bad_sample)
    else:
        if processor is None:
            raise ConfigError("the data is a file, so pass processor=AutoProcessor.from_pretrained(...) as well.")
        data = VideoDataset(data, processor, frames=frame_settings, on_bad_sample=on_bad_sample)
    dataset = data.as_prompts(frame_order, seed, for_engine=not isinstance(model, nn.Module))
    started = time.perf_counter()
    settings = {"tag": tag, "choose": choose, "max_new_tokens": max_new_tokens}
    with (
        _prediction_log(predictions_file, settings, model, dataset, overwrite) as log,
        eval_mode(model) if isinstance(model, nn.Module) else contextlib.nullcontext(),
    ):
        missing = [index for index in range(len(dataset)) if index not in log.done]
        answerer = _answerer(model, dataset.processor, max_new_tokens, batch_size, choose)
        for batch in _batches(dataset, missing, batch_size, num_workers, progress):
            _answer(answerer, dataset, batch, log)
        predictions = [Prediction(**log.done[i]) for i in sorted(log.done)]
        return EvaluationResult(predictions, list(log.bad.values()), frame_order, time.perf_counter() - started)


def _check_idle(data: VideoDataset, processor: Any, frames: FrameSettings | None, on_bad_sample: str) -> None:
    """Refuse what a data set has settled already, where it is otherwise."""
    given = {
        "processor": processor not in (None, data.processor),
        "frame_settings": frames not in (None, data.frames),
        "on_bad_sample": on_bad_sample not in ("skip", data.encoder.on_bad_sample),
    }
    for name, differs in given.items():
        if differs:
            raise ConfigError(
                f"{name} has no effect on a VideoDataset, which was made with another; leave it out, or make the data set "
                "with it."
            )


def _answerer(
    model: nn.Module | Engine, processor: Any, max_new_tokens: int, batch_size: int, choose: str
) -> Answerer | EngineAnswerer:
    if isinstance(model, nn.Module):
        return Answerer(model, processor, max_new_tokens, batch_size, choose)
    return EngineAnswerer(model, processor, max_new_tokens, choose)


def _prediction_log(
    path: str | Path | None,
    settings: dict[str, Any],
    model: nn.Module | Engine,
    dataset: VideoDataset,
    overwrite: bool,
) -> PredictionLog:
    """The predictions that the file holds of this evaluation, ready for more; without a file nothing is fingerprinted."""
    if path is None:
        return PredictionLog(None, {})

    def renew(index: int, kept: dict[str, Any]) -> dict[str, Any]:
        return dataclasses.asdict(judge(index, dataset.samples[index], kept["prediction"], kept["scores"]))

    questions = _fingerprints(dataset, settings["choose"])
    return PredictionLog(path, {**settings, **_settings(model, dataset)}, questions, renew, overwrite)


def _settings(model: nn.Module | Engine, dataset: VideoDataset) -> dict[str, Any]:
    """What every prediction depends on; what differs is named when predictions are refused."""
    return {
        "format": PREDICTION_FORMAT,
        **(fingerprint_model(model) if isinstance(model, nn.Module) else model.fingerprint()),
        "processor": fingerprint_processor(dataset.processor),
        "sampling": dataclasses.asdict(dataset.frames),
        "max_length": dataset.encoder.max_length,
        "frames": dataset.encoder.frame_order,
        "seed": dataset.encoder.seed if dataset.encoder.frame_order == "shuffled" else None,
        "data": sorted({Path(sample.source.rpartition(",")[0] or sample.source).name for sample in dataset.samples}),
    }


def _fingerprints(dataset: VideoDataset, choose: str) -> list[str]:
    """Of each question: its words, its clips, the options where these are scored, and its place where that shuffles frames."""
    scored = choose == "loglikelihood"
    shuffled = dataset.encoder.frame_order == "shuffled"
    return fingerprint_samples(
        [
            (
                sample.prompt if sample.answered else [],
                [sample.options if scored else None, index if shuffled else None],
            )
            for index, sample in enumerate(dataset.samples)
        ]
    )


def _answer(
    answerer: Answerer | EngineAnswerer, dataset: VideoDataset, batch: Sequence[tuple[int, Any]], log: PredictionLog
) -> None:
    """Answer the usable samples of a batch, by their numbers; all that comes of it goes into the log."""
    good: list[Question] = []
    for (index, _), item in zip(batch, answerer.collate.sort_out([item for _, item in batch]), strict=True):
        sample = dataset.samples[index]
        try:
            if not isinstance(item, BadSample):
                answerer.require_possible(item)
                good.append(Question(index, sample, item, answerer.options(sample)))
                continue
        except Exception as error:
            item = BadSample.of(sample.source, error)
        log.add_bad(index, str(item.skipped(dataset.encoder.on_bad_sample)))
    for prediction in answerer.answer(good):
        log.add(prediction.index, dataclasses.asdict(prediction))


def _batches(
    dataset: VideoDataset, indices: Sequence[int], size: int, num_workers: int, progress: bool | str
) -> Iterator[list[tuple[int, Encoded | BadSample]]]:
    loader = DataLoader(
        Subset(dataset, indices), size, num_workers=0 if dataset.cached else num_workers, collate_fn=list
    )
    batches: Iterable[Any] = loader
    if progress:
        from tqdm.auto import tqdm

        what = progress if isinstance(progress, str) else "answers"
        batches = tqdm(loader, desc=f"{what}, {dataset.encoder.frame_order} frames", dynamic_ncols=True)
    start = 0
    with worker_errors():
        for items in batches:
            yield list(zip(indices[start : start + len(items)], items, strict=True))
            start += len(items)
