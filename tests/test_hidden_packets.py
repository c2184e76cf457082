"""Packets of which no frame comes, and packets that hold two: what is counted as a frame is what is shown."""

import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from make_videos import decode_all, h264_unit, number_bits, pictures, write

from sta_adapter.errors import VideoError
from sta_adapter.video import decoders, read_clip
from sta_adapter.video.frame_table import read_frame_table
from sta_adapter.video.packet_bytes import Bits

STEP = 40  # milliseconds from a frame to the next
PACKED = b"\0\0\1\xb2DivX503b1393p"  # what XviD and DivX say of their AVI files
EMPTY = int("01" + "0" + "1" + number_bits(0, 5) + "1" + "0" * 6, 2).to_bytes(2, "big")
NOT_CODED = b"\0\0\1\xb6" + EMPTY  # MPEG-4, at 25 frames a second
HIDDEN = (3, 9, 10, 15, 33)


def greys(count):
    """(T, H, W, 3): the brightness tells which frame it is."""
    return np.stack([np.full((48, 64, 3), 10 + 4 * number, np.uint8) for number in range(count)])


def packets_of(tmp_path, codec, **options):
    source = tmp_path / ("source.avi" if codec == "mpeg4" else "source.webm")
    write(source, codec=codec, count=41, frames=greys(41), rate=25, options=options)
    with av.open(str(source)) as container:
        return source, [(bytes(packet), packet.is_keyframe) for packet in container.demux(video=0) if packet.size]


def written(path, source, packets):
    """A file of packets: each its bytes, its time in STEPs, and whether it is a key frame."""
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for data, time, key in packets:
            packet = av.Packet(data)
            packet.stream, packet.time_base, packet.is_keyframe = stream, Fraction(1, 1000), key
            packet.pts = packet.dts = int(time * STEP)
            packet.duration = STEP
            new.mux(packet)
    return path


def read_as_shown(path):
    """All frames, some of them and late ones alone, against what the decoder gives."""
    stored, seconds = decode_all(path)
    clip = read_clip(path, num_frames=1000)
    np.testing.assert_array_equal(clip.frames, stored)
    np.testing.assert_allclose(clip.timestamps, seconds - seconds[0], atol=1e-6)
    for how in ({"num_frames": 8}, {"start": 1.2, "num_frames": 3}):
        some = read_clip(path, **how)
        np.testing.assert_array_equal(some.frames, stored[list(some.metadata.indices)])
    return len(stored)


def is_b_frame(data):
    return data[data.index(b"\1\xb6") + 2] >> 6 == 2


@pytest.mark.parametrize("at", [0, 0.5], ids=["with the next", "between"])
@pytest.mark.parametrize("name", ["a.webm", "a.mkv"])
def test_alternate_references_are_no_frames(tmp_path, name, at):
    """As two passes of libvpx write VP8: with a packet of their own, often with the time of the next one."""
    source, packets = packets_of(tmp_path, "libvpx", **{"auto-alt-ref": "0", "lag-in-frames": "0", "g": "20"})
    placed, shown = [], 0
    for number, (data, key) in enumerate(packets):
        hidden = number in HIDDEN
        data = bytes([data[0] & ~0x10]) + data[1:] if hidden else data
        placed.append((data, shown - (at if hidden else 0), key))
        shown += not hidden
    path = written(tmp_path / name, source, placed)
    assert read_as_shown(path) == 41 - len(HIDDEN)
    assert read_frame_table(path).seekable


@pytest.mark.parametrize("name", ["a.avi", "a.mkv"])
@pytest.mark.parametrize("options", [{}, {"bf": "1"}], ids=["plain", "with B-frames"])
def test_pictures_that_are_not_coded_are_no_frames(tmp_path, name, options):
    source, packets = packets_of(tmp_path, "mpeg4", g="12", sc_threshold="1000000000", **options)
    left_out = [n for n, (data, _) in enumerate(packets[:38]) if n > 30 and is_b_frame(data)] or list(HIDDEN)
    placed = [(NOT_CODED if n in left_out else data, n, key) for n, (data, key) in enumerate(packets)]
    path = written(tmp_path / name, source, placed)
    assert len(read_clip(path, num_frames=1000).frames) == len(decode_all(path)[0]) == 41 - len(left_out)
    found = read_clip(path, num_frames=8)
    told = [10 + 4 * seconds * 25 for seconds in found.timestamps]
    np.testing.assert_allclose(found.frames.mean((1, 2, 3)), told, atol=4)


def write_packed(path, tmp_path, first):
    """XviD's and DivX's: a packet holds a P-frame and the B-frame before it, and an empty one follows in its place."""
    source, packets = packets_of(tmp_path, "mpeg4", bf="1", g="12", sc_threshold="1000000000")
    packed: list[tuple[bytes, bool]] = []
    for data, key in packets:
        if is_b_frame(data):
            packed[-1] = (packed[-1][0] + data, packed[-1][1])
            packed.append((NOT_CODED, False))
        else:
            packed.append((data, key))
    packed[0] = (first + packed[0][0], True)
    return written(path, source, [(data, number, key) for number, (data, key) in enumerate(packed)])


@pytest.mark.parametrize("name", ["a.avi", "a.mkv"])
def test_frames_that_are_packed_into_one_packet(tmp_path, name):
    path = write_packed(tmp_path / name, tmp_path, PACKED)
    clip = read_clip(path, num_frames=1000)
    np.testing.assert_array_equal(clip.frames, decode_all(path)[0])
    np.testing.assert_allclose(clip.timestamps, np.arange(41) / 25)
    np.testing.assert_array_equal(read_clip(path, num_frames=8).frames, clip.frames[[0, 5, 10, 15, 20, 25, 30, 35]])


