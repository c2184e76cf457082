"""The three decoding backends. Each gets the file's frame table and indices into it, and returns those frames upright.

decord and torchcodec carry another FFmpeg than PyAV does. They decline (`DeclinedError`) files of which they would
return something else than PyAV, so that the same call gives the same pixels wherever it runs.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sta_adapter.errors import BackendError, ConfigError, MissingExtraError, VideoError
from sta_adapter.video.budget import CHUNK_PIXELS, DECODER_LIMIT, check_kept
from sta_adapter.video.frame_table import FrameTable, decoder_of, import_av, open_video, probing, video_stream
from sta_adapter.video.picture import UNTURNED, Pixels, rgb, upright

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.codeccontext import VideoCodecContext
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

Resize = Callable[[Pixels], Pixels]


class DeclinedError(Exception):
    """A backend can't read this file, or not as PyAV does; the message says why."""


def decode_pyav(table: FrameTable, indices: NDArray[np.int64], threads: int) -> Pixels:
    """Decode with PyAV: from the key frame before each wanted frame, or in order where the file can't be seeked."""
    av = import_av()
    converter = av.video.reformatter.VideoReformatter()  # one for all: making it costs more than a small frame
    frames = np.empty((len(indices), table.height, table.width, 3), np.uint8)
    open_slots = {int(index): slot for slot, index in enumerate(indices)}
    ways = [_by_seeking, _in_order] if table.seekable else [_in_order]
    failure = "they are damaged or missing"
    for way in ways:
        try:
            for index, frame in way(table, sorted(open_slots), threads):
                if not frame.is_corrupt:
                    picture = upright(rgb(frame, converter), table.matrix)
                    _check_size(picture, table)
                    frames[open_slots.pop(index)] = picture
        except av.FFmpegError as error:
            failure = str(error)
        if not open_slots:
            return frames
    raise DeclinedError(
        f"{len(indices) - len(open_slots)} of the {len(indices)} frames asked for decode, {failure}; "
        f"the first that doesn't begins at {table.times[min(open_slots)]:g} s"
    )


def _check_size(picture: Pixels, table: FrameTable) -> None:
    height, width = picture.shape[:2]
    if (height, width) != (table.height, table.width):
        raise DeclinedError(
            f"the picture's size changes from {table.width}x{table.height} to {width}x{height} on the way"
        )


def _by_seeking(table: FrameTable, wanted: list[int], threads: int) -> Iterator[tuple[int, "VideoFrame"]]:
    """Yield (index, frame) of wanted frames, jumping to the key frames in front of them."""
    from av.video.frame import PictureType

    predicted = (PictureType.P, PictureType.B)
    keys = np.flatnonzero(table.keys)
    groups: dict[int, list[int]] = {}
    for index in wanted:
        before = keys[keys <= index]
        groups.setdefault(int(before[-1]) if before.size else 0, []).append(index)
    with open_video(table.path, probing(table.path)) as container:
        stream, decoder = _ready(container, threads)
        # frames of H.264 that no other refers to, and that nobody wants, are passed over; in HEVC a layer above may refer to them
        spares = decoder.name == "h264" and not table.unlike
        for key, group in groups.items():
            target = int(table.pts[key])
            container.seek(target, stream=stream, backward=True)
            decoder.flush_buffers()
            decoded = False
            by_pts = {int(table.pts[index]): index for index in group}
            for number, packet in enumerate(container.demux(stream)):
                if spares:
                    decoder.skip_frame = "DEFAULT" if packet.pts in by_pts else "NONREF"
                if number == 0 and not (packet.is_keyframe and packet.pts is not None and packet.pts <= target):
                    return  # the container's index is no good: what decodes from here may lack what it refers to
                for frame in _frames_of(packet, decoder):
                    if not decoded and frame.pict_type in predicted:
                        return  # a recovery point of an intra refresh: pictures are whole only some frames later
                    decoded = True
                    if frame.pts in by_pts:
                        yield by_pts.pop(frame.pts), frame
                if not by_pts:
                    break


