"""Packets that show no picture of their own: alternate references of VP8, and MPEG-4's for a picture that is not coded."""

from typing import TYPE_CHECKING

from sta_adapter.video.bits import Bits, units

if TYPE_CHECKING:
    from av.packet import Packet
    from av.video.stream import VideoStream

__all__ = ["HiddenPackets"]

LAYERS, PICTURE = range(0x20, 0x30), 0xB6  # MPEG-4's start codes
OWN_ASPECT = 15
GREY = 3


class HiddenPackets:
    """Tells them, packet by packet, by FFmpeg's name of the codec: they have times as others do, and no frame comes of them."""

    def __init__(self, codec: str, extradata: bytes | None) -> None:
        self._codec = codec
        self._clock = 0  # bits of a picture's time
        self._ahead = 0  # pictures that came along in the packet of another; in the place of each an empty one follows
        if codec == "mpeg4":
            self._read(extradata or b"")

    def is_hidden(self, packet: "Packet[VideoStream]") -> bool:
        """Whether no frame comes of the packet."""
        if self._codec == "vp8":
            return bytes(packet)[0] & 0x10 == 0
        if self._codec != "mpeg4":
            return False
        pictures = self._read(bytes(packet))
        self._ahead += max(0, len(pictures) - 1)
        if not self._clock or len(pictures) != 1 or _is_coded(pictures[0], self._clock):
            return False
        self._ahead -= 1
        hidden, self._ahead = self._ahead < 0, max(0, self._ahead)
        return hidden

    def _read(self, data: bytes) -> list[bytes]:
        """The pictures in it; what a header says of their times is kept."""
        found = [unit for unit in units(data, 0) if unit]
        for unit in found:
            if unit[0] in LAYERS:
                self._clock = _clock_bits(Bits(unit[1:32]))
        return [unit for unit in found if unit[0] == PICTURE]


def _clock_bits(bits: Bits) -> int:
    """Of an MPEG-4 layer's header, how many bits a picture's time within its second has."""
    bits.take(9)
    version = 1
    if bits.take(1):
        version = bits.take(4)
        bits.take(3)
    if bits.take(4) == OWN_ASPECT:
        bits.take(16)
    if bits.take(1):
        bits.take(3)
        if bits.take(1):
            bits.take(79)
    if bits.take(2) == GREY and version != 1:
        bits.take(4)
    bits.take(1)
    return max(1, (bits.take(16) - 1).bit_length())


def _is_coded(picture: bytes, clock: int) -> bool:
    bits = Bits(picture[1:32])
    bits.take(2)
    while bits.take(1):  # whole seconds
        pass
    bits.take(1 + clock + 1)
    return bits.take(1) == 1
