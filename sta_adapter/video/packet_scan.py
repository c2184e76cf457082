"""One walk over the packets of a video stream: which frames there are, when, whether all, and where decoding can begin."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sta_adapter.video.budget import DECODER_LIMIT

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

__all__ = [
    "PacketRow",
    "PacketScan",
    "begins_afresh",
    "frames_in_order",
    "keys_are_fresh",
    "scan_packets",
    "without_gaps",
]

MADE_UP = frozenset({"avi", "asf", "mxf"})
"""Containers that keep no presentation timestamps; FFmpeg makes them up, wrongly where frames are reordered."""

_KIND_BITS = {"h264": (0, 31), "hevc": (1, 63)}  # shift and mask of a NAL unit's kind in its first byte
_PICTURE_KINDS = {"h264": range(1, 6), "hevc": range(32)}
_FRESH_KINDS = {"h264": (5,), "hevc": (19, 20)}  # IDR: nothing after it refers to anything before it


class PacketRow(NamedTuple):
    """What is kept of a packet. `fresh` is None where the codec's packets don't say it."""

    pts: int | None
    dts: int | None
    key: bool
    duration: int
    fresh: bool | None


def begins_afresh(codec: str, extradata: bytes | None, packet: "Packet[VideoStream]") -> bool | None:
    """Whether an H.264 or HEVC key packet is an IDR picture; None for other codecs.

    Other key frames (open groups of pictures, recovery points of an intra refresh) are followed by frames that refer
    to what came before. Packets in start-code form, as in MPEG transport streams, count as not fresh.
    """
    if codec not in _KIND_BITS:
        return None
    size_at = {"h264": 4, "hevc": 21}[codec]  # where the extradata hold the width of a unit's length, less one
    if not extradata or extradata[0] != 1 or len(extradata) <= size_at:
        return False
    data, width = bytes(packet), (extradata[size_at] & 3) + 1
    shift, mask = _KIND_BITS[codec]
    at = 0
    while at + width < len(data):
        kind = data[at + width] >> shift & mask
        if kind in _PICTURE_KINDS[codec]:
            return kind in _FRESH_KINDS[codec]
        at += width + int.from_bytes(data[at : at + width], "big")
    return False


def keys_are_fresh(rows: Sequence[PacketRow]) -> bool:
    """Whether decoding may begin at every key frame of a file. `rows` are its packets in file order."""
    latest_key: int | None = None
    for number, row in enumerate(rows):
        if row.key and number > 0 and row.fresh is False:
            return False
        if row.key:
            latest_key = row.pts
        elif row.pts is None or latest_key is None or row.pts < latest_key:
            return False  # shown before the key frame that it follows, or that one is left out by an edit list
    return True


class PacketScan(NamedTuple):
    """What the walk has found."""

    rows: list[PacketRow]  # the packets of frames that are shown, in the order of the file
    complete: bool  # whether no packet is damaged, and there are as many as the container announces
    first: "VideoFrame | None"  # the first frame that decodes


def scan_packets(container: "InputContainer", stream: "VideoStream") -> PacketScan:
    """Walk over all packets up to the first damaged one, and decode the first frame."""
    rows: list[PacketRow] = []
    first: VideoFrame | None = None
    listed = 0
    codec, extradata = stream.codec_context.name, stream.codec_context.extradata
    unseen = {"threads": "1", "skip_loop_filter": "all"}  # nobody looks at the first frame
    stream.codec_context.options = {**unseen, **DECODER_LIMIT}
    for packet in container.demux(stream):
        if packet.is_corrupt:
            return PacketScan(rows, False, first or next(iter(stream.decode(None)), None))
        is_shown = packet.size > 0 and not packet.is_discard  # discarded packets lie before an edit list's beginning
        fresh = begins_afresh(codec, extradata, packet) if is_shown and packet.is_keyframe else None
        first = first or _first_frame(stream, packet, alone=bool(fresh))
        listed += packet.size > 0 or packet.dts is not None  # not what PyAV ends with; an empty packet repeats a frame
        if is_shown:
            rows.append(PacketRow(packet.pts, packet.dts, packet.is_keyframe, packet.duration or 0, fresh))
    return PacketScan(rows, listed >= _announced(container, stream), first)


def _announced(container: "InputContainer", stream: "VideoStream") -> int:
    """How many packets the container lists. MP4 counts those that its edit list leaves out too; its index doesn't."""
    if "mov" in container.format.name.split(","):
        return len(getattr(stream, "index_entries", ()))  # which PyAV has from 17 on; its boxes are looked at as well
    return stream.frames


def _first_frame(stream: "VideoStream", packet: "Packet[VideoStream]", alone: bool) -> "VideoFrame | None":
    """A packet's frame; that of a packet which needs no other, also if the decoder holds it back for a few more."""
    frame = next(iter(packet.decode()), None)
    if frame is not None or not alone:
        return frame
    held = stream.decode(None)
    stream.codec_context.flush_buffers()
    return next(iter(held), None)


def without_gaps(rows: list[PacketRow]) -> list[PacketRow]:
    """The rows of a cut-off file up to where frames may be missing: a lost packet is shown after the last one's dts."""
    last = max((row.dts for row in rows if row.dts is not None), default=None)
    return [row for row in rows if last is None or row.pts is None or row.pts <= last]


def frames_in_order(
    stream: "VideoStream", rows: list[PacketRow], formats: set[str]
) -> tuple[NDArray[np.int64], NDArray[np.bool_], bool]:
    """Ascending timestamps (F,), key flags (F,) in the same order, and whether timestamps name frames."""
    pts, keys = [row.pts for row in rows], np.array([row.key for row in rows], bool)
    known = sorted({stamp for stamp in pts if stamp is not None})
    made_up = bool(MADE_UP & formats) and stream.codec_context.has_b_frames and pts == known
    if len(known) == len(rows) and not made_up:
        stamps = np.array(pts, np.int64)
        order = stamps.argsort()
        return stamps[order], keys[order], True
    return np.sort(_stamps_in_file_order(stream, rows)), keys, False


def _stamps_in_file_order(stream: "VideoStream", rows: list[PacketRow]) -> NDArray[np.int64]:
    """Decoding timestamps; of a raw stream, which has none, the rate's."""
    dts = [row.dts for row in rows]
    if None not in dts:
        return np.array(dts, np.int64)
    rate = stream.average_rate or stream.guessed_rate or 25
    ticks = 1 / (rate * (stream.time_base or 1))
    return np.array([round(number * ticks) for number in range(len(rows))], np.int64)