def test_a_frame_that_a_file_lacks_at_its_end_leaves_the_others(tmp_path, monkeypatch):
    """By one thread, as each of several would lack its own."""
    path = write_packed(tmp_path / "a.avi", tmp_path, PACKED)
    expected, usual = read_clip(path, num_frames=8, threads=1), decoders._frames_of
    monkeypatch.setattr(decoders, "_frames_of", lambda packet, decoder: usual(packet, decoder) if packet.size else ())
    np.testing.assert_array_equal(read_clip(path, num_frames=8, threads=1).frames, expected.frames)
    with pytest.raises(VideoError, match="40 of the 41 frames asked for decode"):
        read_clip(path, num_frames=41, threads=1)


def test_a_file_of_which_fewer_frames_decode_than_it_counts_is_an_error(tmp_path):
    """Where nothing says that they are packed FFmpeg drops every second frame: which one is shown when can't be known."""
    path = write_packed(tmp_path / "a.avi", tmp_path, b"")
    with pytest.raises(VideoError, match=r"2\d frames decode of its 41 packets"):
        read_clip(path, end=0.4)


def test_frames_that_an_edit_list_shows_at_one_time_are_told_apart_by_their_order(tmp_path):
    """Two pieces of a film, of which the second begins where the first one ends, both with B-frames."""
    path = write(tmp_path / "a.mp4", count=60, options={"g": "10", "bf": "2"})
    with av.open(str(path)) as container:
        tick = round(1 / (10 * container.streams.video[0].time_base))
    show_pieces(path, [(1500, 5 * tick), (2000, 39 * tick)])
    stored, seconds = decode_all(path)
    clip = read_clip(path, num_frames=1000)
    np.testing.assert_array_equal(clip.frames, stored)
    np.testing.assert_allclose(clip.timestamps, seconds - seconds[0], atol=1e-6)


def show_pieces(path, pieces):
    """Let an MP4's edit list show pieces: each its length in 1/1000 s, and where it begins in the track's own time."""
    data = bytearray(path.read_bytes())
    at = data.index(b"elst") - 4
    box = struct.pack(">4sII", b"elst", 0, len(pieces)) + b"".join(
        struct.pack(">IiI", *piece, 1 << 16) for piece in pieces
    )
    grown = 4 + len(box) - struct.unpack_from(">I", data, at)[0]
    data[at : at + 4 + len(box) - grown] = struct.pack(">I", 4 + len(box)) + box
    for name in (b"edts", b"trak", b"moov"):  # the file's last box, so that nothing else moves
        start = data.rindex(name, 0, at) - 4
        struct.pack_into(">I", data, start, struct.unpack_from(">I", data, start)[0] + grown)
    path.write_bytes(data)


def silent_about_order(header):
    """An H.264 sequence's header without what it says of how far frames are reordered (and of all else behind the sizes)."""
    raw = header[1:].replace(b"\0\0\3", b"\0\0")
    bits = Bits(raw)
    assert bits.take(8) == 100  # the High profile
    bits.take(16)
    for _ in range(4):
        bits.golomb()
    bits.take(2)
    bits.golomb()
    if bits.golomb() == 0:
        bits.golomb()
    bits.golomb()
    bits.take(1)
    bits.golomb(), bits.golomb()
    assert bits.take(2) == 3  # frames, and the flag behind it
    if bits.take(1):
        for _ in range(4):
            bits.golomb()
    at = 8 * len(raw) - len(bits._bits)
    told = format(int.from_bytes(b"\1" + raw, "big"), "b")[1:]
    assert told[at] == "1"
    return h264_unit(header[0], told[:at] + "0")[4:]


@pytest.mark.parametrize("name", ["a.mkv", "a.flv"])
def test_frames_that_are_reordered_farther_than_it_seemed_at_first(tmp_path, name):
    """As hardware encoders write H.264: FFmpeg drops frames where it finds out that it has waited for too few."""
    still = pictures(1, 64, 48).repeat(20, 0) + np.arange(20, dtype=np.uint8)[:, None, None, None]
    frames = np.concatenate([still, pictures(60, 64, 48)])
    params = {"x264-params": "bframes=5:b-adapt=2:b-pyramid=normal:keyint=200:scenecut=0"}
    whole = write(tmp_path / "whole.mp4", count=80, frames=frames, options=params)
    with av.open(str(whole)) as old, av.open(str(tmp_path / name), "w") as new:
        source = old.streams.video[0]
        told = source.codec_context.extradata
        end = 8 + int.from_bytes(told[6:8], "big")
        header = silent_about_order(told[8:end])
        stream = new.add_stream_from_template(source)
        stream.codec_context.extradata = told[:6] + len(header).to_bytes(2, "big") + header + told[end:]
        for packet in old.demux(source):
            if packet.size:
                packet.stream = stream
                new.mux(packet)
    assert len(decode_all(tmp_path / name)[0]) < 80
    expected = decode_all(whole)[0]
    np.testing.assert_array_equal(read_clip(tmp_path / name, num_frames=80).frames, expected)
    some = read_clip(tmp_path / name, start=1.2, num_frames=10)
    np.testing.assert_array_equal(some.frames, expected[list(some.metadata.indices)])