def _in_order(table: FrameTable, wanted: list[int], threads: int) -> Iterator[tuple[int, "VideoFrame"]]:
    """Yield (index, frame) of wanted frames, decoding from the beginning up to the last of them."""
    left = set(wanted)
    index_of: dict[int | None, int] = {int(pts): index for index, pts in enumerate(table.pts)} if table.seekable else {}
    with open_video(table.path) as container:
        stream, decoder = _ready(container, threads)
        if decoder.name == "h264":
            # where a stream doesn't tell how far frames are reordered, wait for all that may come
            decoder.options = {**DECODER_LIMIT, "strict": "1"}
        decoded = (frame for packet in container.demux(stream) for frame in _frames_of(packet, decoder))
        count = 0
        for number, frame in enumerate(decoded):
            count = number + 1
            index = index_of.get(frame.pts, -1) if table.seekable else number
            if index in left:
                left.remove(index)
                yield index, frame
            if not left and table.seekable:
                return
    held = decoder.has_b_frames + 1  # frames that a stream may lack at its end, or have beyond it
    if not table.seekable and table.complete and abs(count - len(table.times)) > held:
        raise DeclinedError(
            f"{count} frames decode of its {len(table.times)} packets, so that their times can't be known"
        )


def _ready(container: "InputContainer", threads: int) -> tuple["VideoStream", "VideoCodecContext"]:
    """The stream with the pictures, and its decoder, which is set up."""
    stream = video_stream(container)
    decoder = decoder_of(stream)
    decoder.thread_count = threads
    decoder.thread_type = "AUTO"  # by frames as well, not only within one
    decoder.options = DECODER_LIMIT
    return stream, decoder


def _frames_of(packet: "Packet[VideoStream]", decoder: "VideoCodecContext") -> Iterable["VideoFrame"]:
    return () if packet.is_corrupt else decoder.decode(packet)


def _decline_unlike_pyav(table: FrameTable) -> None:
    if not table.complete:
        raise DeclinedError("the file is cut off")
    if table.unlike:
        raise DeclinedError(table.unlike)
    if not table.fresh_keys:
        raise DeclinedError("frames refer across its key frames, or it has no index: seeking in it is not exact")


def _compare_times(
    table: FrameTable, indices: NDArray[np.int64], count: int, times: NDArray[np.float32 | np.float64]
) -> None:
    """Decline where another backend counts the file's frames in another way. `times` (T,) are its own timestamps."""
    if count != len(table.times):
        raise DeclinedError(f"it lists {count} frames where the packets are {len(table.times)}")
    expected = table.times[indices]
    if not np.allclose(times, expected, rtol=1e-6, atol=1e-3):  # decord keeps seconds in single precision
        raise DeclinedError("its timestamps are not those of the packets")


def decode_decord(table: FrameTable, indices: NDArray[np.int64], threads: int) -> Pixels:
    """Decode with decord, whatever `decord.bridge` is set to."""
    try:
        import decord
    except (ImportError, OSError) as error:
        raise MissingExtraError(f"decord can't be imported ({error}): pip install decord, or backend='pyav'") from error
    _decline_unlike_pyav(table)
    if table.matrix != UNTURNED:
        raise DeclinedError("the file says to turn its pictures, which decord 0.6 gets wrong in most cases")
    try:
        # without fault_tol it repeats a frame for one that it can't decode
        reader = decord.VideoReader(str(table.path), num_threads=threads, fault_tol=1e-9)
        own = reader.get_frame_timestamp(np.append(indices, 0))[:, 0]
        _compare_times(table, indices, len(reader), own[:-1] - own[-1])
        batch = reader.get_batch(indices)
    except DeclinedError:
        raise
    except Exception as error:  # decord raises its own Exception children, RuntimeError, AssertionError, ...
        raise DeclinedError(_first_line(error)) from error
    return batch.asnumpy() if hasattr(batch, "asnumpy") else np.array(batch.numpy())  # copies: the reader's memory goes


