"""Parts of a packet, and the bits of a part's header from the left."""

from collections.abc import Iterator

__all__ = ["Bits", "units"]


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
