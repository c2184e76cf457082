"""`sta-adapter watch`: sources that come as they come, what is kept of them, and answers as of the whole clip."""

import contextlib
import http.server
import json
import threading
import time

import numpy as np
import pytest
import torch
from cases import randomize
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from tiny_qwen import make_model, make_processor, moving_square, save_base, write_video

from sta_adapter import STAConfig, get_sta, inject_sta
from sta_adapter.cli import cli
from sta_adapter.data.chat_encoding import encode_prompt
from sta_adapter.data.clip_reader import ClipReader
from sta_adapter.errors import ConfigError, STAError, VideoError
from sta_adapter.evaluation.answering import Answerer
from sta_adapter.live.feed import Feed, chunks
from sta_adapter.live.memory import FrameMemory, Step, joined
from sta_adapter.live.source import LiveFrame, LiveSource, _Clock, masked
from sta_adapter.live.watcher import Watcher, WatchSettings
from sta_adapter.video import read_clip
from sta_adapter.video.frame_settings import FrameSettings

pytest.importorskip("transformers", minversion="5")
FRAMES = FrameSettings(fps=8, min_tokens=None, max_tokens=None)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a tiny model, a causal adapter and a clip of two seconds."""
    folder = tmp_path_factory.mktemp("watch")
    processor = make_processor(folder / "tokenizer")
    save_base(folder / "base", processor)
    handle = inject_sta(make_model(processor.tokenizer), STAConfig(causal=True))
    for module in handle.blocks.values():
        randomize(module)
    handle.save_pretrained(folder / "adapter")
    write_video(folder / "clip.mp4", np.concatenate([moving_square("left"), moving_square("right")]))
    return folder


def watcher(base, window=None, **settings):
    processor = make_processor(base / "tokenizer")
    handle = inject_sta(make_model(processor.tokenizer), STAConfig(causal=True, window=window))
    for module in handle.blocks.values():
        randomize(module)
    return Watcher(handle, processor, FRAMES, WatchSettings(max_new_tokens=8, **settings))


def watched(found, source, **more):
    """All events, by kind."""
    events = {}
    for event in found.watch(source, **more):
        events.setdefault(event["event"], []).append(event)
    return events


class Frames:
    """A source in memory."""

    name, fast, timeout, broken = "made", True, 5.0, 0

    def __init__(self, pictures, rate=8.0, error=None):
        self.pictures, self.rate, self.error = pictures, rate, error

    def frames(self, stopped):
        for index, picture in enumerate(self.pictures):
            yield LiveFrame(index / self.rate, picture)
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("window", [3, None])
def test_the_answer_is_that_of_the_whole_clip(base, window):
    found = watcher(base, window, every=0, question="Which way?")
    events = watched(found, LiveSource(str(base / "clip.mp4"), fps=8, fast=True))
    (answer,), (end,) = events["answer"], events["end"]
    assert (end["steps"], end["kept"], end["dropped"], end["thinned"], end["broken"]) == (8, 8, 0, 0, 0)
    visual = ClipReader.of(found._processor, FRAMES).read([{"type": "video", "video": str(base / "clip.mp4")}])[0]
    assert len(visual.pixels) == 16
    content = [{"type": "video", "video": "x"}, {"type": "text", "text": "Which way?"}]
    prompt = encode_prompt(found._processor, [{"role": "user", "content": content}], [[visual]])
    with torch.no_grad():
        expected = Answerer(found.handle.model, found._processor, 8, 1).write([prompt])[0]
        outputs = found.handle.encoder(prompt["pixel_values_videos"], grid_thw=prompt["video_grid_thw"])
    assert answer["answer"] == expected
    kept = found.memory.output()
    assert (kept.pooler_output - outputs.pooler_output).abs().max() <= 1e-5 * outputs.pooler_output.abs().max()
    with found.handle.disabled(), torch.no_grad():
        assert not torch.allclose(
            found.handle.encoder(prompt["pixel_values_videos"], grid_thw=prompt["video_grid_thw"])[1],
            outputs[1],
            atol=1e-3,
        )


def test_a_bare_stream_without_times_is_as_long_as_it_is(tmp_path):
    """H.264 as some cameras write it: its frames have no times, and come by the rate that `read_clip` reads them with."""
    import av

    file = tmp_path / "clip.h264"
    with av.open(str(file), "w", format="h264") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width = stream.height = 64
        for picture in moving_square("left", size=64, count=100):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode())
    found = [frame.seconds for frame in LiveSource(str(file), fps=1, fast=True).frames()]
    assert found == list(read_clip(file, fps=1).metadata.timestamps) == list(range(10))  # as its pictures say


def follow(found, source, events):
    for event in found.watch(source):
        events.append(event)  # one by one: the last step raises


def broken_off(found, source, message):
    """The events until the source broke."""
    events = []
    with pytest.raises(VideoError, match=message):
        follow(found, source, events)
    return events


def test_answers_every_so_often_and_when_asked(base):
    asked = iter([None, "", None, "Up or down?"])
    events = watched(watcher(base, every=0.5), LiveSource(str(base / "clip.mp4"), fps=8, fast=True))
    assert len(events["answer"]) == 4
    assert [a["seconds"] for a in events["answer"]][:3] == [0.625, 1.125, 1.625]
    events = watched(watcher(base, every=0), Frames(moving_square("left", count=40)), asked=lambda: next(asked, None))
    assert [a["question"] for a in events["answer"]][-1] == "Up or down?"
    assert len(events["answer"]) >= 2


@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=60), budget=st.integers(5, 40))
def test_memory_keeps_to_its_budget_and_thins_what_is_old(lengths, budget):
    memory = FrameMemory(budget)
    for index, tokens in enumerate(lengths):
        memory.add(Step((float(index),), torch.full((tokens, 1), float(index)), tokens))
        assert memory.tokens <= budget
        assert memory.steps[-1].seconds == (float(index),)
    assert memory.thinned + len(memory.steps) == len(lengths)
    assert len(memory.output()) == memory.tokens
    times = [step.seconds[0] for step in memory.steps]
    assert times == sorted(times)


def test_what_goes_is_where_its_neighbours_are_closest():
    memory = FrameMemory(4)
    for second in (0.0, 5.0, 6.0, 7.0, 10.0):
        memory.add(Step((second,), torch.tensor([[second]]), 1))
    assert [step.seconds[0] for step in memory.steps] == [0, 5, 7, 10]
    assert (memory.thinned, memory.tokens) == (1, 4)


def test_outputs_are_put_together_whatever_they_are():
    parts = [{"a": torch.ones(1, 2), "b": [torch.zeros(2)], "n": 3} for _ in range(2)]
    found = joined(parts)
    assert (found["a"].shape, found["b"][0].shape, found["n"]) == ((2, 2), (4,), 3)


def test_what_is_kept_is_denser_the_newer_it_is():
    memory = FrameMemory(16)
    for index in range(1000):
        memory.add(Step((float(index),), None, 1))
    times = [step.seconds[0] for step in memory.steps]
    assert len(times) == 16
    assert (times[0], times[-1]) == (0.0, 999.0)
    gaps = np.diff(times)
    assert gaps[-1] <= 2
    assert gaps[0] > 10 * gaps[-1]
    assert sum(t > 900 for t in times) >= 5


def test_a_budget_of_tokens(base):
    found = watcher(base, every=0, budget=12)
    events = watched(found, Frames(moving_square("left", count=40)))
    (end,) = events["end"]
    assert (end["steps"], end["kept"], end["tokens"], end["thinned"]) == (20, 3, 12, 17)
    assert events["answer"][-1]["seconds"] == pytest.approx(39 / 8)


def test_frames_that_can_not_be_kept_up_with_are_dropped_and_told(base):
    found = watcher(base, every=0, waiting=2)
    encode = found._encode
    found._encode = lambda prompt: (time.sleep(0.5), encode(prompt))[1]
    began = time.perf_counter()
    events = watched(found, LiveSource(str(base / "clip.mp4"), fps=8))
    (end,) = events["end"]
    assert end["dropped"] == events["dropped"][-1]["frames"] > 0
    assert 2 * end["steps"] >= 16 - end["dropped"] > 0
    assert 0.5 <= events["dropped"][-1]["step_seconds"] <= time.perf_counter() - began


def test_frames_of_another_size_begin_anew(base):
    found = watcher(base, every=0)
    pictures = [*moving_square("left", count=5), *moving_square("left", size=24, count=6)]
    events = watched(found, Frames(pictures))
    assert "(24, 24)" in events["restart"][0]["reason"]
    assert found.stream.frames == found.memory.steps[-1].tokens // 9 * len(found.memory.steps) > 0


def test_what_was_seen_is_not_lost_when_the_source_breaks(base):
    found = watcher(base, every=0)
    events = broken_off(found, Frames(moving_square("left"), error=VideoError("the camera is gone")), "gone")
    assert [e["event"] for e in events] == ["start", "error", "answer", "end"]
    assert found.stream.frames == len(found.memory.steps) == 4


def test_other_errors_of_a_source_are_raised(base):
    with pytest.raises(ZeroDivisionError):
        watched(watcher(base, every=0), Frames(moving_square("left"), error=ZeroDivisionError()))


def test_a_source_that_says_nothing(base):
    class Silent(Frames):
        timeout, heard = 0.2, 0.0

        def frames(self, stopped):
            while not stopped():
                time.sleep(0.05)
            yield from ()

    with pytest.raises(VideoError, match="the source stalls: nothing came for 1 seconds"):
        watched(watcher(base), Silent([]))


def test_a_source_without_frames(base):
    with pytest.raises(VideoError, match="ended before its first frame"):
        watched(watcher(base), Frames([]))


def test_chunks_are_filled_up():
    assert list(chunks(iter("abcde"), 2)) == [["a", "b"], ["c", "d"], ["e", "e"]]
    assert list(chunks(iter(["a", None, "b"]), 2)) == [None, ["a", "b"]]
    assert list(chunks(iter("abcdef"), 4)) == [["a", "b", "c", "d"], ["e", "f", "f", "f"]]


def test_a_source_as_fast_as_it_is_taken_loses_nothing():
    with Feed(Frames(range(9)), 2) as feed:
        found = []
        for frame in feed.frames():
            found += [] if frame is None else [frame.pixels]
            assert len(feed._waiting) <= 2
    assert (found, feed.dropped) == (list(range(9)), 0)


def test_reading_ends_with_the_feed():
    """Of a source that never ends: its thread would read for as long as the process lives."""

    class Endless(Frames):
        fast = False

        def frames(self, stopped):
            while not stopped():
                yield LiveFrame(0.0, None)

    with Feed(Endless([]), 2) as feed:
        next(feed.frames())
    assert not feed._thread.is_alive()


def test_a_file_is_played_at_its_own_pace(base):
    began = time.monotonic()
    with Feed(LiveSource(str(base / "clip.mp4"), fps=8), 99) as feed:
        frames = [frame for frame in feed.frames() if frame is not None]
    assert [frame.seconds for frame in frames] == [i / 8 for i in range(16)]
    assert time.monotonic() - began >= 15 / 8
    assert frames[0].pixels.shape == (16, 16, 3)


@pytest.mark.parametrize(("fps", "count"), [(8, 16), (4, 8), (1, 2), (3, 6), (100, 16)])
def test_frames_a_second(base, fps, count):
    frames = list(LiveSource(str(base / "clip.mp4"), fps=fps, fast=True).frames())
    assert len(frames) == count
    assert all(frame.seconds >= index / fps - 1e-6 for index, frame in enumerate(frames) if fps < 8)


@contextlib.contextmanager
def served(handle):
    """The address of an HTTP server on loopback."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            with contextlib.suppress(ConnectionError):
                handle(self)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/live"
    finally:
        server.shutdown()
        server.server_close()


