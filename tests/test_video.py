"""Video files: the same frames from every backend, chosen by time; a clear error for whatever can't be read."""

import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from make_videos import cut, decode_all, pictures, tells_interlacing, write, write_sound

import sta_adapter
from sta_adapter.errors import BackendError, ConfigError, MissingExtraError, STAError, VideoError
from sta_adapter.live.source import LiveSource
from sta_adapter.video import Sampling, choose_frames, decoders, read_clip, write_clip
from sta_adapter.video.frame_settings import FrameSettings
from sta_adapter.video.frame_table import read_frame_table

IRREGULAR = [0, 3, 4, 5, 9, 20, 21, 22, 30, 31, 32, 33, 40, 41, 42, 44, 47, 50, 51, 52]
X265 = {"x265-params": "log-level=none"}
GROUPS = {"g": "10"}
# name -> how it is written, and whether decord reads it exactly as PyAV does (else it must say that it doesn't)
FILES = {
    "plain.mp4": ({}, True),
    "groups.mp4": ({"options": GROUPS, "count": 60}, True),
    "groups.mkv": ({"options": GROUPS, "count": 60}, True),
    "b_frames.mp4": ({"options": {"bf": "3", "g": "12"}, "count": 40}, True),
    "pyramid.mp4": ({"options": {"x264-params": "bframes=5:b-adapt=0:b-pyramid=normal:keyint=24"}, "count": 40}, True),
    "slices.mp4": ({"options": {"x264-params": "bframes=2:slices=4"}, "count": 30}, True),
    "faststart.mov": ({"container_options": {"movflags": "faststart"}}, True),
    "fragments.mp4": ({"options": GROUPS, "count": 30, "container_options": {"movflags": "frag_keyframe"}}, True),
    "vp9.webm": ({"codec": "libvpx-vp9", "options": {"g": "8"}}, True),
    "vp8.webm": ({"codec": "libvpx", "options": {"auto-alt-ref": "1", "lag-in-frames": "16"}}, True),
    "mpeg4.avi": ({"codec": "mpeg4"}, True),
    "mjpeg.avi": ({"codec": "mjpeg", "pix_fmt": "yuvj420p"}, True),
    "hevc.mp4": ({"codec": "libx265", "options": X265}, True),
    "lossless.mkv": ({"codec": "ffv1", "pix_fmt": "bgr0"}, True),
    "grey.mp4": ({"pix_fmt": "gray"}, True),
    "hd_colours.mp4": ({"colorspace": 1}, True),
    "wide.mp4": ({"width": 426, "height": 240, "count": 8}, True),
    "ntsc.mp4": ({"rate": "30000/1001", "count": 60}, True),
    "ntsc.mkv": ({"rate": "30000/1001", "count": 60}, True),
    "irregular.mp4": ({"ticks": IRREGULAR, "rate": 30}, True),
    "irregular.mkv": ({"ticks": IRREGULAR, "rate": 30}, True),
    "late.mp4": ({"ticks": range(50, 70)}, True),
    "late.mkv": ({"ticks": range(50, 70)}, True),
    "sound_longer.mkv": ({"audio_seconds": 4}, True),
    "odd_full_colour.mp4": ({"width": 35, "height": 27, "pix_fmt": "yuv444p"}, True),
    "odd_width.webm": ({"width": 35, "codec": "libvpx-vp9"}, True),
    "sound.mp4": ({"audio_seconds": 2}, True),
    "one.mp4": ({"count": 1}, True),
    "one.mkv": ({"count": 1}, True),
    "odd.mp4": ({"width": 35, "height": 27, "codec": "mpeg4"}, False),
    "odd.webm": ({"width": 35, "height": 27, "codec": "libvpx-vp9"}, False),
    "narrow.mp4": ({"width": 48}, False),
    "ten_bit.mp4": ({"pix_fmt": "yuv420p10le"}, False),
    "before_zero.mp4": ({"ticks": range(-5, 15)}, False),
    "open_groups.mp4": ({"options": {"x264-params": "open-gop=1:keyint=6:bframes=3"}, "count": 40}, False),
    "refresh.mp4": ({"options": {"x264-params": "intra-refresh=1:keyint=8"}, "count": 40}, False),
    "b_frames.avi": ({"codec": "mpeg4", "options": {"bf": "2"}}, False),
    "h264.avi": ({}, False),
    "stream.ts": ({"options": GROUPS, "count": 40}, False),
    "raw.h264": ({}, False),
    "animation.gif": ({"codec": "gif", "pix_fmt": "rgb8"}, False),
    "quarter.mp4": ({"rotation": 90}, False),
    "quarter.mkv": ({"rotation": 90}, False),
    "half.mp4": ({"rotation": 180}, False),
    "three_quarters.mp4": ({"rotation": 270}, False),
    "odd_quarter.mp4": ({"rotation": 90, "width": 35, "height": 27, "codec": "mpeg4"}, False),
    "mirrored.mp4": ({"rotation": 0, "flip": True}, False),
}


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")

    def get(name):
        path = folder / name
        return path if path.exists() else write(path, **FILES[name][0])

    return get


