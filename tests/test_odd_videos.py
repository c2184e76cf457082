"""Files that once were read wrongly, hung, crashed or gave an error that is not ours."""

import collections
import enum
import os
import types
import warnings
from fractions import Fraction

import av
import numpy as np
import pytest
from av.stream import Disposition
from make_videos import cut, decode_all, pictures, tells_interlacing, trim, write, write_fields

from sta_adapter.errors import BackendError, ConfigError, STAWarning, VideoError
from sta_adapter.live.source import LiveSource
from sta_adapter.video import Sampling, choose_frames, frame_table, read_clip
from sta_adapter.video.decoder_parity import blends_colour, seeks_exactly, why_unlike
from sta_adapter.video.frame_table import VideoNotFoundError, _containers, decoder_of, open_video, video_stream
from sta_adapter.video.packet_bytes import FieldPairs, PacketRow, begins_afresh, keys_are_fresh
from sta_adapter.video.packet_scan import scan_packets, without_gaps


class Attached(enum.Flag):
    """A stream's disposition, as PyAV tells it before release 18."""

    cover = 0x400


@pytest.mark.parametrize(("none", "cover"), [(0, 0x401), (Attached(0), Attached.cover)], ids=["int", "flag"])
def test_dispositions_of_any_pyav(none, cover):
    streams = [types.SimpleNamespace(codec_context=object(), disposition=kind) for kind in (none, cover)]
    files = [types.SimpleNamespace(name="a.mp4", streams=types.SimpleNamespace(best=lambda _, s=s: s)) for s in streams]
    assert video_stream(files[0]) is streams[0]
    with pytest.raises(VideoError, match="only an attached cover picture"):
        video_stream(files[1])


def test_words_in_another_encoding_are_no_obstacle(tmp_path):
    path = write(tmp_path / "a.mp4")
    data = path.read_bytes()
    assert b"Lavf" in data  # who wrote it
    path.write_bytes(data.replace(b"Lavf", b"\xff\xfevf"))
    assert len(read_clip(path).frames) == 4


def test_pyav_19_is_not_told_what_to_make_of_them(tmp_path, monkeypatch):
    def opened(file, *, container_options, options):
        return file

    newer = types.SimpleNamespace(__version__="19.0.2", open=opened, formats_available=av.formats_available)
    monkeypatch.setattr(frame_table, "import_av", lambda: newer)
    assert open_video(tmp_path / "a.mp4") == str(tmp_path / "a.mp4")


@pytest.mark.parametrize(
    ("name", "how"),
    [("a.mpg", {"codec": "mpeg2video", "rate": 25}), ("a.flv", {"codec": "flv"}), ("a.ts", {}), ("a.avi", {})],
)
def test_streams_that_the_header_does_not_name(tmp_path, name, how):
    """Of which PyAV before 17.1 knows none when it is given the decoders' options."""
    path = write(tmp_path / name, **how)
    assert len(read_clip(path, num_frames=99).frames) == 20
    assert len(list(LiveSource(str(path), fps=1000, fast=True).frames())) == 20


@pytest.mark.parametrize(("release", "told"), [("17.0.0", ["a.avi", "a.mkv", "a.mp4"]), ("18.1.0", None)])
def test_decoders_options_go_where_pyav_has_room_for_them(tmp_path, monkeypatch, release, told):
    names = ["a.avi", "a.flv", "a.mkv", "a.mp4", "a.mpg", "a.ts"]
    for name in names:
        write(
            tmp_path / name, codec="mpeg2video" if name == "a.mpg" else "flv" if name == "a.flv" else "libx264", rate=25
        )

    def opened(file, *, options, **others):
        return options

    known = types.SimpleNamespace(__version__=release, open=opened, formats_available=av.formats_available)
    monkeypatch.setattr(frame_table, "import_av", lambda: known)
    assert [name for name in names if open_video(tmp_path / name, {"threads": "1"})] == (told or names)


