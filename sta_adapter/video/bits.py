"""Bits of a header, from the left."""

__all__ = ["Bits"]


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
