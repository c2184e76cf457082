"""The corpus of broken and odd videos: a list of cases, each made when it is asked for, the same on every machine."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from make_videos import write
from odd_videos import NO_VIDEO, NONE, STAMPS, STREAMS, SVT, WRITTEN, X265, lying, no_frames, no_video, stamped, streams

COMMON = "avi ts nut wmv mpg wtv"
CODECS = {  # encoder -> (pix_fmt, containers that take it)
    "libx264": ("yuv420p", f"{COMMON} mp4 mov mkv flv mxf 3gp m4v h264 f4v ismv"),
    "libx264rgb": ("bgr0", "mp4 mkv avi nut"),
    "libx265": ("yuv420p", "mp4 mov mkv ts flv nut mpg h265 ismv"),
    "libsvtav1": ("yuv420p", "mp4 mkv webm avi flv nut wmv ivf avif obu"),
    "libvpx": ("yuv420p", f"{COMMON} mkv webm ogv ivf"),
    "libvpx-vp9": ("yuv420p", f"{COMMON} mp4 mkv webm flv ivf"),
    "mpeg1video": ("yuv420p", f"{COMMON} mp4 mov mkv m1v"),
    "mpeg2video": ("yuv420p", f"{COMMON} mp4 mov mkv mxf m2v"),
    "mpeg4": ("yuv420p", f"{COMMON} mp4 mov mkv 3gp m4v"),
    "msmpeg4": ("yuv420p", f"{COMMON} mov mkv"),
    "msmpeg4v2": ("yuv420p", COMMON),
    "mjpeg": ("yuvj420p", "mp4 mov mkv avi ts nut mjpeg"),
    "prores": ("yuv422p10le", "mov mkv mxf"),
    "prores_ks": ("yuv422p10le", "mov mkv mxf"),
    "ffv1": ("yuv420p", f"{COMMON} mp4 mkv mxf"),
    "ffvhuff": ("yuv420p", COMMON),
    "huffyuv": ("yuv422p", COMMON),
    "rawvideo": ("yuv420p", "avi ts nut wmv mpg mov mkv"),
    "wrapped_avframe": ("yuv420p", "y4m"),
    "gif": ("rgb8", "gif mov nut"),
    "apng": ("rgb24", "apng"),
    "png": ("rgb24", f"{COMMON} mp4 mov"),
    "libwebp_anim": ("yuv420p", "webp"),
    "libwebp": ("yuv420p", "webp"),
    "jpeg2000": ("yuv420p", f"{COMMON} mp4 mov mkv mxf"),
    "jpegls": ("bgr24", COMMON),
    "ljpeg": ("yuvj420p", "avi nut"),
    "flv": ("yuv420p", f"{COMMON} flv swf"),
    "flashsv": ("bgr24", "avi flv"),
    "flashsv2": ("bgr24", "flv"),
    "h263p": ("yuv420p", COMMON),
    "wmv1": ("yuv420p", COMMON),
    "wmv2": ("yuv420p", COMMON),
    "rv10": ("yuv420p", "rm"),
    "rv20": ("yuv420p", "rm"),
    "snow": ("yuv420p", "mkv avi nut"),
    "svq1": ("yuv410p", "mov avi"),
    "cinepak": ("rgb24", "mov avi"),
    "cfhd": ("yuv422p10le", "mov avi"),
    "magicyuv": ("yuv420p", "mov avi"),
    "utvideo": ("yuv420p", "avi nut"),
    "dpx": ("gray", "mov"),
    "exr": ("grayf32le", "mov"),
    "tiff": ("yuv420p", "mov"),
    "qtrle": ("rgb24", "mov"),
    "rpza": ("rgb555le", "mov avi"),
    "msvideo1": ("rgb555le", "avi"),
    "targa": ("bgr24", "mov"),
    "sgi": ("rgb24", "mov"),
    "v210": ("yuv422p10le", "mov avi"),
    "v308": ("yuv444p", "mov"),
    "v408": ("yuva444p", "mov"),
    "v410": ("yuv444p10le", "mov"),
    "r10k": ("gbrp10le", "mov"),
    "r210": ("gbrp10le", "mov avi"),
    "y41p": ("yuv411p", "avi"),
    "yuv4": ("yuv420p", "avi"),
    "asv1": ("yuv420p", "avi"),
    "asv2": ("yuv420p", "avi"),
    "cljr": ("yuv411p", "avi"),
    "amv": ("yuvj420p", "avi"),
    "speedhq": ("yuv420p", "avi"),
    "zlib": ("bgr24", "avi"),
    "roqvideo": ("yuvj444p", "roq"),
    "a64multi": ("gray", "ts"),
    "qoi": ("rgba", "ts"),
    "pam": ("rgb24", "mpg"),
}
SIZED = {  # encoders of few sizes
    "dvvideo": ("yuv420p", "mov avi mxf dv", 720, 576),
    "h261": ("yuv420p", "avi h261", 176, 144),
    "h263": ("yuv420p", "mov avi 3gp", 176, 144),
    "dnxhd": ("yuv422p", "mov mxf", 1920, 1080),
}
OPTIONS = {"libx265": X265, "libsvtav1": SVT, "dnxhd": {"b": "36M"}}
FASTSTART = {"container_options": {"movflags": "faststart"}}
WHOLE = {  # files that get damaged: every container that people exchange, groups of 8 of 24 frames
    "h264.mp4": FASTSTART,
    "h264-index-last.mp4": {},
    "h264-fragments.mp4": {"container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "hevc.mp4": {"codec": "libx265", "options": X265, **FASTSTART},
    "av1.mp4": {"codec": "libsvtav1", "options": SVT, **FASTSTART},
    "mpeg4.mov": {"codec": "mpeg4", **FASTSTART},
    "prores.mov": {"codec": "prores_ks", "pix_fmt": "yuv422p10le", **FASTSTART},
    "h264.mkv": {},
    "ffv1.mkv": {"codec": "ffv1"},
    "vp8.webm": {"codec": "libvpx"},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "mpeg4.avi": {"codec": "mpeg4"},
    "mjpeg.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "huffyuv.avi": {"codec": "huffyuv", "pix_fmt": "yuv422p"},
    "h264.ts": {},
    "mpeg2.mpg": {"codec": "mpeg2video", "rate": 25},
    "h264.flv": {},
    "vp8.ogv": {"codec": "libvpx"},
    "wmv2.wmv": {"codec": "wmv2"},
    "mpeg2.mxf": {"codec": "mpeg2video", "rate": 25},
    "mpeg4.nut": {"codec": "mpeg4"},
    "picture.gif": {"codec": "gif", "pix_fmt": "rgb8"},
    "picture.apng": {"codec": "apng", "pix_fmt": "rgb24"},
    "vp9.ivf": {"codec": "libvpx-vp9"},
    "raw.h264": {},
}
ENDINGS = ("mp4", "mkv", "avi", "ts", "gif", "jpg", "h264", "yuv", "m3u8", "txt", "")
CUTS, FLIPS = 50, 8


class Case(NamedTuple):
    """A file of the corpus. `intact` says that backends must agree about it; `whole` names what was damaged."""

    name: str
    make: Callable[[Path], Path]
    intact: bool = False
    whole: str = ""

    @property
    def kind(self):
        """What was done to it: cut, flip, codec, odd, ..."""
        kind = self.name.split("-", 1)[0]
        return "lie" if "=" in kind else kind


def whole(folder, name):
    """One of WHOLE, written once."""
    path = folder / f"whole-{name}"
    if not path.exists():
        how = {"options": {}, **WHOLE[name]}
        write(path, count=24, **{**how, "options": {"g": "8", **how["options"]}})
    return path


def _damaged(name, ending, change, folder):
    path = folder / f"case{ending if ending is not None else Path(name).suffix}"
    path.write_bytes(change(whole(folder, name).read_bytes()))
    return path


def _cut(part, data):
    return data[: max(1, len(data) * part // CUTS)]


def _flip(seed, data):
    """One of the ways in which bytes go wrong on disks and networks; the first bytes are hit more often."""
    rng, data = np.random.default_rng(seed), bytearray(data)
    at = int(rng.integers(len(data)) if rng.random() < 0.7 else rng.integers(min(600, len(data))))
    kind = seed % FLIPS
    if kind < 4:  # a few bytes anywhere, or in a row
        for place in rng.integers(0, len(data), 1 + 4 * kind) if kind % 2 else range(at, min(at + 4, len(data))):
            data[place] = int(rng.integers(256))
    elif kind == 4:
        data[at : at + 512] = bytes(len(data[at : at + 512]))
    elif kind == 5:
        del data[at : at + int(rng.integers(1, 400))]
    elif kind == 6:
        data[at:at] = data[at // 2 : at // 2 + 300]
    else:
        data[at : at + 4] = b"\xff" * len(data[at : at + 4])
    return bytes(data)


def _encoders():
    for codec, (pix_fmt, containers) in CODECS.items():
        for kind in containers.split():
            yield f"{codec}.{kind}", {"codec": codec, "pix_fmt": pix_fmt, "count": 8}
    for codec, (pix_fmt, containers, width, height) in SIZED.items():
        for kind in containers.split():
            yield f"{codec}.{kind}", {"codec": codec, "pix_fmt": pix_fmt, "width": width, "height": height, "count": 4}


def _written(name, how, folder):
    codec = how.get("codec", "libx264")
    rate = 25 if codec in SIZED or codec.startswith("mpeg") or name.endswith(".mxf") else 10
    return write(folder / name, **{"rate": rate, "options": OPTIONS.get(codec), **how})


def _stamped(name, stamps, folder):
    return stamped(folder / name, stamps)


def _streams(name, how, folder):
    return streams(folder / name, **how)


def _no_frames(name, folder):
    return no_frames(folder / name)


def _no_video(name, folder):
    return no_video(folder / name, name.rsplit(".", 1)[0])


def _damages(name):
    """(what, ending or None, change) for everything that is done to one of WHOLE."""
    number = list(WHOLE).index(name)
    yield from ((f"cut-{part}", None, functools.partial(_cut, part)) for part in range(CUTS))
    for seed in range(FLIPS * number, FLIPS * (number + 1)):
        yield f"flip-{seed}", None, functools.partial(_flip, seed)
    yield from ((what, None, change) for what, change in lying(name))
    yield "twice", None, lambda data: data + data
    yield "after-junk", None, lambda data: b"junk" * 300 + data
    yield "before-junk", None, lambda data: data + b"junk" * 300


def corpus():
    """Every case, in a shuffled order that is always the same, so that each part of it holds some of everything."""
    made = functools.partial
    cases = [Case(f"codec-{name}", made(_written, name, how), intact=True) for name, how in _encoders()]
    cases += [Case(f"odd-{name}", made(_written, name, how), intact=True) for name, how in WRITTEN.items()]
    cases += [Case(f"streams-{name}", made(_streams, name, how), intact=True) for name, how in STREAMS.items()]
    for what, stamps in STAMPS.items():
        for kind in ("mp4", "mov", "mkv", "ts") + ("avi",) * (what not in ("leap", "huge")):  # which AVI can't hold
            cases.append(Case(f"stamps-{what}.{kind}", made(_stamped, f"{what}.{kind}", stamps), intact=True))
    cases += [Case(f"odd-{name}", made(_no_frames, name), intact=True) for name in NONE]
    cases += [Case(f"not-{name}", made(_no_video, name)) for name in NO_VIDEO]
    for name in WHOLE:
        for what, ending, change in _damages(name):
            cases.append(Case(f"{what}-{name}", made(_damaged, name, ending, change), whole=name))
    for name in list(WHOLE)[::2]:
        for ending in ENDINGS:
            make = made(_damaged, name, f".{ending}" if ending else "", lambda data: data)
            cases.append(Case(f"called-{ending or 'nothing'}-{name}", make, intact=True, whole=name))
    order = np.random.default_rng(2026).permutation(len(cases))
    return [cases[place] for place in order]
