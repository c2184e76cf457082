"""A model with its adapter, asked about clips and looked into; behind `sta-adapter visualize` and `sta-adapter app`."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sta_adapter.adapter.hub import resolve_adapter
from sta_adapter.compatibility.processors import Processor, visual_part
from sta_adapter.data.chat_encoding import encode_prompt
from sta_adapter.data.clip_reader import ClipReader
from sta_adapter.data.collator import Collator
from sta_adapter.data.message import Message, Part, Visual
from sta_adapter.data.sample_encoder import DECODE_TIMEOUT
from sta_adapter.data.worker_process import POSSIBLE, Isolated
from sta_adapter.errors import CheckpointError, VideoError
from sta_adapter.evaluation.answering import Answerer
from sta_adapter.evaluation.eval_mode import without_adapter
from sta_adapter.injection.handle import STAHandle, get_sta
from sta_adapter.injection.inject import inject_sta
from sta_adapter.loading import frames_in_force, load_model, load_processor, with_adapter
from sta_adapter.video.frame_settings import FrameSettings
from sta_adapter.video.frame_table import read_frame_table
from sta_adapter.visualization.observation import Observation, observe
from sta_adapter.visualization.page_guard import AnswerLimit
from sta_adapter.visualization.patch_attention import BUDGET

DECODE_MEMORY = 4 << 30  # bytes that the process which decodes may take
QUESTION = "Describe the video."


@dataclasses.dataclass(frozen=True)
class LoadedClip:
    """A clip and a question, as a model takes them."""

    frames: np.ndarray  # (F, height, width, 3) uint8, what the processor got
    times: np.ndarray | None  # (F,) seconds from the file's start; None if not known
    encoded: dict[str, Tensor]  # what the processor made of both
    inputs: dict[str, Tensor]  # keyword arguments of the model, a batch of one
    rows_are_frames: bool  # whether the model gets the frames as a batch of pictures, so that STA must be told the clip
    cropped: bool  # whether the processor cuts something off the frames, or adds to them

    def step_frames(self, seen: Observation) -> tuple[np.ndarray, np.ndarray | None, str]:
        """The frame that begins each temporal step: (T, height, width, 3), times (T,), and why there is no overlay; then no frames."""
        steps = seen.attention.shape[-1]
        stride, rest = divmod(len(self.frames), steps)
        if rest or not stride:
            reason = f"the encoder made {steps} steps of {len(self.frames)} frames, so which is which can't be known."
            return self.frames[:0], None, reason
        reason = seen.no_picture
        if not reason and self.cropped:
            reason = "the processor crops or pads frames, so where its patches stand on the picture can't be known."
        frames = self.frames[:0] if reason else self.frames[::stride]
        return frames, None if self.times is None else self.times[::stride], reason


class Viewer:
    """A model with STA in it, ready to be asked about clips and looked into; several threads may share one.

    Args:
        handle: of the injected model.
        processor: the model's.
        settings: how clips are sampled.
        trained: whether an adapter was loaded; STA just put in adds nothing yet.
        longest: seconds; a longer file is refused. None takes any.
    """

    def __init__(
        self,
        handle: STAHandle,
        processor: Processor,
        settings: FrameSettings,
        *,
        trained: bool = True,
        longest: float | None = None,
    ) -> None:
        self.handle = handle
        self.processor = processor
        self.settings = settings
        self.trained = trained
        self.longest = longest
        self._decoding = threading.Lock()  # the process that decodes answers one at a time
        self._isolated = Isolated(self._decode, DECODE_TIMEOUT, DECODE_MEMORY) if POSSIBLE else None
        self._lock = threading.Lock()  # LoRA is switched off for all threads at once, and memory is needed once

    @classmethod
    def load(
        cls,
        model: str | os.PathLike[str],
        adapter: str | os.PathLike[str] | None = None,
        *,
        longest: float | None = None,
        frames: Mapping[str, Any] | None = None,
        base_model: str | None = None,
        positions: str | None = None,
        **options: Any,
    ) -> Viewer:
        """Load a model, its processor and its adapter; without an adapter, put fresh STA in.

        Args:
            model: Hub id or folder.
            adapter: Hub id or folder.
            longest: seconds; see `Viewer`.
            frames: fields of `FrameSettings` in the place of those that the adapter was trained with.
            base_model: "any" takes another base than the adapter names, if it fits.
            positions: "trained" or "transformers" (see `sta_adapter.text_positions`); None for the adapter's own.
            options: of `sta_adapter.loading.load_model`.

        Raises:
            CheckpointError: one of them isn't available, or the adapter holds no STA.
        """
        folder = None if adapter is None else resolve_adapter(adapter)
        source = {name: options[name] for name in ("revision", "trust_remote_code") if name in options}
        processor = load_processor(model, **source)
        net = with_adapter(load_model(model, **options), folder, positions=positions, base_model=base_model)
        settings = frames_in_force(model, folder, frames)
        handle = inject_sta(net) if folder is None else get_sta(net)
        if handle is None:
            raise CheckpointError(f"{str(adapter)!r} holds LoRA weights and no STA, so there is nothing to see.")
        return cls(handle, processor, settings, trained=folder is not None, longest=longest)

    def read(
        self, path: str | os.PathLike[str], question: str = QUESTION, frames: Mapping[str, Any] | None = None
    ) -> LoadedClip:
        """Read a video file and put a question to it.

        Raises:
            VideoError: it can't be read, or is too long.
            ConfigError: the fields don't fit together.
        """
        file, settings = os.fspath(path), dataclasses.replace(self.settings, **(frames or {}))
        with self._decoding:
            visual = (self._decode if self._isolated is None else self._isolated)(file, settings)
        content: list[Part] = [{"type": "video", "video": file}, {"type": "text", "text": question}]
        messages: list[Message] = [{"role": "user", "content": content}]
        encoded = encode_prompt(self.processor, messages, [[visual]])
        batch = Collator.of(self.processor, side="left")([encoded])
        device = next(self.handle.model.parameters()).device
        inputs = {name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor)}
        pixels = inputs.get("pixel_values")
        in_rows = pixels is not None and pixels.dim() == 4 and len(pixels) == len(visual.pixels)
        told = visual.metadata
        times = None if told is None else np.array(told["frames_indices"]) / told["fps"]
        return LoadedClip(visual.pixels, times, encoded, inputs, in_rows, crops(self.processor))

    def _decode(self, file: str, settings: FrameSettings) -> Visual:
        """The clip of a file; in a process of its own, where that is possible."""
        if self.longest is not None and (duration := read_frame_table(file).duration) > self.longest:
            raise VideoError(
                f"{Path(file).name} is {duration:g} s long, and at most {self.longest:g} s are allowed. Cut out the part that "
                "matters."
            )
        return ClipReader.of(self.processor, settings).read([{"type": "video", "video": file}])[0]

    def observe(self, clip: LoadedClip, limit: AnswerLimit | None = None, patch_budget: int = BUDGET) -> Observation:
        """What STA does with the clip; `patch_budget` is of `sta_adapter.visualization.observe`."""
        with self._lock, self._told(clip), self._limited(limit):
            return observe(self.handle, clip.inputs, patch_budget=patch_budget)

    @torch.no_grad()
    def answers(
        self,
        clip: LoadedClip,
        max_new_tokens: int = 64,
        limit: AnswerLimit | None = None,
        said: Callable[[str, str], None] | None = None,
    ) -> tuple[str, str]:
        """What the base model says to the clip's question, and what it says with the adapter.

        `said` is told both answers so far, as they grow; an STAError says that the `limit` ended the work.
        """
        answerer = Answerer(self.handle.model, self.processor, max_new_tokens, 1)
        found: list[str] = []

        def grown(text: str) -> None:
            if said is not None:
                base, adapted = [*found, text, ""][:2]
                said(base, adapted)

        with self._lock, self._told(clip), self._limited(limit):
            for switched in (without_adapter(self.handle.model), contextlib.nullcontext()):
                with switched:
                    found += answerer.write([clip.encoded], grown)
        return found[0], found[1]

    def _limited(self, limit: AnswerLimit | None) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if limit is None else limit.over(self.handle.model)

    def _told(self, clip: LoadedClip) -> contextlib.AbstractContextManager[None]:
        return self.handle.clips([len(clip.frames)]) if clip.rows_are_frames else contextlib.nullcontext()


def crops(processor: Processor) -> bool:
    """Whether a processor cuts something off the frames of videos, or adds to them."""
    part = visual_part(processor)
    flags = ("do_center_crop", "crop_to_patches")
    return any(getattr(part, flag, None) for flag in flags) or getattr(part, "pad_size", None) is not None
