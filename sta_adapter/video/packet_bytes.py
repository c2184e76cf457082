"""What a file's packets tell without being decoded: where decoding may begin, and which of them show no frame of their own."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from av.packet import Packet
    from av.video.stream import VideoStream

_KIND_BITS = {"h264": (0, 31), "hevc": (1, 63)}  # shift and mask of a NAL unit's kind in its first byte
_PICTURE_KINDS = {"h264": range(1, 6), "hevc": range(32)}
_FRESH_KINDS = {"h264": (5,), "hevc": (19, 20)}  # IDR: nothing after it refers to anything before it
# of H.264, whose frames may come as two packets, a field each
SLICES, SEQUENCE = (1, 5), 7  # kinds of NAL units
HIGH = (100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135)  # profiles whose headers tell of colour
# of MPEG-4
LAYERS, PICTURE = range(0x20, 0x30), 0xB6  # start codes
OWN_ASPECT = 15
GREY = 3


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


class FieldPairs:
    """Tells the second fields of frames, packet by packet: of interlaced H.264 whose frames come as two (AVCHD, broadcasts).

    Of other codecs (FFmpeg's names) no packet is a field.
    """

    def __init__(self, codec: str, extradata: bytes | None) -> None:
        found = extradata if codec == "h264" and extradata else b""
        self._width = (found[4] & 3) + 1 if len(found) > 8 and found[0] == 1 else 0  # of a length; 0 for start codes
        headers = [found[8:]] if self._width else units(found, 0)
        self._form = next((_form(header) for header in headers if header[:1] and header[0] & 31 == SEQUENCE), None)
        self._open: tuple[int, int] | None = None  # number and parity of a field that lacks its other half

    @property
    def possible(self) -> bool:
        """Whether there may be fields at all."""
        return self._form is not None

    def is_second(self, packet: "Packet[VideoStream]") -> bool:
        """Whether the packet is the other half of the one before it."""
        if self._form is None:
            return False
        fields = {field for unit in units(bytes(packet), self._width) if (field := _field(unit, self._form))}
        field = fields.pop() if len(fields) == 1 else None  # else a frame, or both of its fields
        second = field is not None and self._open == (field[0], 1 - field[1])
        self._open = None if second else field
        return second


class HiddenPackets:
    """Tells, by FFmpeg's name of the codec, packets of which no frame comes, though they have times as others do.

    They are VP8's alternate references, and MPEG-4's for a picture that is not coded.
    """

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


def units(data: bytes, width: int) -> Iterator[bytes]:
    """What stands in a packet one after the other, with lengths of `width` bytes in front; 0 for start codes."""
    if not width:
        yield from data.split(b"\0\0\1")[1:]
        return
    at = 0
    while at + width < len(data):
        length = int.from_bytes(data[at : at + width], "big")
        yield data[at + width : at + width + length]
        at += width + length


class Bits:
    """What is left of some bytes; behind their end there are zeros."""

    def __init__(self, data: bytes) -> None:
        self._bits = format(int.from_bytes(b"\1" + data, "big"), "b")[1:]

    def take(self, count: int) -> int:
        """A number of so many bits."""
        taken, self._bits = self._bits[:count], self._bits[count:]
        return int(taken or "0", 2)

    def golomb(self) -> int:
        """A number of as many bits as it needs."""
        zeros = len(self._bits) - len(self._bits.lstrip("0"))
        return self.take(2 * zeros + 1) - 1


class _Form(NamedTuple):
    """What is needed of a sequence's header to read those of its slices."""

    number_bits: int
    planes: int  # bits that name a colour plane


def _bits(unit: bytes) -> Bits:
    return Bits(unit.replace(b"\0\0\3", b"\0\0"))


def _form(header: bytes) -> _Form | None:
    """Of a sequence's header; None where all its pictures are frames."""
    bits = _bits(header[1:512])
    profile, planes = bits.take(8), 0
    bits.take(16)
    bits.golomb()
    if profile in HIGH:
        colour = bits.golomb()
        planes = 2 * bits.take(1) if colour == 3 else 0
        bits.golomb(), bits.golomb(), bits.take(1)
        if bits.take(1):
            for number in range(12 if colour == 3 else 8):
                _pass_scaling(bits, (16 if number < 6 else 64) * bits.take(1))
    number_bits = bits.golomb() + 4
    if (order := bits.golomb()) == 0:
        bits.golomb()
    elif order == 1:
        bits.take(1), bits.golomb(), bits.golomb()
        for _ in range(min(255, bits.golomb())):
            bits.golomb()
    bits.golomb(), bits.take(1), bits.golomb(), bits.golomb()
    return None if bits.take(1) else _Form(number_bits, planes)


def _pass_scaling(bits: Bits, count: int) -> None:
    last = following = 8
    for _ in range(count):
        if following:
            code = bits.golomb()
            following = (last + (code + 1) // 2 * (1 if code % 2 else -1)) % 256
        last = following or last


def _field(unit: bytes, form: _Form) -> tuple[int, int] | None:
    """(number of its frame, 1 for the bottom one) of a slice of a field; None for other units."""
    if not unit or unit[0] & 31 not in SLICES:
        return None
    bits = _bits(unit[1:32])
    bits.golomb(), bits.golomb(), bits.golomb(), bits.take(form.planes)
    number = bits.take(form.number_bits)
    return (number, bits.take(1)) if bits.take(1) else None


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
