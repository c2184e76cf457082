"""The presentation timestamps of a video file, read from its packets with PyAV, and what else decoders need to know."""

import errno
import functools
import math
import os
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from sta_adapter._lazy import importing
from sta_adapter.errors import ConfigError, STAWarning, VideoError
from sta_adapter.video.budget import DECODER_LIMIT, check_frame
from sta_adapter.video.decoder_parity import seeks_exactly, why_unlike
from sta_adapter.video.image import HEIC, is_pointer
from sta_adapter.video.packet_bytes import PacketRow, keys_are_fresh
from sta_adapter.video.packet_scan import (
    frame_rate,
    frames_in_order,
    leap_back,
    scan_packets,
    that_decode,
    time_base,
    without_gaps,
)
from sta_adapter.video.picture import Matrix, display_matrix, is_transposed
from sta_adapter.video.truncation import cut_off

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.codeccontext import VideoCodecContext
    from av.video.stream import VideoStream

POINTERS = frozenset({"hls", "concat", "concatf", "dash", "imf", "sdp", "rtsp", "rtp", "sap", "lavfi"})
WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
ATTACHED = 0x400  # FFmpeg's mark of a cover picture
PICTURES = frozenset({"image2", "ico", "fits"})
ANIMATIONS = frozenset({"gif", "apng"})  # of one frame they are pictures
STILL_BRANDS = frozenset((b"ftypavif", *HEIC))
AVIF_ANIMATION = b"ftypavis"


class VideoNotFoundError(VideoError, FileNotFoundError):
    """There is no video file of that name."""


@dataclass(frozen=True)
class FrameTable:
    """The frames of a file in the order in which they are shown. F is their number.

    `pts` (F,) are the container's own timestamps, `times` (F,) seconds from the first frame, `keys` (F,) says where
    decoding can begin. `matrix` is the upper left 2x2 part of the display matrix; `width` and `height` are upright.
    Without `seekable` the timestamps don't name frames (AVI with B-frames, raw streams): frames are counted instead.
    Without `complete` the file is cut off after the last frame listed. With `fresh_keys` every key frame is a clean
    beginning. `unlike` tells why another FFmpeg may read it differently; "" where none does.
    """

    path: Path
    pts: NDArray[np.int64]
    times: NDArray[np.float64]
    keys: NDArray[np.bool_]
    duration: float
    width: int
    height: int
    matrix: Matrix
    seekable: bool
    complete: bool
    fresh_keys: bool
    unlike: str

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


def import_av() -> ModuleType:
    """PyAV, imported late: `import sta_adapter` must not load FFmpeg."""
    with importing("PyAV can't be imported ({}); video files need it: pip install av"):
        import av
    return av


@functools.lru_cache(maxsize=1)
def _containers() -> str:
    """The kinds of files that are opened: not those that only name other files or addresses, and make FFmpeg open them."""
    return ",".join(sorted(import_av().formats_available - POINTERS))


def open_video(path: Path, options: dict[str, str] | None = None) -> "InputContainer":
    """Open a file for demuxing; the absolute path keeps FFmpeg from taking `a:b.mp4` for a protocol.

    `options` are those of the decoders by which FFmpeg finds out what the streams are.
    """
    av, only = import_av(), {"format_whitelist": _containers()}
    release = int(av.__version__.split(".")[0])
    old = release < 19  # PyAV 19 has no such choice, and reads words in any encoding
    if release < 18 and not _names_streams(path):
        options = None  # it would write them past the end of a list of the streams that the header names, and crash
    found: InputContainer = av.open(
        str(path.absolute()), container_options=only, options=options, **({"metadata_errors": "replace"} if old else {})
    )
    return found


def _names_streams(path: Path) -> bool:
    """Whether the container's header names all streams; those of MPEG and FLV come to light one by one."""
    with path.open("rb") as file:
        head = file.read(12)
    return head[4:8] == b"ftyp" or head.startswith(b"\x1a\x45\xdf\xa3") or (head[:4], head[8:]) == (b"RIFF", b"AVI ")