def as_stream(base):
    """The clip as MPEG-TS, which is sent as it goes."""
    path = base / "clip.ts"
    if not path.exists():
        write_video(path, np.concatenate([moving_square("left"), moving_square("right")]))
    return path.read_bytes()


@pytest.mark.parametrize("told", [True, False], ids=["of known length", "until it breaks off"])
def test_a_stream_on_loopback(base, told):
    def send(request):
        content = as_stream(base)
        request.send_response(200)
        if told:
            request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        for start in range(0, len(content), 1880):
            request.wfile.write(content[start : start + 1880])
            time.sleep(0.01)

    found = watcher(base, every=0, waiting=99)
    with served(send) as address:
        source = LiveSource(address, fps=8, timeout=5)
        if told:
            follow(found, source, events := [])
        else:
            events = broken_off(found, source, "ended or broke off")
    assert events[-1]["steps"] in ((8,) if told else (7, 8))  # the last picture's end is known by what follows it
    assert [e["event"] for e in events].count("answer") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda request: request.send_error(404), "can't be opened as a video.*404"),
        (
            lambda request: (
                request.send_response(200),
                request.end_headers(),
                request.wfile.write(b"no video " * 999),
            ),
            "can't be opened as a video",
        ),
        (lambda request: time.sleep(3), "did not answer within 1 seconds"),
    ],
    ids=["missing", "garbage", "silence"],
)
def test_addresses_that_give_no_video(base, content, message):
    with served(content) as address, pytest.raises(VideoError, match=message):
        watched(watcher(base), LiveSource(address, timeout=1))


