"""Interlaced H.264 whose frames come as two packets, a field each (AVCHD, broadcasts): which packets begin a frame."""

from typing import TYPE_CHECKING, NamedTuple

from sta_adapter.video.bits import Bits, units

if TYPE_CHECKING:
    from av.packet import Packet
    from av.video.stream import VideoStream

__all__ = ["FieldPairs"]

SLICES, SEQUENCE = (1, 5), 7  # kinds of NAL units
HIGH = (100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135)  # profiles whose headers tell of colour


class FieldPairs:
    """Tells the second fields of frames, packet by packet; of other codecs (FFmpeg's names) than H.264 no packet is a field."""

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
