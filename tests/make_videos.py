"""Writes small videos of every awkward kind with PyAV."""

import contextlib
import os
import struct
import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


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


def decode_all(path):
    """Every frame in the order in which the decoder gives them, (F, H, W, 3) as stored, and their seconds (F,)."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    seconds = [float(frame.pts * frame.time_base) for frame in frames if frame.pts is not None]
    return np.stack([frame.to_ndarray(format="rgb24") for frame in frames]), np.array(seconds)