@tells_interlacing
def test_without_word_of_interlacing_other_decoders_are_not_asked(tmp_path):
    with open_video(write(tmp_path / "a.mp4")) as container:
        stream = video_stream(container)
        first = next(container.decode(stream))
        told = types.SimpleNamespace(codec_context=types.SimpleNamespace(name="h264"), average_rate=10, frames=0)
        assert why_unlike(container, stream, first, 2.0) == ""
        assert "doesn't tell whether" in why_unlike(container, told, first, 2.0)
        assert "its times announce 1e+10 frames" in why_unlike(container, stream, first, 1e9)


@tells_interlacing
@pytest.mark.parametrize("codec", ["libx264", "libvpx", "libvpx-vp9", "mpeg4", "mjpeg", "ffv1", "huffyuv", "png"])
def test_codecs_that_are_the_same_everywhere(tmp_path, codec):
    pix_fmt = {"mjpeg": "yuvj420p", "huffyuv": "yuv422p", "png": "rgb24"}.get(codec, "yuv420p")
    with open_video(write(tmp_path / "a.nut", codec=codec, pix_fmt=pix_fmt, count=2)) as container:
        stream = video_stream(container)
        assert why_unlike(container, stream, next(container.decode(stream)), 2.0) == ""


@pytest.mark.parametrize(("name", "exactly"), [("a.mp4", True), ("a.mkv", True), ("a.nut", False), ("a.ts", False)])
def test_containers_in_which_a_frame_is_found_exactly(tmp_path, name, exactly):
    with open_video(write(tmp_path / name, count=2)) as container:
        assert seeks_exactly(container) is exactly


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv422p", "yuv444p", "rgb24", "gray"])
def test_colour_that_every_release_turns_alike(pix_fmt):
    assert not blends_colour(av.VideoFrame(64, 48, pix_fmt))
    assert blends_colour(av.VideoFrame(64, 27, pix_fmt)) is (pix_fmt == "yuv420p")


@pytest.mark.parametrize("pix_fmt", ["yuv440p", "yuv410p", "yuv411p", "yuv420p10le", "pal8"])
def test_colour_that_releases_turn_each_otherwise(pix_fmt):
    assert blends_colour(av.VideoFrame(64, 48, pix_fmt))


HEADERS = {"h264": bytes([1, 66, 0, 30, 0xFF]), "hevc": bytes([1, *[0] * 20, 0xFF])}  # lengths of four bytes


def unit(codec, kind):
    """A NAL unit of four bytes with its length in front."""
    return bytes([0, 0, 0, 4, kind << {"h264": 0, "hevc": 1}[codec], 1, 2, 3])


@pytest.mark.parametrize(
    ("codec", "kinds", "expected"),
    [
        ("h264", (7, 8, 5), True),
        ("h264", (7, 8, 1, 5), False),
        ("h264", (6,), False),
        ("hevc", (32, 33, 34, 19), True),
        ("hevc", (32, 20), True),
        ("hevc", (32, 21), False),
    ],
)
def test_a_key_frame_begins_afresh_if_its_first_picture_is_an_idr(codec, kinds, expected):
    packet = b"".join(unit(codec, kind) for kind in kinds)
    assert begins_afresh(codec, HEADERS[codec], packet) is expected
    assert begins_afresh(codec, b"\0\0\0\1" + bytes(30), packet) is False  # units that begin with a code, not a length
    assert begins_afresh(codec, None, packet) is False
    assert begins_afresh("vp9", None, packet) is None


@pytest.mark.parametrize("codec", ["h264", "hevc"])
def test_a_packet_that_ends_within_a_unit_begins_nothing(codec):
    assert begins_afresh(codec, HEADERS[codec], unit(codec, 34 if codec == "hevc" else 7) + bytes(4)) is False


def rows(*stamps, keys=(0,), fresh=True):
    return [PacketRow(stamp, at, at in keys, 1, fresh if at in keys else None) for at, stamp in enumerate(stamps)]


