"""Frames of a video that comes as it comes: a file at its own pace, an address, a camera."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sta_adapter.errors import ConfigError, VideoError
from sta_adapter.video.frame_table import VideoNotFoundError, decoder_of, video_stream
from sta_adapter.video.packet_bytes import HiddenPackets
from sta_adapter.video.packet_scan import MADE_UP, frame_rate, time_base
from sta_adapter.video.picture import Pixels, display_matrix, rgb, upright

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

SCHEMES = ("rtsp", "rtsps", "http", "https")
REMOTE_PROTOCOLS = "http,https,tcp,tls,udp,rtp,rtsp,rtsps,crypto,hls"  # a playlist from elsewhere opens no local file
LONGEST_ADDRESS = 4096


class LiveFrame(NamedTuple):
    """One frame: seconds since the first, and its pixels (H, W, 3) uint8, upright."""

    seconds: float
    pixels: Pixels


class LiveSource:
    """A source, opened when it is iterated over.

    Args:
        name: a file, an address (rtsp, rtsps, http, https), or a camera device such as /dev/video0.
        fps: frames a second to give; those between are decoded and left out.
        timeout: seconds after which a source that sends nothing is given up.
        fast: give a file's frames as fast as they are taken, not at their own pace.

    Attributes:
        heard: when a frame was decoded last, or will be due, by `time.monotonic()`.
        broken: packets that could not be decoded.

    Raises:
        ConfigError: the address is of another kind.
        VideoNotFoundError: there is no such file or device.
    """

    def __init__(self, name: str, *, fps: float = 1.0, timeout: float = 10.0, fast: bool = False) -> None:
        self.name = name
        self.fps = fps
        self.timeout = timeout
        self.fast = fast
        self.heard = time.monotonic()
        self.broken = 0
        scheme = re.match(r"([a-zA-Z][a-zA-Z0-9+.-]*):", name)
        self.is_remote = scheme is not None and not os.path.exists(name)
        known = scheme is not None and scheme[1].lower() in SCHEMES
        if self.is_remote and (not known or len(name) > LONGEST_ADDRESS or not name.isprintable()):
            raise ConfigError(
                f"{_shown(name)} is no address that a video is watched from; expected {', '.join(SCHEMES)} with ://, a file, "
                "or a camera such as /dev/video0."
            )
        if not self.is_remote and (not os.path.exists(name) or os.path.isdir(name)):
            what = "is a folder" if os.path.isdir(name) else "is not there"
            raise VideoNotFoundError(
                f"{_shown(name)} {what}; expected a file, an address or a camera such as /dev/video0."
            )
        self.is_camera = name.startswith("/dev/video")

    def frames(self, stopped: Callable[[], bool] = lambda: False) -> Iterator[LiveFrame]:
        """The frames, as they come.

        Raises:
            VideoError: it can't be opened, holds no video, stalls, or breaks off.
        """
        import av

        due, clock, converter = 0.0, _Clock(self), av.video.reformatter.VideoReformatter()
        with self._open(av) as container:
            stream = _pictures(container)
            begins: deque[float] = deque()  # of frames to come, where the container doesn't tell when they are shown
            for index, frame in enumerate(self._decoded(av, container, stream, begins)):
                if stopped():
                    return
                self.heard = time.monotonic()
                # not frame.time: what is flushed out of a decoder has no time base in some releases of PyAV
                shown = None if frame.pts is None else float(frame.pts * time_base(stream))
                told = None if self.is_camera else begins.popleft() if begins else shown
                if told is None and not self.is_camera and not self.is_remote:
                    told = float(index / frame_rate(stream))  # a bare stream of H.264, as some cameras write
                seconds = clock.seconds(told)
                if seconds < due - 1e-6:
                    continue
                due = max(due + 1 / self.fps, seconds)
                if not self.fast:
                    clock.wait_for(seconds, stopped)
                pixels = upright(rgb(frame, converter), display_matrix(frame))
                yield LiveFrame(seconds, np.ascontiguousarray(pixels))

    def _open(self, av: ModuleType) -> InputContainer:
        options = {} if self.is_camera else {"protocol_whitelist": "file"}
        if self.is_remote:
            options = {"protocol_whitelist": REMOTE_PROTOCOLS}
            if self.name.lower().startswith("rtsp"):
                options["rtsp_transport"] = "tcp"
        kind = "v4l2" if self.is_camera else None
        if kind is not None and kind not in av.formats_available:
            raise VideoError(
                f"this PyAV ({av.__version__}) was built without {kind}, so it can't read {self.name}. Install one that was "
                "(pip install av --no-binary av, with FFmpeg's libraries on the machine), or serve the camera over RTSP."
            )
        try:
            found: InputContainer = av.open(
                self.name, format=kind, container_options=options, timeout=(self.timeout,) * 2
            )
            return found
        except av.error.ExitError as error:
            raise VideoError(f"{_shown(self.name)} did not answer within {self.timeout:g} seconds.") from error
        except (av.error.FFmpegError, OSError, ValueError) as error:
            raise VideoError(f"{_shown(self.name)} can't be opened as a video: {error}.") from error

    def _decoded(
        self, av: ModuleType, container: InputContainer, stream: VideoStream, begins: deque[float]
    ) -> Iterator[VideoFrame]:
        decoder = decoder_of(stream)
        made_up = decoder.has_b_frames and not MADE_UP.isdisjoint(container.format.name.split(","))
        hidden = HiddenPackets(decoder.name, decoder.extradata)
        decoder.thread_type = "AUTO" if self.fast else "SLICE"  # threads by frame give frames late
        broke = ""
        try:
            for packet in container.demux(stream):
                counts = made_up and packet.size and not hidden.is_hidden(packet)
                if counts and packet.dts is not None:
                    begins.append(float(packet.dts * time_base(stream)))
                try:
                    yield from decoder.decode(packet)
                except av.error.InvalidDataError:
                    self.broken += 1
                    if counts and begins:
                        begins.pop()
        except av.error.ExitError:
            broke = f"stalls: nothing came for {self.timeout:g} seconds."
        except (av.error.FFmpegError, OSError) as error:
            broke = f"ended or broke off: {error}."
        if broke:
            with contextlib.suppress(av.error.FFmpegError):
                yield from decoder.decode(None)  # what the decoder still holds
            raise VideoError(f"{_shown(self.name)} {broke}")


class _Clock:
    """A source's time beside the machine's."""

    def __init__(self, source: LiveSource) -> None:
        self.source = source
        self.began = time.monotonic()
        self.last = 0.0
        self._offset: float | None = None

    def seconds(self, told: float | None) -> float:
        """Of a frame, since the first; by the machine's clock where the source doesn't tell it.

        Time that jumps back, as when a camera begins anew, goes on from the last frame.
        """
        if told is None:
            self.last = max(self.last, time.monotonic() - self.began)
            return self.last
        if self._offset is None or told - self._offset < self.last - 1:
            self._offset = told - (self.last and self.last + 1 / self.source.fps)
        self.last = max(self.last, told - self._offset)
        return self.last

    def wait_for(self, seconds: float, stopped: Callable[[], bool]) -> None:
        """Until a frame's time has come; a live source that jumps ahead is followed at once."""
        if self.source.is_remote and seconds - (time.monotonic() - self.began) > self.source.timeout:
            self.began = time.monotonic() - seconds
        while (left := self.began + seconds - time.monotonic()) > 0 and not stopped():
            self.source.heard = time.monotonic()
            time.sleep(min(left, 0.1))


def _pictures(container: InputContainer) -> VideoStream:
    """The stream that `read_clip` reads as well; an error does not tell a password."""
    try:
        return video_stream(container)
    except VideoError as error:
        raise VideoError(masked(str(error))) from None


def masked(name: str) -> str:
    """A source's name without the password that an address may hold."""
    return re.sub(r"(://)[^/@]*@", r"\1***@", name)


def _shown(name: str) -> str:
    return ascii(masked(name))[:200]
