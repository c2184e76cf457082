"""What is too large is refused before memory is taken for it, and large frames are made smaller a few at a time."""

import json
import tracemalloc

import numpy as np
import pytest
from make_videos import pictures, write
from PIL import Image

from sta_adapter.data import BadSample, FrameSettings, VideoDataset
from sta_adapter.data import worker_process as isolation
from sta_adapter.data.clip_reader import ClipReader
from sta_adapter.data.worker_process import Isolated
from sta_adapter.errors import DataError, VideoError
from sta_adapter.video import budget, decoders, read_clip, read_folder
from sta_adapter.video.resize import fit_frames
from sta_adapter.visualization.viewer import Viewer


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write(tmp_path_factory.mktemp("budget") / "a.mp4", count=24)  # 64x48


@pytest.fixture
def nothing_decodes(monkeypatch):
    monkeypatch.setattr("sta_adapter.video.frame_table.scan_packets", lambda *args: pytest.fail("a frame was decoded"))
    for name in decoders.DECODERS:
        monkeypatch.setitem(decoders.DECODERS, name, lambda *args: pytest.fail("a frame was decoded"))


def test_8k_is_read_and_more_is_not():
    budget.check_frame("a.mp4", 8192, 4320)
    with pytest.raises(VideoError, match=r"a\.mp4 has frames of 8000x8000 pixels"):
        budget.check_frame("a.mp4", 8000, 8000)


def test_about_three_gigabytes_of_pixels_are_held():
    budget.check_kept("a.mp4", 1024, 1024 * 1024)
    with pytest.raises(VideoError, match="1024 frames of 1048577 pixels are more than the 1073741824 pixels"):
        budget.check_kept("a.mp4", 1024, 1024 * 1024 + 1)


def test_frames_that_are_too_large_are_not_decoded(video, monkeypatch, nothing_decodes):
    monkeypatch.setattr(budget, "FRAME_PIXELS", 64 * 48 - 1)
    with pytest.raises(VideoError, match=r"has frames of 64x48 pixels.*Write it again"):
        read_clip(video)


@pytest.mark.parametrize("how", [{}, {"end": 0.5}])
def test_a_stream_that_is_larger_than_its_container_says_is_not_decoded(video, monkeypatch, how):
    monkeypatch.setattr("sta_adapter.video.frame_table.check_frame", lambda *args: None)
    monkeypatch.setitem(budget.DECODER_LIMIT, "max_pixels", "3000")
    with pytest.raises(VideoError, match=r"decode|can't be read"):
        read_clip(video, **how)


def test_too_many_frames_are_not_decoded(video, monkeypatch):
    monkeypatch.setattr(budget, "KEPT_PIXELS", 10 * 64 * 48)
    for name in decoders.DECODERS:
        monkeypatch.setitem(decoders.DECODERS, name, lambda *args: pytest.fail("a frame was decoded"))
    with pytest.raises(VideoError, match=r"11 frames of 3072 pixels are more than"):
        read_clip(video, num_frames=11)


