"""Videos that are whole and odd: shapes, times, colours, streams, fields that lie, and files that are no videos."""

import itertools
import os
import struct
import zipfile
from fractions import Fraction

import av
import numpy as np
from av.stream import Disposition
from make_videos import pictures, write, write_sound

TENTH = Fraction(1, 10)
X265 = {"x265-params": "log-level=none"}
SVT = {"svtav1-params": "lp=1"}
HDR = {"color_primaries": "bt2020", "color_trc": "smpte2084", "colorspace": "bt2020nc", "color_range": "tv"}
HLG = {**HDR, "color_trc": "arib-std-b67", "color_range": "pc"}
SMALL = {"count": 4}
WRITTEN = {  # name -> how tests/make_videos.py writes it
    **{f"one.{k}": {"count": 1} for k in ("mp4", "mov", "mkv", "avi", "ts", "flv", "nut", "wmv", "mpg", "h264")},
    **{f"wide-{c}.mkv": {"codec": c, "width": 10000, "height": 2, **SMALL} for c in ("libx264", "ffv1", "rawvideo")},
    **{f"tall-{c}.mkv": {"codec": c, "width": 2, "height": 10000, **SMALL} for c in ("libx264", "rawvideo")},
    "wide.mp4": {"width": 10000, "height": 2, **SMALL},
    "tall.mp4": {"width": 2, "height": 10000, **SMALL},
    "wide.webm": {"codec": "libvpx", "width": 10000, "height": 2, **SMALL},
    "wide.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p", "width": 10000, "height": 2, **SMALL},
    "wide.gif": {"codec": "gif", "pix_fmt": "rgb8", "width": 10000, "height": 2, **SMALL},
    **{f"{n}x{n}.mkv": {"codec": "ffv1", "width": n, "height": n} for n in (1, 2, 15, 17)},
    **{f"{n}x{n}.mp4": {"codec": "mpeg4", "width": n, "height": n} for n in (1, 2, 3, 15, 17)},
    **{f"odd-{c}.mkv": {"codec": c, "width": 35, "height": 27} for c in ("libvpx", "libvpx-vp9", "mpeg4", "ffv1")},
    **{f"early.{k}": {"ticks": range(-7, 13)} for k in ("mp4", "mov", "mkv", "nut")},
    **{f"late.{k}": {"ticks": range(10**6, 10**6 + 20)} for k in ("mp4", "mov", "mkv", "nut", "flv", "ts")},
    **{f"far.{k}": {"ticks": [*range(19), 10**5]} for k in ("mp4", "mkv", "nut")},
    **{
        f"variable.{k}": {"ticks": list(itertools.accumulate((1, 9, 1, 1, 40) * 4)), "rate": 30}
        for k in ("mp4", "mov", "mkv", "nut", "ts", "flv", "wmv")
    },
    "slow.mp4": {"rate": Fraction(1, 100)},
    "fast.mp4": {"rate": 960},
    "fast.mkv": {"rate": 2000},
    "10bit-h264.mp4": {"pix_fmt": "yuv420p10le"},
    "10bit-422.mkv": {"pix_fmt": "yuv422p10le"},
    "10bit-444.mkv": {"pix_fmt": "yuv444p10le"},
    "10bit-hevc.mp4": {"codec": "libx265", "pix_fmt": "yuv420p10le", "options": X265},
    "12bit-hevc.mkv": {"codec": "libx265", "pix_fmt": "yuv420p12le", "options": X265},
    "10bit-av1.mkv": {"codec": "libsvtav1", "pix_fmt": "yuv420p10le", "options": SVT},
    "10bit-ffv1.mkv": {"codec": "ffv1", "pix_fmt": "yuv420p10le"},
    "16bit-ffv1.mkv": {"codec": "ffv1", "pix_fmt": "gray16le"},
    "48bit-ffv1.mkv": {"codec": "ffv1", "pix_fmt": "rgb48le"},
    "alpha-ffv1.mkv": {"codec": "ffv1", "pix_fmt": "bgra"},
    "alpha-vp9.webm": {"codec": "libvpx-vp9", "pix_fmt": "yuva420p"},
    "alpha-prores.mov": {"codec": "prores_ks", "pix_fmt": "yuva444p10le"},
    "grey.mp4": {"pix_fmt": "gray"},
    "full-range.mp4": {"pix_fmt": "yuvj420p"},
    "422.mp4": {"pix_fmt": "yuv422p"},
    "444.mp4": {"pix_fmt": "yuv444p"},
    "411.mkv": {"codec": "ffv1", "pix_fmt": "yuv411p"},
    "410.mkv": {"codec": "ffv1", "pix_fmt": "yuv410p"},
    "hdr-h264.mp4": {"pix_fmt": "yuv420p10le", "options": HDR},
    "hdr-8bit.mp4": {"options": HDR},
    "hdr-hevc.mp4": {"codec": "libx265", "pix_fmt": "yuv420p10le", "options": {**HDR, **X265}},
    "hdr-vp9.webm": {"codec": "libvpx-vp9", "options": HDR},
    "hdr-av1.mp4": {"codec": "libsvtav1", "pix_fmt": "yuv420p10le", "options": {**HDR, **SVT}},
    "hlg-h264.mkv": {"pix_fmt": "yuv420p10le", "options": HLG},
    "hlg-8bit.mkv": {"options": HLG},
    **{
        f"turned-{turn}{'-mirrored' * flip}.{k}": {"rotation": turn, "flip": flip, "count": 8}
        for k in ("mp4", "mov", "mkv")
        for turn in (0, 90, 180, 270, 45)
        for flip in (False, True)
    },
    **{
        f"interlaced-{c}.{k}": {"codec": c, "options": {"flags": "+ilme+ildct"}}
        for c, k in (("libx264", "mp4"), ("mpeg2video", "mpg"), ("mpeg2video", "ts"), ("mpeg4", "avi"))
    },
    "open-groups.mp4": {"options": {"x264-params": "open-gop=1:keyint=6:bframes=3"}, "count": 30},
    "refresh.ts": {"options": {"x264-params": "intra-refresh=1:keyint=8"}, "count": 30},
    **{f"b-frames.{k}": {"rate": 25, "options": {"bf": "2"}} for k in ("avi", "mxf", "wmv", "wtv", "nut")},
    "sound-longer.mp4": {"audio_seconds": 5},
    "sound-longer.ts": {"audio_seconds": 5},
}