def test_where_decoding_may_begin():
    assert keys_are_fresh(rows(0, 3, 1, 2, 4, 6, 5, keys=(0, 4)))
    assert keys_are_fresh(rows(0, 1, keys=(0,), fresh=False))  # nothing comes before the first
    assert keys_are_fresh(rows(0, 1, 2, keys=(0, 1), fresh=None))
    assert not keys_are_fresh(rows(0, 1, 2, 3, keys=(0, 2), fresh=False))
    assert not keys_are_fresh(rows(0, 4, 3, 6, keys=(0, 1)))  # shown before the key frame that it follows
    assert not keys_are_fresh(rows(0, 1, 2, keys=(2,)))  # an edit list left out the first


def test_what_a_cut_off_file_surely_holds():
    assert without_gaps(rows(0, 3, 1, 2)) == rows(0, 3, 1, 2)
    assert [row.pts for row in without_gaps(rows(0, 5, 1, 2))] == [0, 1, 2]
    undated = [row._replace(dts=None) for row in rows(0, 5)]
    assert without_gaps(undated) == undated


@pytest.mark.parametrize(
    ("name", "how", "fresh"),
    [
        ("a.mp4", {"options": {"g": "5"}}, {True}),
        ("a.mp4", {"options": {"x264-params": "open-gop=1:keyint=5:bframes=3"}}, {True, False}),
        ("a.webm", {"codec": "libvpx-vp9", "options": {"g": "5"}}, {None}),
    ],
    ids=["closed", "open", "vp9"],
)
def test_key_frames_of_files(tmp_path, name, how, fresh):
    with open_video(write(tmp_path / name, **how)) as container:
        stream = video_stream(container)
        scan = scan_packets(container, stream, decoder_of(stream))
    assert scan.complete
    assert len(scan.rows) == 20
    assert {row.fresh for row in scan.rows if row.key} == fresh
    assert {row.fresh for row in scan.rows if not row.key} == {None}
    assert (scan.first.width, scan.first.height) == (64, 48)


@pytest.mark.parametrize("name", ["reordered.mxf", "reordered.wmv", "reordered.avi"])
@pytest.mark.parametrize("backend", ["auto", "pyav"])
def test_made_up_timestamps_do_not_reorder_frames(tmp_path, name, backend):
    path = write(tmp_path / name, rate=25, options={"bf": "2"})
    for how in ({"num_frames": 1000}, {"num_frames": 3}, {"start": 0.2, "end": 0.5, "num_frames": 4}):
        clip = read_clip(path, backend=backend, **how)
        np.testing.assert_array_equal(clip.frames, decode_all(path)[0][list(clip.metadata.indices)])
    watched = [frame.seconds for frame in LiveSource(str(path), fps=1000, fast=True).frames()]
    np.testing.assert_allclose(watched, read_clip(path, num_frames=1000).timestamps, atol=2e-3)


