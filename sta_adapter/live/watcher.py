"""A model that watches: encodes frames as they come, and answers about what it has seen."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from sta_adapter.compatibility.processors import Processor
from sta_adapter.data.chat_encoding import encode_prompt
from sta_adapter.data.clip_reader import ClipReader
from sta_adapter.data.message import Visual
from sta_adapter.data.visual_processing import Encoded, temporal_patch
from sta_adapter.errors import ConfigError, VideoError
from sta_adapter.evaluation.answering import Answerer
from sta_adapter.injection.handle import STAHandle
from sta_adapter.live.feed import Feed, chunks
from sta_adapter.live.memory import FrameMemory, Step
from sta_adapter.live.source import LiveFrame, LiveSource, masked
from sta_adapter.video.frame_settings import FrameSettings
from sta_adapter.video.reader import TICKS, ClipTimes

Event = dict[str, object]


@dataclasses.dataclass(frozen=True)
class WatchSettings:
    """How to watch."""

    question: str = "What happens in the video?"  # to ask
    every: float = 10.0  # seconds of video between answers; 0 for at the end, and when asked, alone
    window: int | None = None  # of the stream; None for the adapter's, or 64
    budget: int = 4096  # visual tokens that the language model keeps
    max_new_tokens: int = 64  # longest answer
    waiting: int = 16  # frames that may wait to be encoded

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        for name, least in (("every", 0), ("budget", 1), ("max_new_tokens", 1), ("waiting", 1)):
            if not least <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} is {getattr(self, name)}; expected a number from {least}.")


class Watcher:
    """Watches one source with one model; what it saw stays when the source breaks.

    Raises:
        ConfigError: the adapter can't be streamed.
    """

    def __init__(self, handle: STAHandle, processor: Processor, frames: FrameSettings, settings: WatchSettings) -> None:
        self.handle = handle
        self.settings = settings
        window = (handle.config.window or 64) if settings.window is None else settings.window
        self.stream = handle.stream(window=window, name="watch")
        self.memory = FrameMemory(settings.budget)
        self.step = temporal_patch(processor)
        self._reader = ClipReader.of(processor, frames)
        self._processor = processor
        self._answerer = Answerer(handle.model, processor, settings.max_new_tokens, 1)
        self._size: tuple[int, int] | None = None
        self._encoding = 0.0

    def watch(self, source: LiveSource, asked: Callable[[], str | None] = lambda: None) -> Iterator[Event]:
        """Events as they happen: "start", "answer", "restart", "dropped", "error" and at last "end".

        Args:
            source: to watch.
            asked: whether somebody asks now: a question, "" for the one before, None for no.

        Raises:
            VideoError: the source broke; only after the last answer and the end were told.
        """
        question, answered, told = self.settings.question, 0.0, 0
        failed: VideoError | None = None
        windows = {"window": self.stream.window, "budget": self.settings.budget}
        yield {"event": "start", "source": masked(source.name), **windows}
        with Feed(source, max(self.settings.waiting, self.step)) as feed:
            try:
                for chunk in chunks(feed.frames(), self.step):
                    if chunk is not None:
                        yield from self._take(chunk)
                    wanted = asked()
                    question = wanted or question
                    due = self.settings.every and self._now - answered >= self.settings.every
                    if self.memory.steps and (wanted is not None or due):
                        answered = self._now
                        yield self._answer(question)
                    if feed.dropped > told:
                        told = feed.dropped
                        yield {"event": "dropped", "seconds": self._now, "frames": told, "step_seconds": self._encoding}
            except VideoError as error:
                failed = error
                yield {"event": "error", "seconds": self._now, "error": str(error)}
            if self.memory.steps:
                yield self._answer(question)
            lost = {"dropped": feed.dropped, **self._seen(), "broken": source.broken}
            yield {"event": "end", "seconds": self._now, **lost}
        if failed is not None:
            raise failed
        if not self.stream.frames:
            raise VideoError("the source ended before its first frame.")

    @property
    def _now(self) -> float:
        """Seconds of video seen."""
        return self.memory.steps[-1].seconds[-1] if self.memory.steps else 0.0

    def _seen(self) -> Event:
        kept = {"kept": len(self.memory.steps), "tokens": self.memory.tokens, "thinned": self.memory.thinned}
        return {"steps": self.stream.frames, **kept, "bytes": self.stream.bytes}

    def _take(self, chunk: list[LiveFrame]) -> Iterator[Event]:
        """Encode the next frames; where they have another size than those before, all begins anew."""
        began = time.perf_counter()
        limits = self._reader.pixel_limits({})
        pixels = [self._reader.fit(frame.pixels[None], *limits)[0] for frame in chunk]
        sizes = {picture.shape[:2] for picture in pixels}
        if (self._size is not None and sizes != {self._size}) or len(sizes) > 1:
            yield {"event": "restart", "seconds": chunk[-1].seconds, "reason": f"frames are now {sorted(sizes)} pixels"}
            pixels = [picture if picture.shape == pixels[-1].shape else pixels[-1] for picture in pixels]
            self.stream.reset()
            self.memory.clear()
        self._size = pixels[-1].shape[:2]
        seconds = tuple(frame.seconds for frame in chunk)
        prompt = self._prompt(np.stack(pixels), seconds, self.settings.question)
        output = self._encode(prompt)
        self.memory.add(Step(seconds, output, self._visual_tokens(prompt)))
        self._encoding = time.perf_counter() - began

    def _prompt(self, pixels: NDArray[np.uint8], seconds: tuple[float, ...], question: str) -> Encoded:
        """The question behind a clip of these frames (T, H, W, 3)."""
        metadata: ClipTimes = {
            "total_num_frames": round(seconds[-1] * TICKS) + 1,
            "fps": float(TICKS),
            "width": pixels.shape[2],
            "height": pixels.shape[1],
            "duration": seconds[-1],
            "video_backend": "pyav",
            "frames_indices": [round(moment * TICKS) for moment in seconds],
        }
        content = [{"type": "video", "video": "live"}, {"type": "text", "text": question}]
        visual = Visual("video", pixels, metadata, self._reader.sizes_frames)
        return encode_prompt(self._processor, [{"role": "user", "content": content}], [[visual]])

    def _encode(self, prompt: Encoded) -> object:
        """The encoder's output for a prompt's frames; the language model doesn't run."""
        found: list[object] = []

        def take(module: nn.Module, args: object, output: object) -> None:
            found.append(output)
            raise _EncodedError

        hook = self.handle.encoder.register_forward_hook(take)
        try:
            batch, told = self._answerer.batch([prompt])
            with self.stream, told:
                self.handle.model(**batch)
        except _EncodedError:
            return found[0]
        finally:
            hook.remove()
        raise ConfigError("the model did not call its vision encoder for a clip; this model can't be watched with.")

    def _answer(self, question: str) -> Event:
        """Ask about the steps that are kept."""
        began = time.perf_counter()
        seconds = tuple(moment for step in self.memory.steps for moment in step.seconds)
        height, width = self._size or (0, 0)
        prompt = self._prompt(np.zeros((len(seconds), height, width, 3), np.uint8), seconds, question)
        with torch.no_grad(), self.handle.disabled(), _gives(self.handle.encoder, self.memory.output()):
            said = self._answerer.write([prompt])[0]
        asked = {"event": "answer", "seconds": self._now, "question": question, "answer": said}
        return {**asked, "took": time.perf_counter() - began, **self._seen()}

    def _visual_tokens(self, prompt: Encoded) -> int:
        ids = prompt["input_ids"].tolist()
        config = self.handle.model.config
        names = ("video_token_id", "video_token_index", "image_token_id", "image_token_index")
        known = {getattr(config, name, None) for name in names} - {None}
        return sum(token in known for token in ids) or len(ids)


class _EncodedError(Exception):
    """The encoder has run; nothing else of the model needs to."""


@contextlib.contextmanager
def _gives(module: nn.Module, output: object) -> Iterator[None]:
    """A module that gives an output without computing."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if before is not None:
            module.__dict__["forward"] = before