def streams(path, covers=(), moving=(), sound=None, subtitles=False):
    """A file of several streams: (codec, pix_fmt, width, height) of pictures attached and of moving ones."""
    with av.open(str(path), "w") as container:
        audio = container.add_stream(sound, rate=44100) if sound else None
        made = []
        for codec, pix_fmt, width, height in [*covers, *moving]:
            stream = container.add_stream(codec, rate=10)
            stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
            made.append(stream)
        for stream in made[: len(covers)]:
            stream.disposition = Disposition.attached_pic
        text = container.add_stream("ass") if subtitles else None
        for number, stream in enumerate(made):
            for packet in _encoded(stream, 1 if number < len(covers) else 12):
                container.mux(packet)
        if audio is not None:
            _hum(container, audio)
        if text is not None:
            packet = av.Packet(b"0,0,Default,,0,0,0,,hello")
            packet.stream, packet.time_base, packet.duration = text, Fraction(1, 1000), 500
            packet.pts = packet.dts = 100
            container.mux(packet)
    return path


def _encoded(stream, count):
    for number, picture in enumerate(pictures(count, stream.width, stream.height)):
        frame = av.VideoFrame.from_ndarray(picture).reformat(format=stream.pix_fmt)
        frame.pts, frame.time_base = number, TENTH
        yield from stream.encode(frame)
    yield from stream.encode(None)


def _hum(container, audio):
    size = audio.codec_context.frame_size or 1152
    for number in range(20):
        samples = av.AudioFrame(format=audio.codec_context.format.name, layout="stereo", samples=size)
        samples.sample_rate, samples.pts = 44100, number * size
        for plane in samples.planes:
            plane.update(bytes(plane.buffer_size))
        container.mux(audio.encode(samples))
    container.mux(audio.encode(None))


def no_frames(path):
    """A container with the header of a stream and nothing in it."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()
    return path


NONE = ("none.mp4", "none.mov", "none.mkv", "none.avi", "none.ts", "none.nut", "none.m4v")
JPEG, PNG = ("mjpeg", "yuvj420p", 128, 96), ("png", "rgb24", 128, 96)
H264, SMALLER = ("libx264", "yuv420p", 64, 48), ("libx264", "yuv420p", 32, 32)
STREAMS = {
    "cover.mp3": {"covers": [JPEG], "sound": "libmp3lame"},
    "cover.flac": {"covers": [PNG], "sound": "flac"},
    "cover.mp4": {"covers": [JPEG], "moving": [H264], "sound": "aac"},
    "cover.mkv": {"covers": [JPEG], "moving": [H264], "sound": "aac"},
    "sound.m4a": {"sound": "aac"},
    "sound.mkv": {"sound": "aac"},
    "sound.mp4": {"sound": "aac"},
    "sound.mp3": {"sound": "libmp3lame"},
    "sound.ts": {"sound": "mp2"},
    "sound.flac": {"sound": "flac"},
    **{f"two.{k}": {"moving": [SMALLER, H264]} for k in ("mp4", "mov", "mkv", "ts", "avi", "nut")},
    "subtitles.mkv": {"moving": [H264], "subtitles": True},
    "subtitles-only.mkv": {"subtitles": True},
}


def stamped(path, stamps, codec="mpeg4"):
    """Packets with these (pts, dts), in ticks of a tenth, whatever the encoder made of them; None leaves one out."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10, options={"g": "5"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for packet, (pts, dts) in zip(_encoded(stream, len(stamps)), stamps, strict=False):
            packet.time_base, packet.pts, packet.dts = TENTH, pts, dts
            container.mux(packet)
    return path