@tells_interlacing
@pytest.mark.parametrize(
    ("name", "how", "why"),
    [
        ("jumps.wmv", {"codec": "png", "pix_fmt": "rgb24"}, "seeking in it is not exact"),
        ("jumps.nut", {"codec": "huffyuv", "pix_fmt": "yuv422p"}, "seeking in it is not exact"),
        ("fields.mp4", {"options": {"flags": "+ilme+ildct"}}, "interlaced"),
        ("quarter.mkv", {"codec": "ffv1", "pix_fmt": "yuv410p"}, "its colour"),
        ("columns.mkv", {"codec": "ffv1", "pix_fmt": "yuv411p"}, "its colour"),
        ("rows.mkv", {"codec": "ffv1", "pix_fmt": "yuv440p"}, "its colour"),
        ("deep.mkv", {"codec": "ffv1", "pix_fmt": "rgb48le"}, "its colour"),
        ("rare.avi", {"codec": "h263p"}, "its codec"),
        ("floats.mov", {"codec": "exr", "pix_fmt": "grayf32le"}, "its codec"),
        ("century.mkv", {"ticks": range(2**36, 2**36 + 20)}, "its times announce"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value else "",
)
def test_what_decord_read_otherwise_or_crashed_at_is_left_to_pyav(tmp_path, name, how, why):
    path = write(tmp_path / name, **how)
    clip = read_clip(path, num_frames=7)
    assert clip.metadata.backend == "pyav"
    np.testing.assert_array_equal(clip.frames, decode_all(path)[0][list(clip.metadata.indices)])
    pytest.importorskip("decord")
    with pytest.raises(BackendError, match=f"decord: .*{why}"):
        read_clip(path, backend="decord")


def in_pairs(path):
    """The same packets, of which two at a time have one timestamp."""
    made = path.with_name(f"in-{path.name}")
    with av.open(str(path)) as whole, av.open(str(made), "w") as container:
        stream = container.add_stream_from_template(whole.streams.video[0])
        for number, packet in enumerate(p for p in whole.demux(video=0) if p.size):
            packet.stream, packet.time_base = stream, Fraction(1, 10)
            packet.pts, packet.dts = number // 2 * 2, number - 20
            container.mux(packet)
    return made


@tells_interlacing
def test_a_header_that_counts_frames_without_end_is_left_to_pyav(tmp_path):
    """Decord would reserve 50 GB and, where there are none, end the process."""
    path = write(tmp_path / "a.mov", codec="mpeg4")
    data, claimed = bytearray(path.read_bytes()), (2**31 - 1).to_bytes(4, "big")
    count = data.index(b"stts") + 12
    data[count : count + 4] = claimed
    path.write_bytes(data)
    clip = read_clip(path, num_frames=4)
    np.testing.assert_array_equal(clip.frames, decode_all(path)[0][list(clip.metadata.indices)])
    pytest.importorskip("decord")
    with pytest.raises(BackendError, match=r"its header announces 2.15e\+09 frames"):
        read_clip(path, num_frames=4, backend="decord")


@pytest.mark.parametrize(
    ("name", "how", "why"),
    [
        ("askew.mp4", {"rotation": 45}, "not by quarters"),
        ("askew.mkv", {"rotation": 45}, "not by quarters"),
        ("pairs.mkv", {"codec": "mpeg4"}, "its timestamps don't name its frames"),
    ],
)
def test_what_torchcodec_read_otherwise_is_left_to_pyav(tmp_path, name, how, why):
    path = write(tmp_path / name, **how)
    path = in_pairs(path) if name == "pairs.mkv" else path
    frames, _, metadata = read_clip(path, num_frames=1, start=0.3)
    if "rotation" not in how:
        np.testing.assert_array_equal(frames, decode_all(path)[0][list(metadata.indices)])
    pytest.importorskip("torchcodec", exc_type=Exception)
    with pytest.raises(BackendError, match=f"torchcodec: .*{why}"):
        read_clip(path, num_frames=1, start=0.3, backend="torchcodec")


def with_streams(path, *sizes, cover=False):
    """A file with a moving stream of each size, and a cover picture in front of them."""
    frame_table._TOLD.clear()
    with av.open(str(path), "w") as container:
        streams = []
        for number, (width, height) in enumerate(sizes):
            stream = container.add_stream("mjpeg" if cover and number == 0 else "mpeg4", rate=10)
            stream.width, stream.height = width, height
            stream.pix_fmt = "yuvj420p" if cover and number == 0 else "yuv420p"
            streams.append(stream)
        if cover:
            streams[0].disposition = Disposition.attached_pic
        for number, stream in enumerate(streams):
            count = 1 if cover and number == 0 else 9
            for tick, picture in enumerate(pictures(count, stream.width, stream.height)):
                frame = av.VideoFrame.from_ndarray(picture).reformat(format=stream.pix_fmt)
                frame.pts = tick
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("name", ["two.mp4", "two.mkv"])
def test_of_two_streams_pyav_alone_reads_one(tmp_path, name):
    path = with_streams(tmp_path / name, (32, 32), (64, 48))
    with pytest.warns(STAWarning, match="2 video streams"):
        clip = read_clip(path)
    np.testing.assert_array_equal(clip.frames, decode_all(path)[0][list(clip.metadata.indices)])
    pytest.importorskip("decord")
    with pytest.raises(BackendError, match="2 video streams"):
        read_clip(path, backend="decord")


@pytest.mark.parametrize("name", ["two.mp4", "two.mkv"])
def test_that_there_are_several_streams_is_told_once(tmp_path, name):
    """As of recorders with a camera at each end: that the other one was left out went unsaid."""
    sizes = (32, 32 if name == "two.mp4" else 16), (64, 48)
    path = with_streams(tmp_path / name, *sizes)
    with pytest.warns(
        STAWarning,
        match=rf"{name} has 2 video streams \(0: {sizes[0][0]}x{sizes[0][1]}, 1: 64x48\), and stream 0 is read.* -map 0:1 ",
    ):
        clip = read_clip(path)
    assert (clip.metadata.width, clip.metadata.height) == sizes[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error", STAWarning)
        read_clip(path)


def test_a_cover_is_no_video(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", STAWarning)
        assert len(read_clip(with_streams(tmp_path / "film.mp4", (96, 96), (64, 48), cover=True)).frames) == 4
    with pytest.raises(VideoError, match=r"song\.mp4 has no video stream, only an attached cover"):
        read_clip(with_streams(tmp_path / "song.mp4", (96, 96), cover=True))
    with pytest.raises(VideoError, match=r"song\.mp4 has no video stream, only an attached cover"):
        next(LiveSource(str(tmp_path / "song.mp4")).frames())


@pytest.mark.parametrize("name", ["list.m3u8", "list.ffconcat", "list.mp4"])
def test_lists_of_other_files_are_not_followed(tmp_path, name):
    write(tmp_path / "secret.ts")
    hls = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:2,\nsecret.ts\n#EXT-X-ENDLIST\n"
    (tmp_path / name).write_text(hls if name.endswith("m3u8") else "ffconcat version 1.0\nfile secret.ts\n")
    with pytest.raises(VideoError, match="a list of other files, which is not followed"):
        read_clip(tmp_path / name)


def test_no_kind_of_file_is_opened_that_only_names_others():
    names = {"hls", "concat", "concatf", "dash", "imf", "sdp", "rtsp", "rtp", "sap", "lavfi"}
    opened = set(_containers().split(","))
    assert not opened & names
    assert {"mov", "matroska", "avi", "mpegts"} <= opened


def test_a_pipe_is_an_error_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(VideoError, match="is a pipe or a device"):
        read_clip(tmp_path / "pipe.mp4")


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("x" * 300 + ".mp4", VideoError, "File name too long"),
        ("a\0b.mp4", VideoNotFoundError, "no such video file"),
        (
            "clips\\a.mp4",
            VideoNotFoundError,
            "no such video file; its backslashes are of Windows, write / in their place",
        ),
        (
            "https://example.org/a.mp4",
            VideoNotFoundError,
            "an address, expected a file; download it first: .*//example",
        ),
        ("loop.mp4", VideoError, "can't be read"),
    ],
    ids=["long", "null", "backslashes", "address", "loop"],
)
def test_names_that_no_file_has(tmp_path, name, error, message):
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    with pytest.raises(error, match=message):
        read_clip(name if "://" in name else tmp_path / name)


def test_a_pointer_of_git_lfs_is_told_as_that(tmp_path):
    """As each clip of a data set is that was cloned without it."""
    (tmp_path / "a.mp4").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(VideoError, match=r"a\.mp4 is a pointer of Git LFS in the place of a video: run `git lfs pull`"):
        read_clip(tmp_path / "a.mp4")


def test_pictures_without_a_decoder(tmp_path):
    path = write(tmp_path / "unknown.mpg", codec="wmv2", rate=25)
    with pytest.raises(VideoError, match="no decoder for"):
        read_clip(path)


def test_matroska_whose_segment_begins_where_the_look_at_it_ends(tmp_path):
    data = write(tmp_path / "plain.mkv").read_bytes()
    at = data.index(b"\x18\x53\x80\x67")
    fill = 4092 - at - 3
    path = tmp_path / "shifted.mkv"
    path.write_bytes(data[:at] + b"\xec" + (0x4000 | fill).to_bytes(2, "big") + bytes(fill) + data[at:])
    np.testing.assert_array_equal(read_clip(path).frames, read_clip(tmp_path / "plain.mkv").frames)


def test_side_data_that_pyav_does_not_know(tmp_path):
    assert len(read_clip(write(tmp_path / "exif.mov", codec="tiff")).frames) == 4


@pytest.mark.parametrize("how", [{"num_frames": 10**15}, {"fps": 1e300, "max_frames": 10**15}], ids=["many", "fast"])
def test_more_frames_than_memory_are_all_that_there_are(tmp_path, how):
    assert len(read_clip(write(tmp_path / "clip.mp4"), **how).frames) == 20


def test_extreme_settings(tmp_path):
    path = write(tmp_path / "clip.mp4")
    assert read_clip(path, fps=5e-324, min_frames=1).metadata.indices == (0,)
    for name in ("num_frames", "fps", "start"):
        with pytest.raises(ConfigError, match=f"{name} is 1000"):
            read_clip(path, **{name: 10**400})


def test_many_frames_around_a_leap_in_time_are_chosen_quickly():
    times = np.append(np.arange(20_000) / 10_000, 1e6)
    chosen = choose_frames(times, 1e6 + 1, Sampling(num_frames=5_000))
    assert len(chosen) == 5_000
    assert (np.diff(chosen) > 0).all()


def test_frames_that_do_not_fit_into_memory(tmp_path, monkeypatch):
    path = write(tmp_path / "clip.mp4")
    empty = np.empty  # which numpy itself calls too

    def scarce(shape, *args, **options):
        if shape == (4, 48, 64, 3):
            raise MemoryError
        return empty(shape, *args, **options)

    monkeypatch.setattr("sta_adapter.video.decoders.np.empty", scarce)
    with pytest.raises(VideoError, match="4 frames of 64x48 don't fit into memory"):
        read_clip(path, backend="pyav")


@pytest.mark.parametrize("backend", ["pyav", "auto"])
@pytest.mark.parametrize(("first", "count"), [(0, 7), (7, 33), (12, 6), (20, 20)])
def test_what_an_edit_list_shows_is_the_whole_clip(tmp_path, first, count, backend):
    path = write(tmp_path / "a.mp4", count=40, options={"g": "5"})
    whole = read_clip(path, num_frames=40).frames
    clip = read_clip(trim(path, first, count), num_frames=40, backend=backend)
    assert np.array_equal(clip.frames, whole[first : first + count])
    assert clip.timestamps.tolist() == pytest.approx(np.arange(count) / 10)
    assert clip.metadata.duration == pytest.approx(count / 10)


def same_as_decoded(path):
    """Every frame that decodes, and when it is shown."""
    clip, (stored, seconds) = read_clip(path, num_frames=1000), decode_all(path)
    np.testing.assert_array_equal(clip.frames, stored)
    np.testing.assert_allclose(clip.timestamps, seconds - seconds[0], atol=1e-6)
    np.testing.assert_array_equal(read_clip(path, fps=2).frames[0], stored[0])


@pytest.mark.parametrize(
    ("codec", "options"),
    [
        ("libx264", {"g": "20"}),
        ("mpeg2video", {"g": "15", "bf": "2"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_recording_begins_where_its_first_frame_decodes(tmp_path, codec, options):
    """A broadcast is recorded from anywhere on; the first frames refer to what was sent before."""
    data = write(tmp_path / "whole.ts", codec=codec, options=options, count=60, rate=25).read_bytes()
    (tmp_path / "late.ts").write_bytes(data[len(data) // 3 // 188 * 188 :])
    same_as_decoded(tmp_path / "late.ts")


@pytest.mark.parametrize("name", ["cut.mkv", "cut.mp4", "cut.ts"])
@pytest.mark.parametrize(
    ("codec", "options"),
    [
        ("libx264", {"x264-params": "open-gop=1:keyint=10:min-keyint=1:bframes=3:b-adapt=0:scenecut=0"}),
        ("libx265", {"x265-params": "log-level=none:open-gop=1:keyint=10:min-keyint=1:bframes=3:b-adapt=0:scenecut=0"}),
    ],
    ids=["h264", "hevc"],
)
def test_a_film_that_was_cut_at_an_open_group(tmp_path, name, codec, options):
    """As lossless cutting leaves it: the first key frame is followed by frames shown before it, which don't decode."""
    whole = write(tmp_path / f"whole-{name}", codec=codec, options=options, count=60)
    with av.open(str(whole)) as old, av.open(str(tmp_path / name), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        packets = [packet for packet in old.demux(video=0) if packet.size]
        second = [number for number, packet in enumerate(packets) if packet.is_keyframe][1]
        for packet in packets[second:]:
            packet.stream = stream
            new.mux(packet)
    assert len(decode_all(tmp_path / name)[0]) < len(packets) - second
    same_as_decoded(tmp_path / name)


@pytest.mark.parametrize("name", ["pairs.ts", "pairs.mkv", "apart.ts", "apart.mkv", "apart.mp4"])
def test_frames_of_two_fields_are_counted_once(tmp_path, name):
    """Interlaced H.264 of cameras and broadcasts: a field is a picture, and demuxers give it by itself."""
    path = write_fields(tmp_path / name, together=name.startswith("pairs"))
    assert len(decode_all(path)[0]) == 30
    same_as_decoded(path)
    clip = read_clip(path, start=0.4, end=0.8, num_frames=2)
    np.testing.assert_allclose(clip.timestamps, [0.4, 0.6])
    np.testing.assert_array_equal(clip.frames, decode_all(path)[0][[10, 15]])


def test_a_damaged_header_tells_of_no_fields():
    told = "01001101" + "0" * 16 + "1" + "1" + "010" + "0" + "11"
    told += "0" * 200 + "1" * 200  # a cycle of more pictures than could be walked over
    header = b"\0\0\1\x67" + int(told, 2).to_bytes(len(told) // 8, "big")
    for extradata in (header, b"\0\0\1\x67", b"\1" * 9, b"", None):
        assert not FieldPairs("h264", extradata).is_second(av.Packet(b"\0\0\1\x21\x88"))


@pytest.mark.parametrize("interlaced", [False, True])
def test_frames_of_one_packet_are_no_fields(tmp_path, interlaced):
    """Also where rows of two fields are coded as one picture, and where the header tells of colour and scaling."""
    options = {"flags": "+ilme+ildct"} if interlaced else {}
    for number, extra in enumerate(({}, {"x264-params": "cqm=jvt"})):
        same_as_decoded(write(tmp_path / f"{number}.mp4", options={**options, **extra}))


@pytest.mark.parametrize("rate", [10, 12], ids=["the same times", "times between"])
def test_recordings_that_were_joined_byte_by_byte_are_an_error(tmp_path, rate):
    one, other = write(tmp_path / "a.ts", count=40), write(tmp_path / "b.ts", count=40, rate=rate)
    whole = bytearray(one.read_bytes() + other.read_bytes())
    seen = collections.Counter()
    for at in range(0, len(whole), 188):  # packets go on counting, as a recorder writes them
        pid = bytes([whole[at + 1] & 31, whole[at + 2]])
        whole[at + 3] = whole[at + 3] & 0xF0 | (seen[pid] - 1 + bool(whole[at + 3] & 16)) & 15
        seen[pid] += bool(whole[at + 3] & 16)
    one.write_bytes(whole)
    with pytest.raises(VideoError, match="timestamps that jump back"):
        read_clip(one)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("cut.gif", {"codec": "gif", "pix_fmt": "rgb8"}),
        ("cut.ogv", {"codec": "libvpx"}),
        # the same bytes each time: cut between two of its packets, it would not tell that it is
        ("cut.ts", {"options": {"mbtree": "0"}}),
        ("cut.mxf", {"codec": "mpeg2video", "rate": 25}),
        ("cut.wmv", {"codec": "wmv2"}),
        ("cut.mp4", {"container_options": {"movflags": "faststart"}}),
    ],
    ids=["gif", "ogv", "ts", "mxf", "wmv", "mp4"],
)
def test_files_that_end_early(tmp_path, name, how, share):
    whole = write(tmp_path / name, count=40, **how)
    assert len(read_clip(whole, num_frames=1000).frames) == 40
    with pytest.raises(VideoError, match=r"cut off|can't be read"):
        read_clip(cut(whole, share), num_frames=1000)
