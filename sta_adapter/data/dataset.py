"""Samples on disk to batches for a model.

Public: `FrameSettings`, `VideoDataset`; and from their own modules `Collator`, `Sample`, `BadSample`, `read_samples`. Clips are
decoded by `sta_adapter.video.read_clip` and reach the processor as arrays, so the model sees exactly the frames that were
decoded, on every version of transformers. A sample that can't be used is a `BadSample` in the data set: counted and logged by
the training, or an error if asked for, but never replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset, get_worker_info

from sta_adapter.data.chat_encoding import Encoded, Prompt, Visual, encode, encode_prompt
from sta_adapter.data.clip_reader import ClipReader, FrameSettings
from sta_adapter.data.collator import Collator, Loaded
from sta_adapter.data.fingerprint import fingerprint, fingerprint_samples
from sta_adapter.data.samples import BadSample, Sample, open_samples, read_samples
from sta_adapter.data.shard_clips import unpacked
from sta_adapter.data.worker_process import POSSIBLE, Isolated, ProcessError
from sta_adapter.errors import ConfigError, DataError
from sta_adapter.video.resize import fit_frames

__all__ = ["BadSample", "Collator", "FrameSettings", "Sample", "VideoDataset", "fit_frames", "read_samples"]

FRAME_ORDERS = ("ordered", "shuffled", "reversed")
DECODE_TIMEOUT = 60.0


class VideoDataset(Dataset):
    """Samples of a file or of tar shards, decoded and encoded when asked for.

    Args:
        samples: the file or shards, see `open_samples`, or samples read before.
        processor: the model's processor.
        frames: how clips are sampled.
        prompts: leave the last answer out, for evaluation.
        frame_order: "ordered"; "shuffled" and "reversed" are controls that take the order of time away.
        seed: of the shuffling, which is the same in every run.
        on_bad_sample: "skip" gives a `BadSample` in place of an unusable one, "error" raises.
        max_length: samples of more tokens are bad samples.
        cache: keep what was encoded in memory, so that later epochs and runs needn't decode.
        for_engine: give each sample's token ids and its `Prompt`, as engines take it, in the place of tensors for a model.
        decode_timeout: seconds in which a DataLoader's worker must have decoded a sample, else it is a bad one; None for no
            limit. Without workers (num_workers=0), and on other systems than Linux, there is none.
    """

    def __init__(
        self,
        samples: str | Path | Sequence[Sample],
        processor: Any,
        *,
        frames: FrameSettings | None = None,
        prompts: bool = False,
        frame_order: str = "ordered",
        seed: int = 0,
        on_bad_sample: str = "skip",
        max_length: int | None = None,
        cache: bool = False,
        for_engine: bool = False,
        decode_timeout: float | None = DECODE_TIMEOUT,
    ) -> None:
        if frame_order not in FRAME_ORDERS:
            raise ConfigError(f"frame_order is {frame_order!r}, expected one of {', '.join(FRAME_ORDERS)}.")
        if on_bad_sample not in ("skip", "error"):
            raise ConfigError(f"on_bad_sample is {on_bad_sample!r}, expected 'skip' or 'error'.")
        if isinstance(samples, (str, Path)):
            samples = open_samples(samples, on_bad_sample=on_bad_sample)
        self.samples = list(samples)
        self.processor = processor
        self.frames = frames or FrameSettings()
        self.prompts = prompts
        self.frame_order = frame_order
        self.seed = seed
        self.on_bad_sample = on_bad_sample
        self.max_length = max_length
        self.for_engine = for_engine
        self.decode_timeout = decode_timeout
        self.reader = ClipReader.of(processor, self.frames, frame_order, seed)
        self._isolated = Isolated(self.reader.read, decode_timeout) if decode_timeout and POSSIBLE else None
        self._cache: dict[int, Encoded | BadSample] | None = {} if cache else None
        self._prompts: dict[tuple[str, int, bool], VideoDataset] = {}

    @property
    def cached(self) -> bool:
        """Whether encoded samples are kept in this process's memory."""
        return self._cache is not None

    def __len__(self) -> int:
        """Number of samples, bad ones included."""
        return len(self.samples)

    def __getitem__(self, index: int) -> Encoded | BadSample:
        """Tensors of one sample, see `sta_adapter.data.chat_encoding.encode`."""
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        item = self.load(self.samples[index], index)
        if self._cache is not None:
            self._cache[index] = item
        return item

    def as_prompts(self, frame_order: str = "ordered", seed: int = 0, *, for_engine: bool = False) -> VideoDataset:
        """The same samples without their last answers, for evaluation; made once if this data set keeps what it encodes."""
        wanted = (frame_order, seed, for_engine)
        if self.prompts and (self.frame_order, self.seed, self.for_engine) == wanted:
            return self
        made = self._prompts.get(wanted)
        if made is None:
            made = VideoDataset(
                self.samples,
                self.processor,
                frames=self.frames,
                prompts=True,
                frame_order=frame_order,
                seed=seed,
                on_bad_sample=self.on_bad_sample,
                max_length=self.max_length,
                cache=self.cached,
                for_engine=for_engine,
                decode_timeout=self.decode_timeout,
            )
        if self.cached:
            self._prompts[wanted] = made
        return made

    def digest(self) -> str:
        """Fingerprint of the samples, their settings and their clips' contents (not of the folders that these lie in)."""
        return fingerprint(fingerprint_samples([(sample.messages, None) for sample in self.samples]))

    def load(self, sample: Sample, index: int = 0) -> Encoded | BadSample:
        """Decode and encode a sample, which need not be one of the data set's; `index` is for the shuffling of its frames."""
        try:
            return self._encode(sample, index)
        except BaseException as error:  # whatever a library raises, also one written in Rust, is about this sample
            bad = BadSample.of(sample.source, error)
            if self.on_bad_sample == "error":
                raise DataError(f"{bad.source}: {bad.reason}") from error
            return bad

    def _encode(self, sample: Sample, index: int) -> Loaded:
        if sample.problem is not None:
            raise DataError(sample.problem)
        messages = sample.prompt if self.prompts else sample.messages
        visuals = self.visuals(messages, index)
        encoded = (encode_prompt if self.prompts else encode)(self.processor, messages, visuals)
        length = len(encoded["input_ids"])
        if self.max_length is not None and length > self.max_length:
            raise DataError(
                f"{length} tokens, more than max_length {self.max_length}; take fewer frames or fewer tokens a frame."
            )
        if not self.for_engine:
            return Loaded.of(encoded, sample.source)
        loaded = Loaded.of({"input_ids": encoded["input_ids"]}, sample.source)
        loaded.prompt = Prompt.of(self.processor, messages, visuals)
        return loaded

    def visuals(self, messages: list[dict[str, Any]], index: int) -> list[list[Visual]]:
        """The decoded clips and images of each message: all of a sample in one go, in a worker within its time limit."""
        parts = [[part for part in message["content"] if part["type"] != "text"] for message in messages]
        flat = [part for group in parts for part in group]
        read: Callable[..., list[Visual]] = self.reader.read
        if self._isolated is not None and flat and get_worker_info() is not None:
            read = self._isolated
        with unpacked(flat) as files:
            try:
                visuals = iter(read(files, index))
            except ProcessError as error:
                raise ProcessError(f"{', '.join(part[part['type']] for part in files)}: {error}") from error
        return [[next(visuals) for _ in group] for group in parts]