def test_a_stream_that_stalls_keeps_what_was_seen(base):
    def send(request):
        request.send_response(200)
        request.end_headers()
        request.wfile.write(as_stream(base))
        request.wfile.flush()
        time.sleep(8)

    found = watcher(base, every=0, waiting=99)
    with served(send) as address:
        source = LiveSource(address, fps=8, timeout=1)
        events = broken_off(found, source, "stalls: nothing came for 1 seconds")
    assert [e["event"] for e in events][-3:] == ["error", "answer", "end"]
    assert found.stream.frames >= 7


def test_a_file_that_is_cut_off(base, tmp_path):
    content = as_stream(base)
    (tmp_path / "cut.ts").write_bytes(content[: len(content) * 2 // 3] + b"\xff" * 5000)
    events = watched(watcher(base, every=0), LiveSource(str(tmp_path / "cut.ts"), fps=8, fast=True))
    assert 0 < events["end"][0]["steps"] <= 8


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("nowhere.mp4", VideoError, "is not there; expected a file, an address or a camera"),
        (".", VideoError, "is a folder"),
        ("ftp://a/b", ConfigError, "no address that a video is watched from; expected rtsp, rtsps, http, https"),
        ("concat:a|b", ConfigError, "no address"),
        ("http://a/\n", ConfigError, "no address"),
        ("rtsp://" + "a" * 5000, ConfigError, "no address"),
        ("/dev/video99", VideoError, "is not there"),
    ],
)
def test_sources_that_are_none(name, error, message):
    with pytest.raises(error, match=message) as caught:
        LiveSource(name)
    assert isinstance(caught.value, STAError)


