"""Writes small videos of every awkward kind with PyAV."""

import contextlib
import os
import re
import struct
import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

tells_interlacing = pytest.mark.skipif(
    int(av.__version__.split(".")[0]) < 18,
    reason="PyAV before 18 doesn't tell whether pictures are interlaced, so that no other decoder is asked",
)


def pictures(count, width, height, seed=0):
    """(T, H, W, 3) uint8: a coloured pattern that moves, so that no two frames are the same."""
    rng = np.random.default_rng(seed)
    pattern = rng.integers(0, 255, (height // 4 + 2, width // 4 + 2, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
    return np.stack([np.roll(pattern, (2 * i, 3 * i), (0, 1))[:height, :width] for i in range(count)])


@contextlib.contextmanager
def kept_priority():
    """SVT-AV1, run as root, gives the thread that encodes the real-time priority 99, for good: all else on its core then waits."""
    policy = getattr(os, "sched_getscheduler", None)
    before = policy and (policy(0), os.sched_getparam(0))
    try:
        yield
    finally:
        if before and policy(0) != before[0]:
            os.sched_setscheduler(0, *before)


def write(
    path,
    codec="libx264",
    pix_fmt="yuv420p",
    count=20,
    width=64,
    height=48,
    rate=10,
    ticks=None,
    rotation=None,
    flip=False,
    options=None,
    container_options=None,
    colorspace=None,
    audio_seconds=0,
    frames=None,
):
    """Write `count` frames; `ticks` are their times in units of 1 / rate (default 0, 1, 2, ...)."""
    rate = Fraction(rate)
    with kept_priority(), av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.codec_context.time_base = 1 / rate
        stream.codec_context.thread_count = 1
        if colorspace is not None:
            stream.codec_context.colorspace = colorspace
        if rotation is not None:
            stream.set_display_rotation(rotation, hflip=flip)
        sound = container.add_stream("aac", rate=8000) if audio_seconds else None
        frames = pictures(count, width, height) if frames is None else frames
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24").reformat(format=pix_fmt)
            frame.pts, frame.time_base = number if ticks is None else ticks[number], 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound is not None:
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 8000 * audio_seconds), np.float32), "fltp", "mono")
            samples.sample_rate = 8000
            container.mux(sound.encode(samples))
            container.mux(sound.encode(None))
    return path


def write_sound(path):
    """A file of sound alone."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(struct.pack("<8000h", *range(8000)))
    return path


def cut(path, share):
    """The first `share` of a file's bytes, in a file beside it."""
    data = Path(path).read_bytes()
    short = Path(path).with_name(f"cut-{share}-{Path(path).name}")
    short.write_bytes(data[: int(len(data) * share)])
    return short


def trim(path, first, count):
    """Let an MP4's edit list show `count` frames from `first` on, as phones trim a video without writing it again."""
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        ticks = round(1 / (container.streams.video[0].time_base * container.streams.video[0].average_rate))
        seconds = float(count / container.streams.video[0].average_rate)
    at = data.index(b"elst") + 12  # of its only entry: how long in 1/1000 s, and from where in the track's own time
    struct.pack_into(">Ii", data, at, round(1000 * seconds), struct.unpack_from(">i", data, at + 4)[0] + first * ticks)
    path.write_bytes(data)
    return path


def number_bits(value, width):
    return format(value, f"0{width}b")


def golomb(value):
    """An Exp-Golomb code, of a number from 0."""
    code = format(value + 1, "b")
    return "0" * (len(code) - 1) + code


def h264_unit(header, bits):
    """A NAL unit with its start code; `bits` end as they should."""
    bits += "1" + "0" * (-len(bits) - 1 & 7)
    data = int(bits, 2).to_bytes(len(bits) // 8, "big")
    return b"\0\0\0\1" + bytes([header]) + re.sub(b"\0\0(?=[\0-\3])", b"\0\0\3", data)


def h264_field(number, bottom, rows):
    """A field of 64 x 32 samples as a picture of its own, nothing compressed; the fifth frame each begins anew."""
    count, fresh = number % 5, number % 5 == 0
    fresh_field = fresh and not bottom
    bits = golomb(0) + golomb(7) + golomb(0) + number_bits(count, 4) + "1" + str(bottom)
    bits += golomb(number // 5 % 2) if fresh_field else ""
    bits += number_bits(2 * count + bottom, 8) + ("00" if fresh_field else "0") + golomb(0) + golomb(1)
    for top in (0, 16):
        for left in (0, 16, 32, 48):
            bits += golomb(25)
            bits += "0" * (-len(bits) & 7) + "".join(
                number_bits(x, 8) for x in rows[top : top + 16, left : left + 16].flat
            )
            bits += number_bits(128, 8) * 128
    return h264_unit(0x65 if fresh_field else 0x21, bits)


def write_fields(path, together, count=30):
    """Interlaced H.264 of 25 frames a second, whose fields are pictures: both in one packet, or each in its own."""
    codes = [golomb(0)] * 3 + [golomb(4), golomb(1), "0", golomb(3), golomb(1), "00100"]
    begin = h264_unit(0x67, number_bits(77, 8) + number_bits(0, 8) + number_bits(30, 8) + "".join(codes))
    begin += h264_unit(0x68, "11" + "00" + "111" + "000" + "111" + "100")
    packets = []
    for number in range(count):
        picture = np.full((64, 64), 40, np.uint8)
        picture[:, 2 * number : 2 * number + 4] = 200
        fields = [h264_field(number, bottom, picture[bottom::2]) for bottom in (0, 1)]
        fields[0] = (begin if number % 5 == 0 else b"") + fields[0]
        packets += [b"".join(fields)] if together else fields
    raw = path.with_suffix(".h264")
    raw.write_bytes(b"".join(packets))
    with av.open(str(raw)) as whole, av.open(str(path), "w") as container:
        stream = container.add_stream_from_template(whole.streams.video[0])
        for number, data in enumerate(packets):
            packet = av.Packet(data)
            packet.stream, packet.time_base = stream, Fraction(1, 25 if together else 50)
            packet.pts = packet.dts = number
            packet.is_keyframe = number % (5 if together else 10) == 0
            container.mux(packet)
    return path


def decode_all(path):
    """Every frame in the order in which the decoder gives them, (F, H, W, 3) as stored, and their seconds (F,)."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    seconds = [float(frame.pts * frame.time_base) for frame in frames if frame.pts is not None]
    return np.stack([frame.to_ndarray(format="rgb24") for frame in frames]), np.array(seconds)
