"""From a sample to a model's tensors: its clips are decoded, and its conversation is encoded with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch.utils.data import get_worker_info

from sta_adapter.compatibility.processors import Processor
from sta_adapter.data.bad_sample import BadSample
from sta_adapter.data.chat_encoding import Loaded, Prompt, encode, encode_prompt
from sta_adapter.data.chat_template import has_reasoning
from sta_adapter.data.clip_reader import ClipReader
from sta_adapter.data.conversation import Sample
from sta_adapter.data.message import Message, Part, Visual, files_of
from sta_adapter.data.sample_cache import SampleCache
from sta_adapter.data.shard_clips import unpacked
from sta_adapter.data.tensor_handover import hand_over_by_writing
from sta_adapter.data.visual_processing import Encoded
from sta_adapter.data.worker_process import POSSIBLE, Isolated, ProcessError, keep_memory
from sta_adapter.data.worker_signals import outlasts, ready_worker
from sta_adapter.errors import ConfigError, DataError
from sta_adapter.video.frame_settings import FrameSettings

FRAME_ORDERS = ("ordered", "shuffled", "reversed")
DECODE_TIMEOUT = 60.0


@dataclass
class SampleEncoder:
    """Decodes and encodes one sample after the other; the attributes are explained at `VideoDataset`."""

    processor: Processor
    frames: FrameSettings
    prompts: bool = False
    frame_order: str = "ordered"
    seed: int = 0
    on_bad_sample: str = "skip"
    max_length: int | None = None
    for_engine: bool = False
    decode_timeout: float | None = DECODE_TIMEOUT
    cache: str | Path | None = None
    reader: ClipReader = field(init=False, compare=False)
    isolated: Isolated[list[Visual]] | None = field(init=False, compare=False)
    kept: SampleCache | None = field(init=False, compare=False)
    outlasts: bool = field(init=False, compare=False, default=False)  # whether a copy in a worker stays at signals

    def __post_init__(self) -> None:
        """Refuse choices that there are not, and make what decodes."""
        if self.frame_order not in FRAME_ORDERS:
            raise ConfigError(f"frame_order is {self.frame_order!r}, expected one of {', '.join(FRAME_ORDERS)}.")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}, expected a number of at least 0.")
        if self.on_bad_sample not in ("skip", "error"):
            raise ConfigError(f"on_bad_sample is {self.on_bad_sample!r}, expected 'skip' or 'error'.")
        self.reader = ClipReader.of(self.processor, self.frames, self.frame_order, self.seed)
        self.isolated = Isolated(self.reader.read, self.decode_timeout) if self.decode_timeout and POSSIBLE else None
        self.kept = None if self.cache is None else SampleCache(self.cache, self.processor, self.reader)

    def __getstate__(self) -> dict[str, object]:
        """Workers that are not forked get a pickle."""
        return {**self.__dict__, "outlasts": outlasts()}

    def load(self, sample: Sample, index: int = 0) -> Encoded | BadSample:
        """The sample's tensors; `index` is for the shuffling of its frames.

        Raises:
            DataError: it can't be used, and `on_bad_sample` is "error".
        """
        if get_worker_info() is not None:
            ready_worker(self.outlasts)
            keep_memory()
            hand_over_by_writing()
        try:
            if sample.problem is not None:
                raise DataError(sample.problem)
            messages = sample.prompt if self.prompts else sample.messages
            thinking = has_reasoning(sample.messages)
            if not self.for_engine:
                return Loaded.of(self._once(messages, index, thinking), sample.source)
            visuals = self.visuals(messages, index)
            loaded = Loaded.of({"input_ids": self.encoded(messages, visuals, thinking)["input_ids"]}, sample.source)
            loaded.prompt = Prompt.of(self.processor, messages, visuals, thinking)
            return loaded
        except BaseException as error:  # whatever a library raises, also one written in Rust, is about this sample
            return BadSample.of(sample.source, error).skipped(self.on_bad_sample, error)

    def _once(self, messages: list[Message], index: int, thinking: bool) -> Encoded:
        """The tensors of a conversation, from the cache if it has them."""
        place = index if self.frame_order == "shuffled" else None
        key = self.kept and self.kept.key(messages, self.prompts, self.max_length, place, thinking)
        found = self.kept.read(key) if self.kept and key else None
        if found is None:
            found = self.encoded(messages, self.visuals(messages, index), thinking)
            if self.kept and key:
                self.kept.write(key, found)
        return found

    def encoded(self, messages: list[Message], visuals: list[list[Visual]], thinking: bool | None = None) -> Encoded:
        """The tensors of a conversation and its decoded clips, see `encode` and `encode_prompt`; a DataError if they are too many."""
        if self.prompts:
            found = encode_prompt(self.processor, messages, visuals, bool(thinking))
        else:
            found = encode(self.processor, messages, visuals, thinking)
        length = len(found["input_ids"])
        if self.max_length is not None and length > self.max_length:
            raise DataError(
                f"{length} tokens, more than max_length {self.max_length}; take fewer frames or fewer tokens a frame."
            )
        return found

    def visuals(self, messages: list[Message], index: int = 0) -> list[list[Visual]]:
        """The decoded clips and images of each message: all of a sample in one go, in a worker within its time limit."""
        parts = [[part for part in message["content"] if part["type"] != "text"] for message in messages]
        flat = [part for group in parts for part in group]
        read: Callable[[Sequence[Part], int], list[Visual]] = self.reader.read
        if self.isolated is not None and flat and get_worker_info() is not None:
            read = self.isolated
        with unpacked(flat) as files:
            try:
                visuals = iter(read(files, index))
            except ProcessError as error:
                raise ProcessError(
                    f"{', '.join(name for part in files for name in files_of(part))}: {error}"
                ) from error
        return [[next(visuals) for _ in group] for group in parts]
