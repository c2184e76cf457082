"""Whether decoding can begin at a key frame and give exact pictures, told from packets without decoding them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from sta_adapter.video.bits import units

if TYPE_CHECKING:
    from av.packet import Packet
    from av.video.stream import VideoStream

__all__ = ["PacketRow", "begins_afresh", "keys_are_fresh"]

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
    shift, mask = _KIND_BITS[codec]
    kinds = (unit[0] >> shift & mask for unit in units(bytes(packet), (extradata[size_at] & 3) + 1) if unit)
    return next((kind in _FRESH_KINDS[codec] for kind in kinds if kind in _PICTURE_KINDS[codec]), False)


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