def decode_torchcodec(table: FrameTable, indices: NDArray[np.int64], threads: int) -> Pixels:
    """Decode with torchcodec on the CPU; it needs FFmpeg's shared libraries on the machine."""
    try:
        from torchcodec.decoders import VideoDecoder
    except ImportError as error:
        raise MissingExtraError(f"torchcodec can't be imported ({error}): pip install torchcodec") from error
    except Exception as error:  # RuntimeError or OSError where FFmpeg's libraries or torch don't fit
        raise DeclinedError(f"torchcodec is installed and doesn't load: {_first_line(error)}") from error
    _decline_unlike_pyav(table)
    try:
        decoder = VideoDecoder(
            str(table.path), dimension_order="NHWC", seek_mode="exact", num_ffmpeg_threads=threads or 1
        )
        turns = getattr(decoder.metadata, "rotation", None) is not None
        if table.mirrored or (table.matrix != UNTURNED and not turns):
            raise DeclinedError("the file says to turn or mirror its pictures, which this torchcodec doesn't do")
        if min(map(abs, table.matrix[:2])):
            raise DeclinedError("the file says to turn its pictures, but not by quarters")
        if not table.seekable:
            raise DeclinedError("its timestamps don't name its frames, and torchcodec finds frames by them")
        batch = decoder.get_frames_at([*indices.tolist(), 0])
    except DeclinedError:
        raise
    except Exception as error:  # whatever its C++ side throws: RuntimeError, IndexError, ValueError
        raise DeclinedError(_first_line(error)) from error
    seconds = batch.pts_seconds.numpy()
    _compare_times(table, indices, len(decoder), seconds[:-1] - seconds[-1])
    found: Pixels = batch.data[:-1].numpy().copy()
    return found


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


DECODERS: dict[str, Callable[[FrameTable, NDArray[np.int64], int], Pixels]] = {
    "decord": decode_decord,
    "pyav": decode_pyav,
    "torchcodec": decode_torchcodec,
}
AUTOMATIC = "pyav"  # reads every file, in less time than the others
MOST_THREADS = 256


def check_backend(backend: str) -> None:
    """Raise ConfigError unless `backend` is a backend's name or "auto"."""
    if backend != "auto" and backend not in DECODERS:
        raise ConfigError(f"no video backend is called {backend!r}; choose auto, {', '.join(DECODERS)}.")


def check_threads(threads: int | None) -> None:
    """Raise ConfigError unless `threads` is a number that decoders take."""
    number = isinstance(threads, (int, np.integer)) and not isinstance(threads, bool)
    if threads is not None and not (number and 1 <= threads <= MOST_THREADS):
        raise ConfigError(
            f"threads is {threads!r}; expected a whole number from 1 to {MOST_THREADS}, or None for the decoder's choice."
        )


def _read_all(backend: str, table: FrameTable, threads: int, indices: NDArray[np.int64]) -> Pixels:
    try:
        return DECODERS[backend](table, indices, threads)
    except MemoryError as error:
        raise VideoError(
            f"{table.path}: {len(indices)} frames of {table.width}x{table.height} don't fit into memory. "
            "Ask for fewer frames, or write the file again with a smaller picture."
        ) from error


def _made_smaller(
    table: FrameTable, indices: NDArray[np.int64], read: Callable[[NDArray[np.int64]], Pixels], resize: Resize | None
) -> Pixels:
    """Decode frames and resize them, a few at a time, so that few are there in their full size."""
    area = table.width * table.height
    if resize is None:
        check_kept(table.path, len(indices), area)
        return read(indices)
    size = max(1, CHUNK_PIXELS // area)
    done: list[Pixels] = []
    for start in range(0, len(indices), size):
        done.append(resize(read(indices[start : start + size])))
        check_kept(table.path, len(indices), done[0].shape[1] * done[0].shape[2])
    return done[0] if len(done) == 1 else np.concatenate(done)


def decode(
    table: FrameTable, indices: NDArray[np.int64], backend: str, threads: int = 0, resize: Resize | None = None
) -> tuple[Pixels, str, str]:
    """The frames `indices` (T,) of a file, (T, H, W, 3), the backend that decoded them, and why it was that one.

    `threads` 0 lets the decoder choose; `resize` makes frames (t, H, W, 3) of their full size into those that are kept.
    """
    name = AUTOMATIC if backend == "auto" else backend
    try:
        frames = _made_smaller(table, indices, partial(_read_all, name, table, threads), resize)
    except DeclinedError as error:
        message = f"{table.path} can't be decoded ({name}: {error})."
        if name == AUTOMATIC:
            raise VideoError(
                f"{message} It lists {len(table.times)} frames. Write or download the file again."
            ) from error
        raise BackendError(f"{message} Pass backend='auto' to let another backend read it.") from error
    return frames, name, "first choice" if backend == "auto" else "asked for by name"