def _check_is_video(container: "InputContainer", path: Path, frames: int = 2) -> None:
    """Refuse half an animation, and a single picture, which FFmpeg would read as a video of one frame; `frames` once they are known."""
    kinds = set(container.format.name.split(","))
    with path.open("rb") as file:
        brand = file.read(12)[4:]
    single = any(kind.endswith("_pipe") for kind in kinds) or kinds & PICTURES or brand in STILL_BRANDS
    if single or (frames == 1 and kinds & ANIMATIONS):
        name = container.format.name.removesuffix("_pipe") if brand not in STILL_BRANDS else brand[4:].decode()
        raise VideoError(
            f"{path} is a picture ({name}), where a video is expected. Name it as an image; if it is an "
            "animation, write it as a video first; a folder of pictures is a video with folder_fps."
        )
    if brand == AVIF_ANIMATION and sum(stream.frames > 1 for stream in container.streams.video) > 1:
        raise VideoError(
            f"{path} is an AVIF whose transparency is a stream of its own, which is not read. Write it as another video: "
            "APNG, GIF or WebM if it is to stay transparent."
        )


def probing(path: Path) -> dict[str, str]:
    """Options to open a file with: an MP4's header tells all that FFmpeg would decode the first frame for."""
    with path.open("rb") as file:
        return {**DECODER_LIMIT, **({"skip_frame": "all"} if file.read(8)[4:] == b"ftyp" else {})}


def video_stream(container: "InputContainer") -> "VideoStream":
    """The stream with the pictures; where there are several the one that players show, and no cover picture."""
    stream = cast("VideoStream | None", container.streams.best("video"))
    if stream is None:
        kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "none"
        raise VideoError(f"{container.name} has no video stream (streams: {kinds}); expected a file with pictures.")
    if stream.codec_context is None:
        raise VideoError(f"{container.name} has pictures that FFmpeg has no decoder for; convert it.")
    if _is_cover(stream):
        raise VideoError(f"{container.name} has no video stream, only an attached cover picture; expected a video.")
    return stream


def _is_cover(stream: "VideoStream") -> bool:
    return bool(int(getattr(stream.disposition, "value", stream.disposition)) & ATTACHED)  # no int before PyAV 18


_TOLD = set[object]()  # kinds of files with several streams


def _warn_of_others(path: Path, container: "InputContainer", taken: int) -> None:
    """Tell that other streams move as well, as of recorders with two cameras; of the first file of each kind."""
    moving = [stream for stream in container.streams.video if stream.frames != 1 and not _is_cover(stream)]
    sizes = {stream.index: f"{stream.width}x{stream.height}" for stream in moving}
    kind = taken, str(sizes)
    if len(moving) < 2 or kind in _TOLD:
        return
    _TOLD.add(kind)
    warnings.warn(
        f"{path} has {len(moving)} video streams ({', '.join(f'{index}: {size}' for index, size in sizes.items())}), and stream {taken} is read, as "
        f"players show it. To have another one, take it out: ffmpeg -i OLD -map 0:{next(index for index in sizes if index != taken)} -c copy NEW. "
        "Nothing is said of more files like it.",
        STAWarning,
        stacklevel=2,
    )


def decoder_of(stream: "VideoStream") -> "VideoCodecContext":
    """The decoder of a stream; where WebM says that pictures may be transparent libvpx's, as FFmpeg's own leaves that out."""
    own = stream.codec_context
    name = WITH_ALPHA.get(own.name) if stream.metadata.get("alpha_mode") == "1" else None
    if name is None:
        return own
    found = cast("VideoCodecContext", import_av().CodecContext.create(name, "r"))
    found.extradata = own.extradata
    return found


def checked_path(path: str | os.PathLike[str]) -> Path:
    """The path of a file; any other is an error."""
    if not isinstance(path, (str, os.PathLike)):
        raise ConfigError(f"path is {path!r}; expected a str or a pathlib.Path that names a video file.")
    if "://" in str(path) and not os.path.exists(path):
        raise VideoNotFoundError(errno.ENOENT, "an address, expected a file; download it first", str(path))
    path = Path(path)
    try:
        kind = path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        windows = os.sep == "/" and "\\" in str(path)
        hint = "its backslashes are of Windows, write / in their place" if windows else "check the path"
        raise VideoNotFoundError(errno.ENOENT, f"no such video file; {hint}", str(path)) from error
    except OSError as error:
        raise VideoError(f"{path} can't be read ({error.strerror}); check the path.") from error
    if stat.S_ISDIR(kind.st_mode):
        raise VideoError(
            f"{path} is a folder; expected a video file. Name one of the files in it; in data, a folder of pictures is a video with folder_fps."
        )
    if not stat.S_ISREG(kind.st_mode):
        raise VideoError(f"{path} is a pipe or a device; expected a video file. Copy what comes out of it into a file.")
    if kind.st_size == 0:
        raise VideoError(f"{path} is empty (0 bytes); expected a video file. Download or write it again.")
    return path


