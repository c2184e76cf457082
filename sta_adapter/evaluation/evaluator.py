"""How often a model is right: exact labels and multiple choice, with controls that take the order of frames away.

A sample with `options` is scored by the log-likelihood of each option as a complete answer (its end of turn included),
or by the option that a generated answer names; any other by greedy generation, compared with its answer but for
reasoning, markup, case, surrounding white space and a full stop.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from sta_adapter.compatibility.processors import Processor
from sta_adapter.data.bad_sample import BadSample
from sta_adapter.data.chat_template import has_reasoning
from sta_adapter.data.dataset import VideoDataset
from sta_adapter.data.fingerprint import fingerprint_processor, fingerprint_samples
from sta_adapter.data.visual_processing import Encoded
from sta_adapter.distributed import is_sharded
from sta_adapter.errors import ConfigError
from sta_adapter.evaluation.answering import Answerer, Prediction, Question, judge, option_tokens
from sta_adapter.evaluation.engine import Engine, EngineAnswerer
from sta_adapter.evaluation.eval_mode import eval_mode
from sta_adapter.evaluation.prediction_log import Kept, PredictionLog
from sta_adapter.evaluation.result import EvaluationResult
from sta_adapter.evaluation.sharding import Processes, batches, units
from sta_adapter.injection.fingerprint import fingerprint_model
from sta_adapter.video.frame_settings import FrameSettings

CHOICES = ("loglikelihood", "generate")
PREDICTION_FORMAT = 6  # raised when the same settings mean other prompts, pixels or scores than before
_PLACE = re.compile(r"(?<=\.tar), .*|(, line|, entry|(?<=^record)) \d+$")  # of a sample, behind its file's name


def evaluate(
    model: nn.Module | Engine,
    data: str | Path | VideoDataset,
    *,
    processor: Processor | None = None,
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
    stop_at_letter: bool = False,
    shared: bool = False,
) -> EvaluationResult:
    """Ask the model about every sample and compare with the answers.

    Args:
        model: a full model, with or without STA or LoRA, which is as before afterwards; or an engine, such as
            `sta_adapter.integrations.vllm.engine.VLLMEngine`.
        data: a file of samples or tar shards, see `read_samples`; or a data set (then its own settings hold).
        processor: the model's processor, where `data` is a file.
        frame_order: "ordered"; "shuffled" (decoded frames permuted, each clip in its own way) or "reversed" as
            controls.
        seed: of the shuffling.
        frame_settings: how clips are sampled, where `data` is a file.
        batch_size: samples, or options of samples, at a time.
        max_new_tokens: longest generated answer.
        choose: how a question with options is answered: by the option of the highest "loglikelihood", or "generate": by
            what the model writes, as far as it names one option by its letter or text, as published benchmarks are
            scored.
        on_bad_sample: "skip" or "error", where `data` is a file.
        num_workers: processes that decode.
        predictions_file: keeps every prediction at once; given again, what is in it isn't asked a second time, as long
            as all that it depends on is the same: the model's weights and settings, the question, the clip, sampling
            and processor.
        tag: another name or state that those predictions depend on.
        overwrite: throw away what `predictions_file` holds.
        progress: show a bar; a text says on it what is measured.
        stop_at_letter: a generated answer to a question with options ends with an option's letter and a mark behind it
            at its very start ("B.", "(B)"), so that no reasons are written behind it. What is judged is then the letter
            alone: an answer that would have been taken back later counts as it began.
        shared: each process of `torch.distributed`'s group, which all have the whole model and call this, answers a
            part of the samples; all return the outcome of one process.

    Raises:
        DataError: the data can't be read.
        STAError: another process failed.
        ConfigError: `predictions_file` belongs to another evaluation, or an argument has no effect beside the others.
    """
    _check_arguments(model, choose, stop_at_letter, shared, overwrite and predictions_file is None)
    _check_counts(batch_size=batch_size, max_new_tokens=max_new_tokens, num_workers=num_workers)
    dataset = _dataset(data, processor, frame_settings, on_bad_sample)
    dataset = dataset.as_prompts(frame_order, seed, for_engine=not isinstance(model, nn.Module))
    started = time.perf_counter()
    settings = {"tag": tag, "choose": choose, "max_new_tokens": max_new_tokens}
    settings |= {"stop_at_letter": True} if stop_at_letter else {}
    with contextlib.ExitStack() as stack:
        processes = stack.enter_context(contextlib.closing(Processes.joined() if shared else Processes()))
        if isinstance(model, nn.Module):
            stack.enter_context(eval_mode(model))
        log = stack.enter_context(PredictionLog(predictions_file, processes.rank, overwrite))
        first, *_ = processes.gather(lambda: _kept(log, settings, model, dataset))
        log.open(first)  # all of them go on from what the first one has read
        answerer: Answerer | EngineAnswerer
        if isinstance(model, nn.Module):
            answerer = Answerer(model, dataset.processor, max_new_tokens, batch_size, stop_at_letter)
        else:
            answerer = EngineAnswerer(model, dataset.processor, max_new_tokens)
        missing = [index for index in range(len(dataset)) if index not in log.done]
        shares, shown = processes.share(units(missing, batch_size)), progress if processes.rank == 0 else False

        def work() -> tuple[dict[int, Kept], dict[int, str]]:
            for batch in batches(dataset, shares, batch_size, num_workers, shown):
                _answer(answerer, choose, dataset, batch, log)
            return log.done, log.bad

        done, bad = (
            {index: value for part in parts for index, value in part.items()}
            for parts in zip(*processes.gather(work), strict=True)
        )
        processes.gather(lambda: log.finish(done, bad))
        predictions = [Prediction(**known) for known in log.done.values()]
        return EvaluationResult(predictions, list(log.bad.values()), frame_order, time.perf_counter() - started)


def _dataset(
    data: str | Path | VideoDataset, processor: Processor | None, frames: FrameSettings | None, on_bad_sample: str
) -> VideoDataset:
    """The data set, or one of the file's samples."""
    if isinstance(data, VideoDataset):
        _check_idle(data, processor, frames, on_bad_sample)
        return data
    if processor is None:
        raise ConfigError("the data is a file, so pass processor=AutoProcessor.from_pretrained(...) as well.")
    return VideoDataset(data, processor, frames=frames, on_bad_sample=on_bad_sample)


