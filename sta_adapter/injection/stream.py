"""Stream: an encoder that goes on where its last call ended."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

import torch

from sta_adapter.attention.layout import ClipLayout
from sta_adapter.attention.module import TemporalAttention
from sta_adapter.config import STAConfig, checked_window
from sta_adapter.errors import ConfigError, LayoutError, StreamError
from sta_adapter.injection.backbone import Backbone, EncoderCall
from sta_adapter.injection.stream_state import Chunk, FrameShape, SavedStream, StreamCall, StreamState, restored, saved

if TYPE_CHECKING:
    from sta_adapter.injection.state import Injection


class Stream:
    """Frames that come piece by piece; made by `handle.stream(...)`.

    Inside of its `with` block, in this thread, each call of the encoder gets the next frames, and computes what one
    call with all frames since the first would have: attention looks back over the window, and the frame index goes on.
    There are no gradients inside. The block may be left and entered again; what was seen stays until `reset`.

    Attributes:
        name: for messages.
        window: frames that a frame attends to, itself among them.
    """

    def __init__(
        self, injection: Injection, modules: Callable[[], dict[int, TemporalAttention]], window: int, name: str
    ) -> None:
        self.name = name
        self.window = window
        self.injection = injection
        self._modules = modules
        self._state = StreamState(window)
        self._lock = threading.RLock()
        self._contexts: list[contextlib.AbstractContextManager[None]] = []

    def __repr__(self) -> str:
        return f"Stream({self.name!r}, window={self.window}, frames={self.frames}, bytes={self.bytes:,})"

    @property
    def frames(self) -> int:
        """Frames seen since the start, or since `reset`; where the encoder merges frames, its temporal steps."""
        return self._state.frames

    @property
    def bytes(self) -> int:
        """Memory of what is kept: 2 x heads x head size x positions x window x blocks x bytes of a number; 0 at the start."""
        return self._state.bytes

    def reset(self) -> None:
        """Forget all frames: the next one is the first.

        Raises:
            StreamError: another thread is using the stream.
        """
        with self.held():
            self._state = StreamState(self.window)

    def state_dict(self) -> SavedStream:
        """All that the stream knows, as numbers and tensors of its own, for `torch.save`.

        Raises:
            StreamError: another thread is using the stream.
        """
        with self.held():
            return saved(self._state, self.injection.spec.name)

    def load_state_dict(self, state: SavedStream) -> None:
        """Go on where a stream was when `state_dict` was called, with the same adapter.

        Raises:
            StreamError: another thread is using the stream, or the state doesn't fit: all differences are named, and
                the stream is as before.
        """
        with self.held():
            self._state = restored(state, self.window, self.injection.spec.name, self._modules())

    def __enter__(self) -> Stream:
        self._modules()  # an error, where STA has been removed
        context = entered([self])
        context.__enter__()
        self._contexts.append(context)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._contexts.pop().__exit__(kind, error, trace)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep other threads out.

        Raises:
            StreamError: one is in.
        """
        if not self._lock.acquire(blocking=False):
            raise StreamError(
                f"stream {self.name!r} is in use by another thread. Give each thread a stream of its own, by "
                "handle.stream(...), or leave the other thread's `with` block first."
            )
        try:
            yield
        finally:
            self._lock.release()


@contextlib.contextmanager
def entered(streams: Sequence[Stream]) -> Iterator[None]:
    """Context in which each call of the encoder, in this thread, brings a chunk of each of these streams, in order."""
    (injection,) = {stream.injection for stream in streams}
    with contextlib.ExitStack() as stack:
        for stream in streams:
            stack.enter_context(stream.held())
        stack.enter_context(torch.no_grad())
        stack.enter_context(injection.held_streams.holding(streams))
        yield


def check_streaming(config: STAConfig, spec: Backbone, window: int | None) -> int:
    """The window of a stream, by default that of the adapter.

    Raises:
        ConfigError: the adapter or its encoder can't go on frame by frame, or the window doesn't fit.
    """
    if not spec.separate_frames:
        raise ConfigError(
            f"the encoder of backbone {spec.name!r} is not known to compute each frame by itself: with attention or an "
            "embedding over time of its own it needs the whole clip, so it can't go on frame by frame. Streams work with "
            "image towers and with Qwen's (a plug-in for one declares Backbone(separate_frames=True))."
        )
    if not config.causal:
        raise ConfigError(
            "a stream needs an adapter whose frames look back only, and this one was made with causal=False: its frames "
            "attend to later ones. Train one with STAConfig(causal=True)."
        )
    if config.token_order != "clip":
        raise ConfigError(
            f"token_order={config.token_order!r} mixes up frames that a stream has not seen yet; it needs token_order='clip'."
        )
    if window is None and config.window is None:
        raise ConfigError(
            "this adapter looks back over all frames; say how many a stream keeps: handle.stream(window=64)."
        )
    found = checked_window(config.window if window is None else window)
    if config.window is not None and found > config.window:
        raise ConfigError(f"window={found}: this adapter looks back over {config.window} frames; leave window out.")
    return found


def continue_streams(
    streams: Sequence[Stream], call: EncoderCall, layout: ClipLayout, modules: Mapping[int, TemporalAttention]
) -> ClipLayout:
    """The layout of a call of the encoder as the next frames of streams.

    Raises:
        LayoutError: the call has not one clip for each stream, or frames of another size than those before.
        StreamError: gradients are enabled.
    """
    if torch.is_grad_enabled():
        raise StreamError(
            "a stream keeps no graph of earlier frames, so there is no gradient through it: leave torch.enable_grad() out, "
            "or train on whole clips with STAConfig(causal=True, window=...)."
        )
    if len(layout.clips) != len(streams):
        raise LayoutError(
            f"the encoder got {len(layout.clips)} clips, (frames, positions) = {list(layout.clips)}, for "
            f"{len(streams)} stream{'s' if len(streams) > 1 else ''} ({', '.join(s.name for s in streams)}): expected one of "
            "each stream, in order. For several streams in one call use handle.streams(...); frames that come as a "
            "batch are told apart by handle.clips([...]). Leave the stream's `with` block for other clips and pictures."
        )
    spec = streams[0].injection.spec
    grids = spec.positions(call, layout) if spec.positions is not None else [None] * len(streams)
    chunks = []
    for stream, (frames, positions), grid in zip(streams, layout.clips, grids, strict=True):
        shape: FrameShape = (positions, None if grid is None else tuple(grid.shape))
        chunks.append(Chunk(stream.name, stream._state, frames, shape))
    past = StreamCall(chunks, {module: i for i, module in modules.items()})
    return ClipLayout(layout.clips, prefix=layout.prefix, suffix=layout.suffix, rows=layout.rows, past=past)
