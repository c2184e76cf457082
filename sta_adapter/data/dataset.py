"""A data set of video samples for a model.

Clips are decoded by `sta_adapter.video.read_clip` and reach the processor as arrays, so the model sees exactly the
frames that were decoded, on every version of transformers. A sample that can't be used is a `BadSample` in the data
set: counted and logged by the training, or an error if asked for, but never replaced.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch.utils.data import Dataset

from sta_adapter.compatibility.processors import Processor
from sta_adapter.data.bad_sample import BadSample
from sta_adapter.data.conversation import Sample
from sta_adapter.data.fingerprint import fingerprint, fingerprint_samples
from sta_adapter.data.message import Record
from sta_adapter.data.sample_encoder import DECODE_TIMEOUT, SampleEncoder
from sta_adapter.data.samples import given_samples, open_samples
from sta_adapter.data.visual_processing import Encoded
from sta_adapter.video.frame_settings import FrameSettings


class VideoDataset(Dataset[Encoded | BadSample]):
    """Samples of a file or of tar shards, decoded and encoded when asked for.

    Args:
        samples: the file or shards, see `open_samples`; or a list of records, as a file's lines are, or of samples read
            before.
        processor: the model's processor.
        frames: how clips are sampled.
        prompts: leave the last answer out, for evaluation.
        frame_order: "ordered"; "shuffled" and "reversed" are controls that take the order of time away.
        seed: of the shuffling, which is the same in every run.
        on_bad_sample: "skip" gives a `BadSample` in place of an unusable one, "error" raises.
        max_length: samples of more tokens are bad samples.
        cache: True keeps what was encoded in memory, so that later epochs needn't decode; a folder keeps it on disk,
            for later runs and other processes as well, see `sta_adapter.data.sample_cache`. Engines' prompts are not
            kept there.
        for_engine: give each sample's token ids and its `Prompt`, as engines take it, in the place of tensors for a
            model.
        decode_timeout: seconds in which a DataLoader's worker must have decoded a sample, else it is a bad one; None
            for no limit. Without workers (num_workers=0), and on other systems than Linux, there is none.
    """

    def __init__(
        self,
        samples: str | Path | Sequence[Sample | Record],
        processor: Processor,
        *,
        frames: FrameSettings | None = None,
        prompts: bool = False,
        frame_order: str = "ordered",
        seed: int = 0,
        on_bad_sample: str = "skip",
        max_length: int | None = None,
        cache: bool | str | Path = False,
        for_engine: bool = False,
        decode_timeout: float | None = DECODE_TIMEOUT,
    ) -> None:
        if isinstance(samples, (str, Path)):
            self.samples = open_samples(samples, on_bad_sample=on_bad_sample)
        else:
            self.samples = given_samples(samples, on_bad_sample=on_bad_sample)
        self.processor = processor
        self.frames = frames or FrameSettings()
        folder = None if isinstance(cache, bool) else cache
        how = (prompts, frame_order, seed, on_bad_sample, max_length, for_engine, decode_timeout, folder)
        self.encoder = SampleEncoder(processor, self.frames, *how)
        self._cache: dict[int, Encoded | BadSample] | None = {} if cache is True else None
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
        item = self.encoder.load(self.samples[index], index)
        if self._cache is not None:
            self._cache[index] = item
        return item

    def as_prompts(self, frame_order: str = "ordered", seed: int = 0, *, for_engine: bool = False) -> VideoDataset:
        """The same samples without their last answers, for evaluation; made once if this data set keeps what it encodes."""
        asked = replace(self.encoder, prompts=True, frame_order=frame_order, seed=seed, for_engine=for_engine)
        if asked == self.encoder:
            return self
        wanted = (frame_order, seed, for_engine)
        made = self._prompts.get(wanted)
        if made is None:
            made = copy.copy(self)
            made.encoder = asked
            made._cache, made._prompts = {} if self.cached else None, {}
        if self.cached:
            self._prompts[wanted] = made
        return made

    def digest(self) -> str:
        """Fingerprint of the samples, their settings and their clips' contents (not of the folders that these lie in)."""
        return fingerprint(fingerprint_samples([(sample.messages, None) for sample in self.samples]))