def upright(name, stored):
    """What FILES[name] is to look like, from its stored pictures."""
    how = FILES[name][0]
    if how.get("flip"):
        return stored[:, :, ::-1]
    return np.rot90(stored, how.get("rotation", 0) // 90, axes=(1, 2))


@pytest.mark.parametrize("name", FILES)
def test_pyav_returns_every_frame_upright(video, name):
    stored, _ = decode_all(video(name))
    clip = read_clip(video(name), num_frames=1000, backend="pyav")
    np.testing.assert_array_equal(clip.frames, upright(name, stored))
    assert clip.frames.dtype == np.uint8
    assert clip.frames.shape[1:3] == (clip.metadata.height, clip.metadata.width)


@pytest.mark.parametrize("name", FILES)
def test_watching_a_file_gives_the_same_frames(video, name):
    found = list(LiveSource(str(video(name)), fps=1000, fast=True).frames())
    clip = read_clip(video(name), num_frames=1000)
    np.testing.assert_array_equal([frame.pixels for frame in found], clip.frames)
    np.testing.assert_allclose([frame.seconds for frame in found], clip.timestamps, atol=2e-3)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", [{"num_frames": 5}, {"fps": 3.7}], ids=["five", "by_fps"])
def test_auto_returns_what_pyav_returns(video, name, how):
    expected, clip = read_clip(video(name), backend="pyav", **how), read_clip(video(name), **how)
    np.testing.assert_array_equal(clip.frames, expected.frames)
    np.testing.assert_array_equal(clip.timestamps, expected.timestamps)
    everything = read_clip(video(name), num_frames=1000, backend="pyav")
    np.testing.assert_array_equal(clip.frames, everything.frames[list(clip.metadata.indices)])


@tells_interlacing
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", [{"num_frames": 5}, {"num_frames": 1000}], ids=["some", "all"])
def test_decord_returns_the_same_or_declines(video, name, how):
    pytest.importorskip("decord")
    if not FILES[name][1]:
        with pytest.raises(BackendError, match=r"decord: .*backend='auto'"):
            read_clip(video(name), backend="decord", **how)
        return
    clip = read_clip(video(name), backend="decord", **how)
    np.testing.assert_array_equal(clip.frames, read_clip(video(name), backend="pyav", **how).frames)
    assert clip.metadata.backend == "decord"


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", ["b_frames.mp4", "pyramid.mp4", "slices.mp4", "groups.mkv", "open_groups.mp4"])
def test_each_frame_alone_is_the_same_though_others_are_passed_over(video, name, threads, monkeypatch):
    decoded, usual = [], decoders._frames_of
    expected, table = read_clip(video(name), num_frames=1000).frames, read_frame_table(video(name))
    monkeypatch.setattr(decoders, "_frames_of", lambda *args: [decoded.append(f) or f for f in usual(*args)])
    for index in range(len(expected)):
        frames = decoders.decode_pyav(table, np.array([index]), threads)
        np.testing.assert_array_equal(frames[0], expected[index])
    everything = sum(index - max(np.flatnonzero(table.keys[: index + 1])) + 1 for index in range(len(expected)))
    assert (len(decoded) < everything) == (not table.unlike)  # PyAV before 18 tells too little of a file


@pytest.mark.parametrize("name", FILES)
def test_torchcodec_returns_the_same_or_declines(video, name):
    pytest.importorskip("torchcodec", exc_type=Exception)
    expected = read_clip(video(name), num_frames=5, backend="pyav")
    try:
        clip = read_clip(video(name), num_frames=5, backend="torchcodec")
    except BackendError:
        assert not FILES[name][1]
    else:
        np.testing.assert_array_equal(clip.frames, expected.frames)


@pytest.mark.parametrize(
    "backend", ["pyav", *(pytest.param(name, marks=tells_interlacing) for name in ("decord", "torchcodec"))]
)
@pytest.mark.parametrize("name", ["groups.mp4", "b_frames.mp4", "lossless.mkv", "vp9.webm"])
def test_any_number_of_threads_gives_the_same_frames(video, name, backend):
    if backend != "pyav":
        pytest.importorskip(backend, exc_type=Exception)
    expected = read_clip(video(name), num_frames=1000, backend="pyav").frames
    for threads in (1, 3):
        clip = read_clip(video(name), num_frames=1000, backend=backend, threads=threads)
        np.testing.assert_array_equal(clip.frames, expected)


def test_av1_goes_to_pyav(tmp_path, capfd):
    policy = getattr(os, "sched_getscheduler", lambda process: None)
    before = policy(0)
    path = write(tmp_path / "av1.mp4", codec="libsvtav1", options={"svtav1-params": "lp=1"})
    assert policy(0) == before  # which the encoder changes
    capfd.readouterr()
    clip = read_clip(path, num_frames=4)
    assert clip.metadata.backend == "pyav"
    np.testing.assert_array_equal(clip.frames, decode_all(path)[0][::5])


def test_size_that_changes_on_the_way_is_an_error(tmp_path):
    small, large = write(tmp_path / "a.h264", options={"bf": "0"}), write(tmp_path / "b.h264", width=96, count=5)
    path = tmp_path / "joined.h264"
    path.write_bytes(small.read_bytes() + large.read_bytes())
    with pytest.raises(VideoError, match="size changes from 64x48 to 96x48"):
        read_clip(path, num_frames=100)


def test_reading_leaves_no_file_open(video):
    path = video("groups.mp4")
    for backend in ("auto", "pyav"):
        read_clip(path, backend=backend)
    opened = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0
    for backend in ("auto", "pyav") * 5:
        read_clip(path, backend=backend)
    assert opened == (len(list(Path("/proc/self/fd").iterdir())) if opened else 0)


# timestamps and sampling


@pytest.mark.parametrize("name", ["irregular.mp4", "irregular.mkv", "late.mp4", "late.mkv", "b_frames.mp4"])
def test_timestamps_are_the_files_counted_from_its_first_frame(video, name):
    _, seconds = decode_all(video(name))
    clip = read_clip(video(name), num_frames=1000)
    np.testing.assert_allclose(clip.timestamps, seconds - seconds[0], atol=1e-9)


def test_irregular_frames_are_those_shown_at_the_target_times(video):
    clip = read_clip(video("irregular.mp4"), fps=3)  # targets 0, 10, 20, ... 50 of 55 thirtieths
    assert [IRREGULAR[i] for i in clip.metadata.indices] == [0, 9, 20, 30, 40, 50]
    np.testing.assert_allclose(clip.timestamps, np.array([0, 9, 20, 30, 40, 50]) / 30, atol=1e-9)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({}, [0, 10, 20, 30, 40, 50]),
        ({"fps": 2}, list(range(0, 60, 5))),
        ({"fps": 0.1}, [0, 15, 30, 45]),
        ({"fps": 10, "max_frames": 6}, [0, 10, 20, 30, 40, 50]),
        ({"fps": 1000, "max_frames": 100}, list(range(60))),
        ({"num_frames": 3}, [0, 20, 40]),
        ({"num_frames": 60}, list(range(60))),
        ({"num_frames": 1}, [0]),
        ({"start": 2, "end": 4, "num_frames": 4}, [20, 25, 30, 35]),
        ({"start": 1.95, "end": 2.15, "num_frames": 9}, [20, 21]),
        ({"start": 5, "end": 99}, [50, 52, 55, 57]),
    ],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_which_frames_of_six_seconds_at_ten_a_second(video, how, expected):
    for name in ("groups.mp4", "groups.mkv"):
        assert list(read_clip(video(name), **how).metadata.indices) == expected