@pytest.mark.parametrize("backend", ["auto", "pyav"])
@pytest.mark.parametrize("chunk", [1, 64 * 48, 5 * 64 * 48, 2**26])
def test_frames_are_made_smaller_a_few_at_a_time(video, monkeypatch, backend, chunk):
    monkeypatch.setattr(decoders, "CHUNK_PIXELS", chunk)
    most = max(1, chunk // (64 * 48))
    seen = []

    def resize(frames):
        seen.append(len(frames))
        return fit_frames(frames, factor=8, min_pixels=64, max_pixels=500)

    clip = read_clip(video, num_frames=12, backend=backend, resize=resize)
    assert (sum(seen), max(seen)) == (12, min(12, most))
    assert clip.frames.shape == (12, 16, 24, 3)
    whole = fit_frames(read_clip(video, num_frames=12).frames, factor=8, min_pixels=64, max_pixels=500)
    np.testing.assert_array_equal(clip.frames, whole)
    assert (clip.metadata.width, clip.metadata.height) == (64, 48)


def test_enlarged_frames_have_a_budget(video, monkeypatch):
    monkeypatch.setattr(budget, "KEPT_PIXELS", 4 * 128 * 96)
    with pytest.raises(VideoError, match="5 frames of 12288 pixels"):
        read_clip(video, num_frames=5, resize=lambda frames: frames.repeat(2, 1).repeat(2, 2))


@pytest.mark.parametrize(("size", "fitted"), [((30, 50), (32, 48)), ((3, 21), (8, 24)), ((16, 24), (16, 24))])
def test_edges_become_the_nearest_multiples_of_a_tokens(size, fitted):
    frames = fit_frames(np.zeros((1, *size, 3), np.uint8), factor=8, min_pixels=1, max_pixels=float("inf"))
    assert frames.shape == (1, *fitted, 3)


def test_no_frame_is_enlarged_without_bounds(tmp_path, video):
    with pytest.raises(DataError, match=r"would become \d+x\d+, more than \d+ pixels; lower min_pixels"):
        fit_frames(np.zeros((1, 48, 64, 3), np.uint8), factor=8, min_pixels=10**13, max_pixels=float("inf"))
    part = {"type": "video", "video": str(video), "min_pixels": 10**8}
    record = {"messages": [{"role": "user", "content": [part]}, {"role": "assistant", "content": "x"}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    item = VideoDataset(tmp_path / "a.jsonl", None)[0]
    assert isinstance(item, BadSample)
    assert "lower min_pixels" in item.reason


def test_a_folder_of_frames_has_the_same_budget(tmp_path, monkeypatch):
    for number, picture in enumerate(pictures(6, 64, 48)):
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
    small = read_folder(tmp_path, 2.0, num_frames=6, resize=lambda frames: frames[:, ::4, ::4])
    assert small.frames.shape == (6, 12, 16, 3)
    assert (small.metadata.width, small.metadata.height) == (64, 48)
    monkeypatch.setattr(budget, "KEPT_PIXELS", 5 * 64 * 48)
    with pytest.raises(VideoError, match="6 frames of 3072 pixels"):
        read_folder(tmp_path, 2.0, num_frames=6)


def test_all_clips_of_a_sample_have_one_budget(video, monkeypatch):
    monkeypatch.setattr("sta_adapter.data.clip_reader.KEPT_PIXELS", 7 * 64 * 48)
    reader = ClipReader(FrameSettings(nframes=4, min_tokens=None, max_tokens=None))
    part = {"type": "video", "video": str(video)}
    assert len(reader.read([part])) == 1
    with pytest.raises(DataError, match="the sample's clips and pictures have 24576 pixels so far"):
        reader.read([part, part])


def test_memory_does_not_grow_with_the_number_of_large_frames(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mp4", count=24, width=640, height=480)
    monkeypatch.setattr(decoders, "CHUNK_PIXELS", 640 * 480)

    def resize(frames):
        return np.ascontiguousarray(frames[:, ::16, ::16])

    tracemalloc.start()
    try:
        read_clip(path, num_frames=24, backend="pyav", resize=resize)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6 * 640 * 480 * 3


# ---- a process of its own


@pytest.mark.skipif(not isolation.POSSIBLE, reason="needs forking on Linux")
def test_an_isolated_process_has_a_limit_of_memory():
    limited = Isolated(lambda megabytes: len(np.ones(megabytes << 20, np.uint8)), 30.0, memory=64 << 20)
    assert limited(8) == 8 << 20
    with pytest.raises(MemoryError):
        limited(200)
    assert limited(8) == 8 << 20
    limited.close()


@pytest.mark.skipif(not isolation.POSSIBLE, reason="needs forking on Linux")
def test_the_app_decodes_in_a_process_of_its_own(video, monkeypatch):
    import os

    from sta_adapter.demo import TINY_BASE

    viewer = Viewer.load(TINY_BASE)
    here = os.getpid()
    clip = viewer.read(video)
    monkeypatch.setattr(
        Viewer, "_decode", lambda self, file: pytest.fail("decoded here") if os.getpid() == here else file
    )
    np.testing.assert_array_equal(viewer.read(video).frames, clip.frames)  # by the process that was forked before
    monkeypatch.undo()
    crash = Viewer.load(TINY_BASE)
    monkeypatch.setattr(
        "sta_adapter.visualization.viewer.ClipReader.read",
        lambda *args: os.kill(os.getpid(), 9) if os.getpid() != here else 1 / 0,
    )
    with pytest.raises(VideoError, match="the process that decodes it died"):
        crash.read(video)