STAMPS = {
    "backwards": [(19 - n, n - 19) for n in range(20)],
    "shuffled": [(int(n), i - 20) for i, n in enumerate(np.random.default_rng(0).permutation(20))],
    "equal": [(5, n - 20) for n in range(20)],
    "pairs": [(n // 2 * 2, n - 20) for n in range(20)],
    "negative": [(n - 50, n - 50) for n in range(20)],
    "leap": [(n if n < 10 else n + 10**7, n if n < 10 else n + 10**7) for n in range(20)],
    "huge": [(n + 2**40, n + 2**40) for n in range(20)],
}

BOXES = {  # box -> where its fields lie, counted from its name
    b"mvhd": (16, 20),
    b"mdhd": (16, 20),
    b"tkhd": (24,),
    b"stts": (8, 12, 16),
    b"stsz": (8, 12),
    b"stco": (8, 12),
    b"stsc": (8, 12),
    b"stss": (8,),
    b"elst": (8, 12, 16),
}
LIES = (0, 1, 0x7FFFFFFF, 0xFFFFFFFF)


def lying(name):
    """(name, function from a whole file's bytes to those of one with a field that lies) for a kind of container."""
    if name.endswith((".mp4", ".mov")):
        for box, at in ((box, at) for box, places in BOXES.items() for at in places):
            yield from ((f"{box.decode()}{at}={lie:x}", _replacing(box, at, ">I", lie)) for lie in LIES)
        yield from ((f"size={lie:x}", _replacing(b"avc1", 28, ">I", lie)) for lie in (0, 0x00010001, 0x40004000))
    elif name.endswith((".mkv", ".webm")):
        yield from ((f"duration={x:g}", _replacing(b"\x44\x89\x88", 3, ">d", x)) for x in (0, -1, 1e300, float("nan")))
        yield from (
            (f"scale={x.hex()}", _replacing(b"\x2a\xd7\xb1\x83", 4, "3s", x))
            for x in (b"\0\0\0", b"\0\0\1", b"\xff" * 3)
        )
    elif name.endswith(".avi"):
        for field, at in (("step", 8), ("frames", 24), ("width", 40)):
            yield from ((f"{field}={lie:x}", _replacing(b"avih", at, "<I", lie)) for lie in LIES)
        for field, at in (("scale", 28), ("rate", 32), ("length", 40)):
            yield from ((f"{field}={lie:x}", _replacing(b"strh", at, "<I", lie)) for lie in LIES)
    elif name.endswith(".flv"):
        for lie in (0.0, -5.0, 1e300, float("nan")):
            yield f"duration={lie:g}", _replacing(b"duration\x00", 9, ">d", lie)
    elif name.endswith(".gif"):
        yield from ((f"size={x:x}", _replacing(b"GIF89a", 6, "<I", x)) for x in (0, 0x00010001, 0x03FF03FF, 0xFFFFFFFF))


def _replacing(mark, offset, form, value):
    def change(data):
        at = data.find(mark) + offset
        new = struct.pack(form, value)
        return data[:at] + new + data[at + len(new) :] if at >= offset else data

    return change


def no_video(path, kind):
    """Something that is no video, or that only points to one: `secret.ts` beside it."""
    write(path.with_name("secret.ts"))
    lists = {
        "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:2,\nsecret.ts\n#EXT-X-ENDLIST\n",
        "hls-net": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:2,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n",
        "concat": "ffconcat version 1.0\nfile secret.ts\n",
        "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
        "a=rtpmap:96 H264/90000\n",
        "text": "Dear video,\n" * 99,
        "empty": "",
        "one-byte": "\0",
    }
    if kind in lists:
        path.write_text(lists[kind])
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as file:
            file.write(path.with_name("secret.ts"))
    elif kind == "sound":
        write_sound(path)
    elif kind == "zeros":
        path.write_bytes(bytes(100_000))
    elif kind == "noise":
        path.write_bytes(np.random.default_rng(0).bytes(100_000))
    return path


NO_VIDEO = tuple(
    f"{kind}.{ending}"
    for kind, endings in {
        "hls": ("m3u8", "mp4"),
        "hls-net": ("m3u8",),
        "concat": ("ffconcat", "mp4"),
        "sdp": ("sdp", "mp4"),
        **dict.fromkeys(("text", "empty", "one-byte", "zip", "sound", "zeros", "noise", "pipe"), ("mp4", "avi")),
        "folder": ("mp4",),
        "loop": ("mp4",),
        "missing": ("mp4",),
    }.items()
    for ending in endings
)