@pytest.mark.parametrize("name", ["ntsc.mp4", "ntsc.mkv"])
def test_sampling_at_the_native_rate_takes_each_frame_once(video, name):
    clip = read_clip(video(name), fps=30000 / 1001, max_frames=100)
    assert list(clip.metadata.indices) == list(range(60))


@pytest.mark.parametrize("name", ["one.mp4", "one.mkv"])
def test_one_frame_gives_one_frame(video, name):
    frames, timestamps, metadata = read_clip(video(name))
    assert frames.shape == (1, 48, 64, 3)
    assert timestamps.tolist() == [0.0]
    assert metadata.total_frames == 1
    assert metadata.duration == pytest.approx(0.1)


@st.composite
def tables(draw):
    gaps = draw(st.lists(st.floats(1e-3, 20), min_size=0, max_size=80))
    times = np.concatenate([[0.0], np.cumsum(gaps)])
    return times, float(times[-1]) + draw(st.floats(1e-3, 20))


@given(
    tables(),
    st.one_of(st.none(), st.floats(0.01, 200)),
    st.one_of(st.none(), st.integers(1, 100)),
    st.integers(1, 40),
    st.integers(0, 40),
    st.floats(0, 0.99),
    st.floats(0.01, 1.2),
)
def test_sampling_keeps_its_promises(table, fps, num_frames, least, extra, begin, length):
    times, duration = table
    fps = None if num_frames is not None else fps
    start, end = begin * duration, (begin + length) * duration
    sampling = Sampling(fps, num_frames, least, least + extra, start, end)
    inside = np.flatnonzero((times >= start) & (times < end))
    if inside.size == 0:
        with pytest.raises(VideoError, match="no frame begins from"):
            choose_frames(times, duration, sampling)
        return
    chosen = choose_frames(times, duration, sampling)
    assert (np.diff(chosen) > 0).all()
    assert set(chosen) <= set(inside)
    if num_frames is not None:
        assert len(chosen) == min(num_frames, inside.size)
    else:
        assert min(least, inside.size) <= len(chosen) <= least + extra


