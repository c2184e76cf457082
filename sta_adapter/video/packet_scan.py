"""One walk over the packets of a video stream: which frames there are, when they are shown, and whether all are there."""

import itertools
from fractions import Fraction
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sta_adapter.video.budget import DECODER_LIMIT
from sta_adapter.video.packet_bytes import FieldPairs, HiddenPackets, PacketRow, begins_afresh

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.codeccontext import VideoCodecContext
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

MADE_UP = frozenset({"avi", "asf", "mxf"})
"""Containers that keep no presentation timestamps; FFmpeg makes them up, wrongly where frames are reordered."""

PACKED = frozenset({"mpeg4"})
"""Codecs whose packets may hold two frames, as AVI needs it; copied into other containers their timestamps stay made up."""


class PacketScan(NamedTuple):
    """What the walk has found."""

    rows: list[PacketRow]  # the packets of frames that are shown, in the order of the file
    complete: bool  # whether no packet is damaged, and there are as many as the container announces
    first: "VideoFrame | None"  # the first frame that decodes
    begin: int | None = None  # its timestamp, if no frame that is shown before it decodes


def scan_packets(container: "InputContainer", stream: "VideoStream", decoder: "VideoCodecContext") -> PacketScan:
    """Walk over all packets up to the first damaged one, and decode the first frame."""
    rows: list[PacketRow] = []
    first: VideoFrame | None = None
    begin: int | None = None
    listed = 0
    codec, extradata = stream.codec_context.name, stream.codec_context.extradata
    fields, hidden = FieldPairs(codec, extradata), HiddenPackets(codec, extradata)
    unseen = {"threads": "1", "skip_loop_filter": "all"}  # nobody looks at the first frame
    decoder.options = {**unseen, **DECODER_LIMIT}
    for packet in container.demux(stream):
        if packet.is_corrupt:
            return PacketScan(rows, False, first or next(iter(decoder.decode(None)), None), begin)
        is_shown = packet.size > 0 and not packet.is_discard  # discarded packets lie before an edit list's beginning
        fresh = begins_afresh(codec, extradata, packet) if is_shown and packet.is_keyframe else None
        alone = bool(fresh) and not fields.possible  # a field by itself makes no frame
        if first is None and (first := _first_frame(decoder, packet, alone)) is not None:
            begin = None if alone else first.pts  # that of one decoded alone may be after those of the next
        listed += packet.size > 0 or packet.dts is not None  # not what PyAV ends with; an empty packet repeats a frame
        if is_shown and not hidden.is_hidden(packet) and not fields.is_second(packet):
            rows.append(PacketRow(packet.pts, packet.dts, packet.is_keyframe, packet.duration or 0, fresh))
    return PacketScan(rows, listed >= _announced(container, stream), first, begin)


def _announced(container: "InputContainer", stream: "VideoStream") -> int:
    """How many packets the container lists. MP4 counts those that its edit list leaves out too; its index doesn't."""
    if "mov" in container.format.name.split(","):
        return len(getattr(stream, "index_entries", ()))  # which PyAV has from 17 on; its boxes are looked at as well
    return stream.frames


def _first_frame(decoder: "VideoCodecContext", packet: "Packet[VideoStream]", alone: bool) -> "VideoFrame | None":
    """A packet's frame; that of a packet which needs no other, also if the decoder holds it back for a few more."""
    frame = next(iter(decoder.decode(packet)), None)
    if frame is not None or not alone:
        return frame
    held = decoder.decode(None)
    decoder.flush_buffers()
    return next(iter(held), None)


def without_gaps(rows: list[PacketRow]) -> list[PacketRow]:
    """The rows of a cut-off file up to where frames may be missing: a lost packet is shown after the last one's dts."""
    last = max((row.dts for row in rows if row.dts is not None), default=None)
    return [row for row in rows if last is None or row.pts is None or row.pts <= last]


def that_decode(rows: list[PacketRow], begin: int | None) -> list[PacketRow]:
    """The rows from `begin` on: those shown before it refer to what is not in the file.

    So begins a recording that was started, or a film that was cut, in the midst of a group of pictures.
    """
    return [row for row in rows if begin is None or row.pts is None or row.pts >= begin]


def leap_back(rows: list[PacketRow], second: int) -> bool:
    """Whether timestamps begin anew somewhere, as where several recordings were joined; a second is so many ticks."""
    known = [row.dts for row in rows if row.dts is not None]
    return any(later < earlier - second for earlier, later in itertools.pairwise(known))


def frames_in_order(
    stream: "VideoStream", rows: list[PacketRow], formats: set[str]
) -> tuple[NDArray[np.int64], NDArray[np.bool_], bool]:
    """Ascending timestamps (F,), key flags (F,) in the same order, and whether timestamps name frames."""
    pts, keys = [row.pts for row in rows], np.array([row.key for row in rows], bool)
    known = sorted(stamp for stamp in pts if stamp is not None)
    codec = stream.codec_context
    made_up = (MADE_UP & formats or codec.name in PACKED) and codec.has_b_frames and pts == known
    if made_up or len(known) < len(rows):
        return np.sort(_stamps_in_file_order(stream, rows)), keys, False
    stamps = np.array(pts, np.int64)
    order = stamps.argsort(kind="stable")
    return stamps[order], keys[order], len(set(known)) == len(rows)


def frame_rate(stream: "VideoStream") -> Fraction:
    """Frames a second of a stream without timestamps: as its pictures say, whatever FFmpeg takes for the average."""
    rate = stream.guessed_rate or stream.average_rate or Fraction(25)
    return Fraction(rate.numerator, rate.denominator)  # before PyAV 19 a Fraction already


def time_base(stream: "VideoStream") -> Fraction:
    """Seconds that one tick of a stream's timestamps lasts."""
    tick = stream.time_base or Fraction(1)
    return Fraction(tick.numerator, tick.denominator)


def _stamps_in_file_order(stream: "VideoStream", rows: list[PacketRow]) -> NDArray[np.int64]:
    """Decoding timestamps; of a raw stream, which has none, the rate's."""
    dts = [row.dts for row in rows]
    if None not in dts:
        return np.array(dts, np.int64)
    ticks = 1 / (frame_rate(stream) * (stream.time_base or 1))
    return np.array([round(number * ticks) for number in range(len(rows))], np.int64)
