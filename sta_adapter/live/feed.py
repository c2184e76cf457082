"""Frames that are read in a thread of their own while others are encoded; what can't be kept up with is dropped."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator

from sta_adapter.errors import VideoError
from sta_adapter.live.source import LiveFrame, LiveSource

WAIT = 0.05


class Feed:
    """Frames of a source in order, the newest `capacity` of those that wait; `dropped` counts the others.

    The rule: where encoding can't keep up, the frame that has waited longest is dropped. Of a `fast` source none is:
    the reader waits.
    """

    def __init__(self, source: LiveSource, capacity: int) -> None:
        self.source = source
        self.capacity = capacity
        self.dropped = 0
        self._waiting: deque[LiveFrame] = deque()
        self._changed = threading.Condition()
        self._ended = self._stopped = False
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._read, name="sta-adapter watch: source", daemon=True)

    def __enter__(self) -> Feed:
        self.source.heard = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join(timeout=1)

    def frames(self) -> Iterator[LiveFrame | None]:
        """The frames until the source ends; None where none has come for a moment.

        A source that broke is a VideoError behind its last frame, one that stalls is one as well.
        """
        while True:
            with self._changed:
                if not self._waiting and not self._ended:
                    self._changed.wait(WAIT)
                frame = self._waiting.popleft() if self._waiting else None
                over = self._ended and frame is None
                self._changed.notify_all()
            if over and self._error is not None:
                raise self._error
            if over:
                return
            silent = time.monotonic() - self.source.heard
            if frame is None and silent > self.source.timeout + 1:  # reading should have said so before
                raise VideoError(f"the source stalls: nothing came for {silent:.0f} seconds.")
            yield frame

    def _read(self) -> None:
        try:
            for frame in self.source.frames(lambda: self._stopped):
                self._put(frame)
        except Exception as error:  # is raised where the frames are taken
            self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _put(self, frame: LiveFrame) -> None:
        with self._changed:
            while self.source.fast and len(self._waiting) >= self.capacity and not self._stopped:
                self._changed.wait(WAIT)
                self.source.heard = time.monotonic()
            if len(self._waiting) >= self.capacity:
                self._waiting.popleft()
                self.dropped += 1
            self._waiting.append(frame)
            self._changed.notify_all()


def chunks(frames: Iterator[LiveFrame | None], size: int) -> Iterator[list[LiveFrame] | None]:
    """Frames in lists of `size`; the last, also where the source breaks, is filled up with its last frame. None is handed on."""
    held: list[LiveFrame] = []
    broke: VideoError | None = None
    try:
        for frame in frames:
            if frame is None:
                yield None
                continue
            held.append(frame)
            if len(held) == size:
                yield held
                held = []
    except VideoError as error:
        broke = error
    if held:
        yield held + held[-1:] * (size - len(held))
    if broke is not None:
        raise broke