def test_late_frames_are_reached_without_decoding_all_before_them(video, monkeypatch):
    whole = decode_all(video("groups.mp4"))[0]
    monkeypatch.setattr("sta_adapter.video.decoders._in_order", lambda *args: pytest.fail("decoded from the beginning"))
    clip = read_clip(video("groups.mp4"), num_frames=2, start=2.0, backend="pyav")
    np.testing.assert_array_equal(clip.frames, whole[list(clip.metadata.indices)])


def test_metadata(video):
    metadata = read_clip(video("quarter.mp4"), num_frames=4).metadata
    assert (metadata.width, metadata.height, metadata.rotation) == (48, 64, 90)
    assert (metadata.total_frames, metadata.indices) == (20, (0, 5, 10, 15))
    assert (metadata.fps, metadata.duration) == (pytest.approx(10), pytest.approx(2))
    assert metadata.backend == "pyav"


def test_metadata_makes_transformers_video_metadata(video):
    video_utils = pytest.importorskip("transformers.video_utils")
    if not hasattr(video_utils, "VideoMetadata"):
        pytest.skip("this transformers has no VideoMetadata")
    clip = read_clip(video("plain.mp4"), num_frames=4)
    metadata = video_utils.VideoMetadata(**clip.metadata.for_transformers())
    assert (metadata.total_num_frames, list(metadata.frames_indices)) == (20, [0, 5, 10, 15])


# what can't be read


def not_a_video(folder, kind):
    path = folder / f"{kind}.mp4"
    if kind == "folder":
        path.mkdir()
    elif kind == "sound":
        write_sound(path)
    elif kind == "unfinished":
        path = cut(write(path), 0.6)
    elif kind != "missing":
        path.write_bytes({"empty": b"", "text": b"Dear video,\n" * 99, "noise": bytes(range(256)) * 40}[kind])
    return path


@pytest.mark.parametrize("backend", ["auto", "pyav", "decord", "torchcodec"])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "no such video file"),
        ("folder", "is a folder; .* a folder of pictures is a video with folder_fps"),
        ("empty", r"is empty \(0 bytes\)"),
        ("text", "can't be read as a video"),
        ("noise", "can't be read as a video"),
        ("sound", r"no video stream \(streams: audio\)"),
        ("unfinished", "can't be read as a video"),
    ],
)
def test_what_is_no_video(tmp_path, kind, message, backend):
    path = not_a_video(tmp_path, kind)
    with pytest.raises(VideoError, match=message) as caught:
        read_clip(path, backend=backend)
    assert path.name in str(caught.value)
    assert isinstance(caught.value, OSError)
    assert isinstance(caught.value, FileNotFoundError) == (kind == "missing")