def read_frame_table(path: str | os.PathLike[str]) -> FrameTable:
    """List the frames of a video file without decoding them (but for the first, which tells size and rotation).

    Warns:
        STAWarning: it has several streams that move; said of the first file of each kind.
    """
    path = checked_path(path)
    av = import_av()
    try:
        with open_video(path, probing(path)) as container:
            return _table_of(container, path)
    except VideoError:
        raise
    except (av.FFmpegError, OSError, ValueError, RuntimeError, MemoryError) as error:
        if is_pointer(path):
            raise VideoError(
                f"{path} is a pointer of Git LFS in the place of a video: run `git lfs pull` there."
            ) from error
        raise VideoError(
            f"{path} can't be read as a video (pyav: {error}); expected a file that FFmpeg understands. "
            "It may be cut off, damaged, not a video at all, or a list of other files, which is not followed."
        ) from error


def _table_of(container: "InputContainer", path: Path) -> FrameTable:
    _check_is_video(container, path)
    stream, formats = video_stream(container), set(container.format.name.split(","))
    _warn_of_others(path, container, stream.index)
    check_frame(path, stream.codec_context.width or 0, stream.codec_context.height or 0)
    scan = scan_packets(container, stream, decoder_of(stream))
    _check_is_video(container, path, len(scan.rows))
    announced = (stream.duration or 0) if "mxf" in formats else 0  # its header counts frames in this way
    complete = scan.complete and len(scan.rows) >= announced and not cut_off(path, formats)
    rows = that_decode(scan.rows if complete else without_gaps(scan.rows), scan.begin)
    first = scan.first
    if first is None or not rows:
        raise VideoError(f"{path} has no frame that decodes ({len(rows)} listed); the file is cut off or damaged.")
    if leap_back(rows, round(1 / (stream.time_base or 1))):
        raise VideoError(
            f"{path} has timestamps that jump back, as in a file of several joined recordings, so the "
            "order of its frames can't be known. Write it again, as `ffmpeg -i OLD -c copy NEW.mkv` does."
        )
    pts, keys, seekable = frames_in_order(stream, rows, formats)
    base = time_base(stream)
    times = (pts - pts[0]) * float(base.numerator) / base.denominator  # rounded once: 1.25 s are 1.25
    matrix = display_matrix(first)
    turned = is_transposed(matrix)
    return FrameTable(
        path=path,
        pts=pts,
        times=times,
        keys=keys,
        duration=_duration(path, stream, rows, pts, times),
        width=first.height if turned else first.width,
        height=first.width if turned else first.height,
        matrix=matrix,
        seekable=seekable,
        complete=complete,
        fresh_keys=seeks_exactly(container) and keys_are_fresh(rows),
        unlike=why_unlike(container, stream, first, float(int(pts[-1]) * base)),
    )


def _duration(
    path: Path, stream: "VideoStream", rows: list[PacketRow], pts: NDArray[np.int64], times: NDArray[np.float64]
) -> float:
    """Seconds up to the end of the last frame; where that isn't known, a frame lasts as long as most do."""
    last = int(pts[-1]) - int(pts[0]) + next((row.duration for row in rows if row.pts == pts[-1]), 0)
    gap = float(np.median(np.diff(times))) if len(times) > 1 else 1 / float(frame_rate(stream))
    end = float(last * time_base(stream))
    duration = end if end > times[-1] else float(times[-1]) + gap
    if not 0 < duration < math.inf or (np.diff(times) < 0).any():
        raise VideoError(f"{path} has timestamps that don't give the order of its frames; write it again.")
    return duration
