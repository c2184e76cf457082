"""Whether a file ends before its end, told from the bytes of its container: FFmpeg reads many of them silently.

No container but these, and those that count their frames, tells it: raw streams, MPEG program streams, FLV and IVF that
end between two frames are read as if they were whole.
"""

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def cut_off(path: Path, formats: set[str]) -> bool:
    """Whether the file lacks its end. `formats` are FFmpeg's names of its container."""
    size = path.stat().st_size
    with path.open("rb") as file:
        return any(check(file, size) for name, check in CHECKS.items() if name in formats)


def _mov(file: BinaryIO, size: int) -> bool:
    """Boxes one after the other, each with its length in front (0: up to the end of the file)."""
    at = 0
    while at < size:
        file.seek(at)
        head = file.read(16)
        length = int.from_bytes(head[:4], "big")
        if length == 1:
            length = int.from_bytes(head[8:], "big")
        if length < 8:
            return False
        at += length
    return at > size


def _matroska(file: BinaryIO, size: int) -> bool:
    """The segment says how long it is (live recordings leave it open)."""
    head = file.read(4096)
    at = head.find(b"\x18\x53\x80\x67") + 4  # EBML id of the segment; its size follows, 7 bits of each byte
    if not 4 <= at < len(head):
        return False
    length = 9 - head[at].bit_length()
    unknown = (1 << 7 * length) - 1
    told = int.from_bytes(head[at : at + length], "big") & unknown
    return told != unknown and at + length + told > size


def _asf(file: BinaryIO, size: int) -> bool:
    """The file properties hold the file's size (0 in live recordings)."""
    head = file.read(4096)
    at = head.find(bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365"))
    return at >= 0 and int.from_bytes(head[at + 40 : at + 48], "little") > size


def _ogg(file: BinaryIO, size: int) -> bool:
    """The last page is whole and marked as the last of its stream."""
    file.seek(max(0, size - 70_000))  # a page is shorter than 64 KiB and its header
    tail = file.read()
    at = tail.rfind(b"OggS")
    header = tail[at : at + 27]
    if at < 0 or len(header) < 27 or not header[5] & 4:
        return True
    lacing = tail[at + 27 : at + 27 + header[26]]
    return at + 27 + header[26] + sum(lacing) > len(tail)


def _transport(file: BinaryIO, size: int) -> bool:
    """Packets of one length; the last one is whole."""
    head = file.read(2048)
    for length, ahead in ((188, 0), (192, 4), (204, 0)):  # bytes of a packet, and of them in front of its sync byte
        for start in range(length):
            if len(head) > start + ahead and set(head[start + ahead :: length]) == {0x47}:
                return (size - start) % length != 0
    return False


def _gif(file: BinaryIO, size: int) -> bool:
    """Blocks one after the other up to the trailer."""
    head = file.read(13)
    at = 13 + _palette(head[10]) if len(head) == 13 else size
    while at < size:
        file.seek(at)
        block = file.read(10)
        if block[:1] == b";":
            return False
        if block[:1] == b"!":
            at += 2
        elif block[:1] == b"," and len(block) == 10:
            at += 11 + _palette(block[9])
        else:
            return True
        while at < size:  # sub-blocks, each with its length in front; an empty one is the last
            file.seek(at)
            length = file.read(1)[0]
            at += 1 + length
            if length == 0:
                break
    return True


def _palette(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


CHECKS: dict[str, Callable[[BinaryIO, int], bool]] = {
    "mov": _mov,
    "matroska": _matroska,
    "asf": _asf,
    "ogg": _ogg,
    "mpegts": _transport,
    "gif": _gif,
}