@pytest.mark.parametrize("share", [0.25, 0.6, 0.9])
@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("cut.mkv", {"options": GROUPS}),
        ("cut.webm", {"codec": "libvpx-vp9", "options": GROUPS}),
        ("cut.mp4", {"options": GROUPS, "container_options": {"movflags": "faststart"}}),
    ],
    ids=["mkv", "webm", "mp4"],
)
def test_cut_off_files_are_an_error_unless_what_is_there_is_asked_for(tmp_path, name, how, share):
    whole = write(tmp_path / name, count=60, **how)
    path = cut(whole, share)
    with pytest.raises(VideoError, match=r"cut off or damaged: \d+ whole frames, up to .* pass end=") as caught:
        read_clip(path)
    with pytest.raises(VideoError, match="cut off"):
        read_clip(path, end=5.99)
    end = float(str(caught.value).split("end=")[1].split()[0])
    assert 0 < end < 6
    head = read_clip(path, num_frames=1000, end=end)
    assert len(head.frames) == round(10 * end)
    np.testing.assert_array_equal(
        head.frames, read_clip(whole, num_frames=1000, backend="pyav").frames[: len(head.frames)]
    )


def test_frames_that_do_not_decode_are_an_error(tmp_path):
    path = write(tmp_path / "damaged.mp4", count=60, options={"g": "20"})
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        at = [packet.pos for packet in container.demux(video=0) if packet.size][30]
    data[at : at + 300] = bytes(300)
    path.write_bytes(data)
    with pytest.raises(VideoError, match=r"damaged\.mp4 .*pyav: \d+ of the 60 frames asked for decode"):
        read_clip(path, num_frames=60)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"start": 2}, "the video lasts 2 s"),
        ({"start": 7, "end": 8}, "the video lasts 2 s"),
        ({"start": 0.51, "end": 0.59}, r"nearest to the start begin at 0\.5, 0\.6 s"),
    ],
    ids=["from_the_end", "beyond", "between_two"],
)
def test_ranges_without_a_frame(video, how, message):
    with pytest.raises(VideoError, match=message):
        read_clip(video("plain.mp4"), **how)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"fps": 1, "num_frames": 4}, "both given; pass one"),
        ({"fps": 0}, "fps is 0; expected a finite number above 0"),
        ({"fps": float("nan")}, "fps is nan"),
        ({"fps": float("inf")}, "fps is inf"),
        ({"fps": "2"}, "fps is '2'"),
        ({"fps": True}, "fps is True"),
        ({"num_frames": 0}, "num_frames is 0; expected a whole number"),
        ({"num_frames": 2.0}, r"num_frames is 2\.0"),
        ({"num_frames": True}, "num_frames is True"),
        ({"min_frames": 0}, "min_frames is 0"),
        ({"max_frames": None}, "max_frames is None"),
        ({"min_frames": 9, "max_frames": 8}, "min_frames=9 is above max_frames=8"),
        ({"start": -1}, "start is -1; expected a finite number at least 0"),
        ({"end": 0}, "end is 0; expected a finite number above 0"),
        ({"start": 2, "end": 1}, "start=2 and end=1 leave no time"),
        ({"start": 1, "end": 1}, "start=1 and end=1 leave no time"),
        ({"threads": 0}, "threads is 0; expected a whole number from 1 to 256, or None"),
        ({"threads": 10**12}, "threads is 1000000000000; expected"),
        ({"threads": True}, "threads is True"),
        ({"threads": "2"}, "threads is '2'"),
        ({"backend": "opencv"}, "no video backend is called 'opencv'; choose auto, decord, pyav, torchcodec"),
    ],
    ids=lambda value: str(value).replace(" ", "")[:40] if isinstance(value, dict) else "",
)
def test_bad_arguments(video, how, message):
    with pytest.raises(ConfigError, match=message):
        read_clip(video("plain.mp4"), **how)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fps": 0}, "fps is 0, expected a number above 0, up to 1000"),
        ({"fps": "2"}, "fps is '2', expected a number above 0"),
        ({"nframes": 2.5}, r"nframes is 2\.5, expected a whole number from 1, up to 16384"),
        ({"max_frames": True}, "max_frames is True, expected a whole number from 1"),
        ({"max_tokens": 0}, "max_tokens is 0, expected a whole number from 1, up to 1048576"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens 9 is above max_tokens 8"),
        ({"backend": 3}, "backend is 3, expected a name"),
    ],
)
def test_frame_settings_that_can_not_be(changes, message):
    with pytest.raises(ConfigError, match=message):
        FrameSettings(**changes)


def test_frame_settings_that_can_be():
    assert (
        FrameSettings(fps=1.5, max_frames=1, max_tokens=1).min_frames == 4
    )  # a default gives way to a smaller maximum


def test_path_of_another_type():
    with pytest.raises(ConfigError, match="path is 7; expected a str"):
        read_clip(7)


# backends