def _check_arguments(
    model: nn.Module | Engine, choose: str, stop_at_letter: bool, shared: bool, idle_overwrite: bool
) -> None:
    """Refuse what is not known, or would have no effect."""
    if choose not in CHOICES:
        raise ConfigError(f"choose is {choose!r}, expected one of {', '.join(CHOICES)}.")
    if idle_overwrite:
        raise ConfigError("overwrite has no effect without predictions_file; leave it out.")
    if stop_at_letter and choose != "generate":
        raise ConfigError(
            "stop_at_letter has no effect where options are scored; leave it out, or pass choose='generate'."
        )
    if stop_at_letter and not isinstance(model, nn.Module):
        raise ConfigError("stop_at_letter is for models; an engine stops by itself.")
    if shared and (not isinstance(model, nn.Module) or is_sharded(model.parameters())):
        raise ConfigError(
            "shared=True is for models that each process has whole; leave it out for an engine or sharded weights."
        )


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        least = 0 if name == "num_workers" else 1
        if not isinstance(count, int) or count < least:
            raise ConfigError(f"{name} is {count!r}, expected a whole number of at least {least}.")


def _check_idle(
    data: VideoDataset, processor: Processor | None, frames: FrameSettings | None, on_bad_sample: str
) -> None:
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


def _kept(
    log: PredictionLog, settings: Mapping[str, object], model: nn.Module | Engine, dataset: VideoDataset
) -> dict[int, Kept]:
    """The predictions that the file holds of this evaluation; without a file nothing is fingerprinted."""
    if log.path is None:
        return {}

    def renew(index: int, kept: Kept) -> Kept:
        return dataclasses.asdict(judge(index, dataset.samples[index], kept["prediction"], kept["scores"]))

    questions = _fingerprints(dataset, str(settings["choose"]))
    return log.read({**settings, **_settings(model, dataset)}, questions, renew)


def _settings(model: nn.Module | Engine, dataset: VideoDataset) -> dict[str, object]:
    """What every prediction depends on; what differs is named when predictions are refused."""
    return {
        "format": PREDICTION_FORMAT,
        **(fingerprint_model(model) if isinstance(model, nn.Module) else model.fingerprint()),
        "processor": fingerprint_processor(dataset.processor),
        "sampling": dataclasses.asdict(dataset.frames),
        "max_length": dataset.encoder.max_length,
        "frames": dataset.encoder.frame_order,
        "seed": dataset.encoder.seed if dataset.encoder.frame_order == "shuffled" else None,
        "data": sorted({Path(_PLACE.sub("", sample.source)).name for sample in dataset.samples}),
    }


def _fingerprints(dataset: VideoDataset, choose: str) -> list[str]:
    """Of each question: its words, its clips, the options where these are scored, and its place where that shuffles frames."""
    scored = choose == "loglikelihood"
    shuffled = dataset.encoder.frame_order == "shuffled"
    return fingerprint_samples(
        [
            (
                sample.prompt if sample.answered else [],
                [sample.options if scored else None, index if shuffled else None, has_reasoning(sample.messages)],
            )
            for index, sample in enumerate(dataset.samples)
        ]
    )


def _answer(
    answerer: Answerer | EngineAnswerer,
    choose: str,
    dataset: VideoDataset,
    batch: Sequence[tuple[int, Encoded | BadSample]],
    log: PredictionLog,
) -> None:
    """Answer the usable samples of a batch, by their numbers; all that comes of it goes into the log."""
    good: list[Question] = []
    for (index, _), item in zip(batch, answerer.collate.sort_out([item for _, item in batch]), strict=True):
        sample = dataset.samples[index]
        try:
            if not isinstance(item, BadSample):
                question = Question(index, sample, item, option_tokens(dataset.processor, sample, choose))
                answerer.require_possible(question)
                good.append(question)
                continue
        except Exception as error:
            item = BadSample.of(sample.source, error)
        log.add_bad(index, str(item.skipped(dataset.encoder.on_bad_sample)))
    for prediction in answerer.answer(good):
        log.add(prediction.index, dataclasses.asdict(prediction))
