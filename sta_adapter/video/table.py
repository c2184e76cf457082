"""The presentation timestamps of a video file, read from its packets with PyAV, and what else decoders need to know."""

import errno
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sta_adapter.errors import ConfigError, MissingExtraError, VideoError
from sta_adapter.video.keyframes import PacketRow, begins_afresh, keys_are_fresh

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream


UNTURNED = (1 << 16, 0, 0, 1 << 16)
"""The display matrix of pictures shown as they are stored, in FFmpeg's 16.16 fixed point."""


class VideoNotFoundError(VideoError, FileNotFoundError):
    """There is no video file of that name."""


@dataclass(frozen=True)
class FrameTable:
    """The frames of a file in the order in which they are shown. F is their number.

    `pts` (F,) are the container's own timestamps, `times` (F,) seconds from the first frame, `keys` (F,) says where
    decoding can begin. `matrix` is the upper left 2x2 part of the display matrix; `width` and `height` are upright.
    Without `seekable` the timestamps don't name frames (AVI with B-frames, raw streams): frames are counted instead.
    Without `complete` the file is cut off after the last frame listed. With `fresh_keys` every key frame is a clean
    beginning. `blends_colour` says that turning it into RGB interpolates colour (see `_blends_colour`).
    """

    path: Path
    pts: NDArray[np.int64]
    times: NDArray[np.float64]
    keys: NDArray[np.bool_]
    duration: float
    width: int
    height: int
    matrix: tuple[int, int, int, int]
    seekable: bool
    complete: bool
    fresh_keys: bool
    blends_colour: bool

    @property
    def transposed(self) -> bool:
        """Whether rows become columns on the way upright."""
        a, _, c, _ = self.matrix
        return abs(c) > abs(a)

    @property
    def mirrored(self) -> bool:
        """Whether the picture is shown as in a mirror."""
        a, b, c, d = self.matrix
        return a * d < b * c

    @property
    def rotation(self) -> int:
        """Degrees (0, 90, 180, 270) counter-clockwise that stored pictures are turned by."""
        _, b, _, d = self.matrix
        return round(-math.degrees(math.atan2(b, d)) / 90) * 90 % 360

    def upright(self, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Turn (and mirror, if the file says so) a stored picture (h, w, 3) into the one shown (height, width, 3)."""
        a, b, c, d = self.matrix
        if self.transposed:
            return picture.swapaxes(0, 1)[:: -1 if b < 0 else 1, :: -1 if c < 0 else 1]
        return picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def import_av() -> Any:
    """PyAV, imported late: `import sta_adapter` must not load FFmpeg."""
    try:
        import av
    except ImportError as error:
        raise MissingExtraError(f"PyAV can't be imported ({error}); video files need it: pip install av") from error
    return av


def open_video(path: Path) -> "InputContainer":
    """Open a file for demuxing; the absolute path keeps FFmpeg from taking `a:b.mp4` for a protocol."""
    return import_av().open(str(path.absolute()), metadata_errors="replace")


def video_stream(container: "InputContainer") -> "VideoStream":
    """The stream with the pictures; the largest moving one where there are several (a cover image, say)."""
    stream: Any = container.streams.best("video")
    if stream is None:
        kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "none"
        raise VideoError(f"{container.name} has no video stream (streams: {kinds}); expected a file with pictures.")
    return stream


def _checked_path(path: str | os.PathLike[str]) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise ConfigError(f"path is {path!r}; expected a str or a pathlib.Path that names a video file.")
    path = Path(path)
    if not path.exists():
        raise VideoNotFoundError(errno.ENOENT, "no such video file; check the path", str(path))
    if path.is_dir():
        raise VideoError(f"{path} is a folder; expected a video file. Name one of the files in it.")
    if path.stat().st_size == 0:
        raise VideoError(f"{path} is empty (0 bytes); expected a video file. Download or write it again.")
    return path


def _matroska_cut_off(path: Path) -> bool:
    """Whether a Matroska or WebM file is shorter than its segment says (live recordings leave the size open)."""
    with path.open("rb") as file:
        head = file.read(4096)
    at = head.find(b"\x18\x53\x80\x67") + 4  # EBML id of the segment; its size follows, 7 bits of each byte
    length = 9 - head[at].bit_length()
    unknown = (1 << 7 * length) - 1
    size = int.from_bytes(head[at : at + length], "big") & unknown
    return at >= 4 and size != unknown and at + length + size > path.stat().st_size


def _display_matrix(frame: "VideoFrame") -> tuple[int, int, int, int]:
    data: Any = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return UNTURNED
    a, b, _, c, d = np.frombuffer(bytes(data), dtype=np.int32)[:5].tolist()
    return (a, b, c, d)


def _blends_colour(frame: "VideoFrame") -> bool:
    """Whether turning the frame into RGB interpolates colour, which every FFmpeg release does a little differently.

    Measured: with colour stored at full size, or at half size with 8 bits and an even height, releases 4 to 8 agree
    to the bit; 4:2:0 with an odd height, and 4:2:0 or 4:2:2 with more than 8 bits, they turn into different pixels.
    """
    rows_shared, columns_shared = frame.format.chroma_height(4) < 4, frame.format.chroma_width(4) < 4
    deep = any(component.bits > 8 for component in frame.format.components)
    return (rows_shared and frame.height % 2 == 1) or (deep and (rows_shared or columns_shared))


def _scan(container: "InputContainer", stream: "VideoStream") -> tuple[list[PacketRow], bool, "VideoFrame | None"]:
    """Walk over all packets: those of frames that are shown, whether the file is whole, and the first frame."""
    rows: list[PacketRow] = []
    first: VideoFrame | None = None
    seen, damaged = 0, False
    codec, extradata = stream.codec_context.name, stream.codec_context.extradata
    for packet in container.demux(stream):
        if packet.is_corrupt:
            damaged = True
            first = first or next(iter(stream.decode(None)), None)
            break
        if first is None:
            first = next(iter(packet.decode()), None)
        is_flush = packet.size == 0 and packet.dts is None  # what PyAV ends with; an empty packet repeats a frame
        seen += not is_flush
        if packet.size > 0 and not packet.is_discard:  # discarded packets lie before an edit list's beginning
            fresh = begins_afresh(codec, extradata, packet) if packet.is_keyframe else None
            rows.append(PacketRow(packet.pts, packet.dts, packet.is_keyframe, packet.duration or 0, fresh))
    return rows, not damaged and seen >= stream.frames, first


def _without_gaps(rows: list[PacketRow]) -> list[PacketRow]:
    """The rows of a cut-off file up to where frames may be missing: a lost packet is shown after the last one's dts."""
    last = max((row.dts for row in rows if row.dts is not None), default=None)
    return [row for row in rows if last is None or row.pts is None or row.pts <= last]


def _timeline(
    stream: "VideoStream", rows: list[PacketRow], avi: bool
) -> tuple[NDArray[np.int64], NDArray[np.bool_], bool]:
    """Ascending timestamps (F,), key flags (F,) in the same order, and whether timestamps name frames."""
    pts, dts, keys = [row.pts for row in rows], [row.dts for row in rows], [row.key for row in rows]
    distinct = {stamp for stamp in pts if stamp is not None}
    made_up = avi and stream.codec_context.has_b_frames  # AVI has no pts
    if len(distinct) == len(rows) and not made_up:
        stamps = np.array(pts, np.int64)
        order = stamps.argsort()
        return stamps[order], np.array(keys, bool)[order], True
    if None not in dts:
        stamps = np.array(dts, np.int64)
    else:  # a raw stream: only its rate is known
        rate = stream.average_rate or stream.guessed_rate or 25
        ticks = 1 / (rate * (stream.time_base or 1))
        stamps = np.array([round(number * ticks) for number in range(len(rows))], np.int64)
    return np.sort(stamps), np.array(keys, bool), False


def read_table(path: str | os.PathLike[str]) -> FrameTable:
    """List the frames of a video file without decoding them (but for the first, which tells size and rotation)."""
    path = _checked_path(path)
    av = import_av()
    try:
        with open_video(path) as container:
            return _table_of(container, path)
    except VideoError:
        raise
    except (av.FFmpegError, OSError, ValueError, RuntimeError) as error:
        raise VideoError(
            f"{path} can't be read as a video (pyav: {error}); expected a file that FFmpeg understands. "
            "It may be cut off, damaged, or not a video at all."
        ) from error


def _table_of(container: "InputContainer", path: Path) -> FrameTable:
    stream, formats = video_stream(container), container.format.name.split(",")
    rows, complete, first = _scan(container, stream)
    complete = complete and not ("matroska" in formats and _matroska_cut_off(path))
    rows = rows if complete else _without_gaps(rows)
    if first is None or not rows:
        raise VideoError(f"{path} has no frame that decodes ({len(rows)} listed); the file is cut off or damaged.")
    pts, keys, seekable = _timeline(stream, rows, "avi" in formats)
    base = float(stream.time_base or 1)
    times = (pts - pts[0]) * base
    gap = float(np.median(np.diff(times))) if len(times) > 1 else 1 / float(stream.average_rate or 25)
    last = next((row.duration for row in rows if row.pts == pts[-1]), 0) * base
    matrix = _display_matrix(first)
    turned = abs(matrix[2]) > abs(matrix[0])
    indexed = not {"mpegts", "mpeg"} & set(formats)
    return FrameTable(
        path=path,
        pts=pts,
        times=times,
        keys=keys,
        duration=float(times[-1]) + (last or gap),
        width=first.height if turned else first.width,
        height=first.width if turned else first.height,
        matrix=matrix,
        seekable=seekable,
        complete=complete,
        fresh_keys=indexed and keys_are_fresh(rows),
        blends_colour=_blends_colour(first),
    )