@pytest.mark.parametrize("name", ["decord", "torchcodec", "av"])
def test_backend_that_is_not_installed(video, monkeypatch, name):
    path = video("plain.mp4")
    expected = read_clip(path, backend="pyav")
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, f"{name}.decoders", None)
    with pytest.raises(MissingExtraError, match="pip install"):
        read_clip(path, backend="pyav" if name == "av" else name)
    if name != "av":
        clip = read_clip(path)
        assert clip.metadata.backend == "pyav"
        np.testing.assert_array_equal(clip.frames, expected.frames)


@tells_interlacing
def test_decord_bridge_is_left_as_it_was(video):
    decord = pytest.importorskip("decord")
    import torch

    decord.bridge.set_bridge("torch")
    try:
        clip = read_clip(video("plain.mp4"), backend="decord")
        assert isinstance(decord.VideoReader(str(video("plain.mp4")))[0], torch.Tensor)
    finally:
        decord.bridge.set_bridge("native")
    assert type(clip.frames) is np.ndarray
    np.testing.assert_array_equal(clip.frames, read_clip(video("plain.mp4"), backend="pyav").frames)


def test_importing_loads_no_decoder():
    code = (  # a bare parent package, so that only this part of sta_adapter is loaded
        "import sys, types\n"
        "sys.modules['sta_adapter'] = parent = types.ModuleType('sta_adapter')\n"
        f"parent.__path__ = {list(sta_adapter.__path__)!r}\n"
        "import sta_adapter.video\n"
        "print(sorted({'av', 'decord', 'torchcodec', 'torch', 'transformers'} & set(sys.modules)))\n"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_names_with_colons_percents_and_spaces(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "a: 100%d.mp4", pictures(5, 16, 16), fps=5)
    monkeypatch.chdir(tmp_path)
    np.testing.assert_array_equal(read_clip("a: 100%d.mp4").frames, read_clip(str(path)).frames)


# writing


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
@pytest.mark.parametrize("fps", [8, 29.97, 0.5])
def test_written_clip_reads_back(tmp_path, suffix, fps):
    frames = np.full((9, 32, 48, 3), 40, np.uint8) + np.arange(9, dtype=np.uint8)[:, None, None, None] * 20
    path = write_clip(tmp_path / f"clip{suffix}", frames, fps)
    clip = read_clip(path, num_frames=9)
    assert np.abs(clip.frames.astype(int) - frames).max() <= 6
    np.testing.assert_allclose(clip.timestamps, np.arange(9) / fps, atol=2e-3)
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


def test_writing_again_gives_the_same_bytes(tmp_path):
    """Each time, also where x264's own defaults give now this and now that."""
    frames = pictures(24, 96, 96)
    assert len({write_clip(tmp_path / "a.mp4", frames, 8).read_bytes() for _ in range(20)}) == 1


@pytest.mark.parametrize(
    ("frames", "fps", "message"),
    [
        (np.zeros((4, 16, 16, 3), np.float32), 8, r"float32 of shape \(4, 16, 16, 3\); expected uint8"),
        (np.zeros((4, 3, 16, 16), np.uint8), 8, r"expected uint8 \(T, H, W, 3\)"),
        (np.zeros((0, 16, 16, 3), np.uint8), 8, "at least one frame"),
        (np.zeros((4, 27, 35, 3), np.uint8), 8, "35x27 pixels; .* even width and height"),
        (np.zeros((4, 16, 16, 3), np.uint8), 0, "fps is 0"),
        (np.zeros((4, 16, 16, 3), np.uint8), "8", "fps is '8'"),
    ],
    ids=["float", "channels_first", "none", "odd", "no_rate", "text_rate"],
)
def test_frames_that_can_not_be_written(tmp_path, frames, fps, message):
    with pytest.raises(ConfigError, match=message):
        write_clip(tmp_path / "clip.mp4", frames, fps)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["absent/clip.mp4", "clip.txt", "clip.webm", "clip"])
def test_places_that_can_not_be_written_to(tmp_path, name):
    with pytest.raises(VideoError, match="can't be written"):
        write_clip(tmp_path / name, pictures(2, 16, 16), 8)
    assert list(tmp_path.iterdir()) == []


def test_failed_writing_keeps_the_old_file(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "clip.mp4", pictures(3, 16, 16), 8)
    before = path.read_bytes()
    monkeypatch.setattr("sta_adapter.video.writer._encode", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(STAError, match="disk full"):
        write_clip(path, pictures(5, 16, 16), 8)
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["clip.mp4"]