class Opened:
    """Stands for PyAV: notes how sources are opened."""

    def __init__(self, *formats):
        self.formats_available, self.calls, self.__version__ = {"v4l2", *formats}, [], "0"

    def open(self, name, **how):
        self.calls.append((name, how["format"], how["container_options"]))


def test_a_camera_is_read_as_one_and_a_file_opens_no_other(base, monkeypatch):
    av, file = Opened(), str(base / "clip.mp4")
    LiveSource(file)._open(av)
    monkeypatch.setattr("sta_adapter.live.source.os.path.exists", lambda name: True)
    monkeypatch.setattr("sta_adapter.live.source.os.path.isdir", lambda name: False)
    camera = LiveSource("/dev/video0")
    camera._open(av)
    assert av.calls == [(file, None, {"protocol_whitelist": "file"}), ("/dev/video0", "v4l2", {})]
    av.formats_available = set()
    with pytest.raises(VideoError, match="built without v4l2, so it can't read /dev/video0"):
        camera._open(av)


def test_addresses_are_opened_without_files_and_rtsp_over_tcp():
    av = Opened()
    for address in ("RTSP://camera/1", "https://host/live.m3u8"):
        LiveSource(address)._open(av)
    (_, _, camera), (_, _, page) = av.calls
    assert camera["rtsp_transport"] == "tcp"
    assert "rtsp_transport" not in page
    assert "file" not in {*camera["protocol_whitelist"].split(","), *page["protocol_whitelist"].split(",")}


def test_a_live_source_that_jumps_ahead_is_followed_at_once():
    source = LiveSource("rtsp://camera/1", timeout=5)
    clock = _Clock(source)
    clock.wait_for(1000.0, lambda: False)  # would wait for a quarter of an hour
    assert time.monotonic() - clock.began >= 1000.0
    clock.wait_for(1000.0, lambda: False)


def test_passwords_are_not_told():
    assert masked("rtsp://me:secret@camera:554/1") == "rtsp://***@camera:554/1"
    with pytest.raises(ConfigError) as caught:
        LiveSource("ftp://me:secret@host/1")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("name", ["every", "budget", "max_new_tokens", "waiting"])
def test_settings_out_of_range(name):
    with pytest.raises(ConfigError, match=f"{name} is -1; expected a number from"):
        WatchSettings(**{name: -1})


def test_a_window_of_no_frame_is_refused(base):
    found = watcher(base)
    with pytest.raises(ConfigError, match="window=0"):
        Watcher(found.handle, found._processor, FRAMES, WatchSettings(window=0))


def invoke(base, *arguments):
    options = ["--model", str(base / "base"), "--adapter", str(base / "adapter"), "--fps", "8", *arguments]
    return CliRunner().invoke(cli, ["watch", str(base / "clip.mp4"), *options])


def test_the_command_in_json(base):
    done = invoke(base, "--fast", "--json", "--every", "1", "--window", "5", "--budget", "999")
    assert done.exit_code == 0, done.output
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [e["event"] for e in events] == ["start", "answer", "answer", "end"]
    assert events[0]["window"] == 5
    assert events[-1]["steps"] == 8


def test_the_command_in_words(base):
    done = invoke(base, "--fast", "--every", "0", "--ask", "Which way?")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].startswith("watching ")
    assert "a frame looks back over 64" in lines[0]
    assert lines[1] == "[0:00:01] Which way?"
    assert "[0:00:01] ended: 8 steps encoded, 8 kept as" in lines[-1]


def test_an_adapter_that_is_not_causal(base, tmp_path):
    processor = make_processor(base / "tokenizer")
    inject_sta(make_model(processor.tokenizer)).save_pretrained(tmp_path)
    done = invoke(base, "--adapter", str(tmp_path))
    assert isinstance(done.exception, ConfigError)
    assert "made with causal=False" in str(done.exception)
    assert get_sta(make_model(processor.tokenizer)) is None
