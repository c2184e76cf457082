"""The app: what it answers, what it says to bad files, two users at once, and the page in a real browser."""

import contextlib
import html
import itertools
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import chromium, find_chromium, requested
from cases import randomize

from sta_adapter.demo import TINY_BASE
from sta_adapter.demo.clips import render
from sta_adapter.errors import VideoError
from sta_adapter.video import write_clip
from sta_adapter.visualization.viewer import Viewer

gradio = pytest.importorskip("gradio", reason="gradio is not installed: pip install 'sta-adapter[app]'")
SPACE = Path(__file__).parents[1] / "examples/space"


@pytest.fixture(scope="module")
def viewer():
    """The tiny base with STA whose random weights change its answers."""
    found = Viewer.load(TINY_BASE, device="cpu", longest=20)
    for index, module in enumerate(found.handle.blocks.values()):
        randomize(module, seed=index, std=1.0)
    return found


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clips") / "left.mp4", render("left", 7), 8.0)


def free_port():
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def asking(viewer, **options):
    """The function behind the button, and what it says last."""
    from sta_adapter.visualization.app import build

    function = next(f.fn for f in build(viewer, **options).fns.values() if f.api_name == "ask")
    return lambda *given: list(function(*given))[-1]


@pytest.fixture
def ask(viewer):
    """See `asking`."""
    return asking(viewer)


def test_answers_are_those_of_base_and_adapter(viewer, clip):
    loaded = viewer.read(clip, "What happens?")
    base, adapted = viewer.answers(loaded)
    fresh = Viewer.load(TINY_BASE, device="cpu")
    assert fresh.answers(loaded) == (base, base)
    assert adapted != base


def test_two_users_at_once_get_what_each_alone_gets(viewer, tmp_path):
    clips = [viewer.read(write_clip(tmp_path / f"{n}.mp4", render(n, 3), 8.0)) for n in ("left", "grows")]
    alone = [(viewer.answers(clip), viewer.observe(clip)) for clip in clips]
    found, barrier = {}, threading.Barrier(2)
    inside, together, met = set(), [], threading.Event()

    def enter(module, args):
        """Whoever is in the encoder first waits for the other, who comes in unless something keeps it out."""
        inside.add(threading.get_ident())
        if len(inside) > 1:
            together.append(tuple(inside))
            met.set()
        met.wait(0.3)

    def leave(module, args, output):
        inside.discard(threading.get_ident())

    def user(index):
        torch.set_num_threads(1)
        barrier.wait()
        for turn in range(2):
            found[index, turn] = viewer.answers(clips[index]), viewer.observe(clips[index])

    encoder = viewer.handle.encoder
    hooks = [encoder.register_forward_pre_hook(enter), encoder.register_forward_hook(leave, always_call=True)]
    threads = [threading.Thread(target=user, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for hook in hooks:
        hook.remove()
    assert not together
    assert len(found) == 4
    for (index, _), (answers, seen) in found.items():
        assert answers == alone[index][0]
        np.testing.assert_array_equal(seen.change, alone[index][1].change)
        np.testing.assert_array_equal(seen.attention, alone[index][1].attention)


def test_lora_is_off_for_the_base_as_well(clip):
    peft = pytest.importorskip("peft")
    from sta_adapter import get_sta

    viewer = Viewer.load(TINY_BASE, device="cpu")
    loaded = viewer.read(clip)
    base = viewer.answers(loaded)[0]
    model = peft.get_peft_model(viewer.handle.model, viewer.handle.lora_config())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    again = Viewer(get_sta(model.eval()), viewer.processor, viewer.settings)
    assert again.answers(loaded)[0] == base
    assert again.answers(loaded)[1] != base


def test_a_clip_that_is_too_long(viewer, tmp_path):
    path = write_clip(tmp_path / "long.mp4", render("left", 1), 0.25)
    with pytest.raises(VideoError, match=r"long\.mp4 is 32 s long, and at most 20 s are allowed"):
        viewer.read(path)
    as_long_as_allowed = Viewer(viewer.handle, viewer.processor, viewer.settings, longest=32)
    assert as_long_as_allowed.read(path).frames.any()


@pytest.mark.parametrize(
    ("content", "question", "message"),
    [
        (b"this is <b>text</b>", "What?", "text.mp4 can&#x27;t be read as a video"),
        (None, "What?", "no video yet"),
        (b"", "", "no question yet"),
        (b"", "a" * 2001, "has 2,001 characters; at most 2,000 are allowed"),
    ],
    ids=["text", "no-video", "no-question", "long-question"],
)
def test_errors_are_told_in_the_page(ask, tmp_path, content, question, message):
    path = None if content is None else tmp_path / "text.mp4"
    if path is not None:
        path.write_bytes(content)
    base, adapted, page = ask(path and str(path), question)
    assert (base, adapted) == ("", "")
    assert message in page
    assert str(tmp_path) not in page


def test_an_answer_that_takes_too_long_is_given_up_and_the_next_is_not(viewer, clip):
    assert "took longer than 0 s and was stopped" in asking(viewer, time_limit=0.0)(str(clip), "What?")[2]
    assert asking(viewer)(str(clip), "What?")[:2] == viewer.answers(viewer.read(clip, "What?"))
    assert not viewer.handle.model.get_input_embeddings()._forward_pre_hooks


def test_a_question_is_stopped_by_who_asked_it(viewer, clip, monkeypatch):
    from types import SimpleNamespace

    from sta_adapter.visualization.app import build

    fns = build(viewer).fns.values()
    ask, stop = (next(f.fn for f in fns if f.fn and f.fn.__name__ == name) for name in ("ask", "stop"))
    me, other = SimpleNamespace(session_hash="me"), SimpleNamespace(session_hash="other")
    answers = viewer.answers

    def interrupted(loaded, limit, said):
        stop(other)
        limit.check()
        stop(me)
        return answers(loaded, limit=limit, said=said)

    def last(request):
        return list(ask(str(clip), "What?", None, None, request))[-1]

    monkeypatch.setattr(viewer, "answers", interrupted)
    assert "The question was stopped." in last(me)[2]
    stop(me)  # nothing runs any more
    monkeypatch.undo()
    assert last(me)[0]


def test_answers_come_as_they_grow(viewer, clip):
    """First the base's, a word more each time, then the adapter's beside it, then the pictures."""
    from sta_adapter.visualization.app import build

    function = next(f.fn for f in build(viewer).fns.values() if f.api_name == "ask")
    *growing, last = list(function(str(clip), "What happens?"))
    base, adapted = viewer.answers(viewer.read(clip, "What happens?"))
    assert last[:2] == (base, adapted)
    assert len({first for first, *_ in growing}) == len(base.split()) > 1
    for earlier, later in itertools.pairwise(growing):
        assert all(after.startswith(before) for before, after in zip(earlier[:2], later[:2], strict=True))
    assert all(not second or first == base for first, second, _ in growing)
    assert all(not pictures for *_, pictures in growing)
    assert "<iframe" in last[2]


def test_who_leaves_stops_the_model(viewer, clip):
    from sta_adapter.visualization.app import build

    function = next(f.fn for f in build(viewer).fns.values() if f.api_name == "ask")
    asked = function(str(clip), "What happens?")
    next(asked)
    asked.close()  # returns only when the model is free again
    assert viewer._lock.acquire(blocking=False)
    viewer._lock.release()


def test_frames_and_tokens_are_chosen_for_one_question(viewer, ask, clip):
    text = ask(str(clip), "What happens?", 4, None)[2]
    assert "if all 4 get the same" in html.unescape(text)
    assert viewer.read(clip, "What?").inputs["video_grid_thw"].tolist() == [[8, 4, 4]]
    few = viewer.read(clip, "What?", {"nframes": 2, "min_tokens": 1, "max_tokens": 1})
    assert few.inputs["video_grid_thw"].tolist() == [[2, 2, 2]]
    for frames, tokens, said in (
        (65, None, "frames: 65"),
        (None, -1, "tokens a frame: -1"),
        (1.5, None, "frames: 1.5"),
    ):
        assert f"{said}, expected a whole number from 1 to" in ask(str(clip), "What?", frames, tokens)[2]


def test_the_clips_to_try_are_told_apart_by_the_adapter_alone():
    from sta_adapter.tiny_base import TINY_ADAPTER
    from sta_adapter.visualization import app

    viewer = Viewer.load(TINY_BASE, TINY_ADAPTER, device="cpu")
    folder = Path(app.__file__).parent
    said = [viewer.answers(viewer.read(folder / name, "What happens?")) for name in app.EXAMPLES]
    assert [adapted for _, adapted in said] == ["left", "grows", "vanishes"]
    assert not {base for base, _ in said} & {"left", "grows", "vanishes"}


def test_names_are_on_the_page_and_only_text(viewer):
    from sta_adapter.visualization.app import build

    shown = [
        str(block.value) for block in build(viewer, title="a<b>, c & d").blocks.values() if hasattr(block, "value")
    ]
    assert any("a&lt;b&gt;, c &amp; d" in value for value in shown)
    assert not any("a<b>" in value for value in shown)


def test_questions_wait_in_a_bounded_queue(viewer):
    from sta_adapter.visualization.app import build

    page = build(viewer)
    assert page._queue.max_size == 32
    asking = [f for f in page.fns.values() if f.fn and f.fn.__name__ == "ask"]
    assert len(asking) == 2
    assert {(f.concurrency_id, f.concurrency_limit) for f in asking} == {("ask", 1)}


def test_nothing_stays_behind(tmp_path, clip):
    """The example, and what was uploaded, go with the process."""
    code = f"""
import httpx
from sta_adapter.visualization.app import serve
page = serve(block=False, port={free_port()}, device="cpu")
sent = httpx.post(page.local_url + "gradio_api/upload", files={{"files": ("a.mp4", open({str(clip)!r}, "rb").read())}})
assert sent.status_code == 200 and {str(tmp_path)!r} in sent.json()[0], sent.text
page.close()
"""
    environment = {name: value for name, value in os.environ.items() if name != "GRADIO_TEMP_DIR"}
    subprocess.run([sys.executable, "-c", code], check=True, env={**environment, "TMPDIR": str(tmp_path)})
    assert [p.name for p in tmp_path.iterdir() if "inductor" not in p.name] == []  # torch's own cache may be there


@pytest.mark.parametrize(
    ("host", "share", "space", "expected"),
    [
        (None, False, False, ["127.0.0.1", "localhost"]),
        ("127.0.0.1", True, False, ["127.0.0.1", "localhost", "*.gradio.live"]),
        ("lab.example.org", False, False, ["127.0.0.1", "localhost", "lab.example.org"]),
        ("0.0.0.0", False, False, ["*"]),
        (None, False, True, ["*"]),
    ],
)
def test_names_under_which_the_page_answers(monkeypatch, host, share, space, expected):
    from sta_adapter.visualization.page_guard import trusted_hosts

    monkeypatch.delenv("SPACE_ID", raising=False)
    if space:
        monkeypatch.setenv("SPACE_ID", "me/mine")
    assert trusted_hosts(host, share) == expected


def test_other_sites_pages_and_names_are_refused(clip):
    import httpx

    from sta_adapter.visualization.app import serve

    page = serve(block=False, port=free_port(), device="cpu")
    try:
        address = page.local_url.rstrip("/")
        upload = f"{address}/gradio_api/upload"

        def send(**headers):
            return httpx.post(upload, files={"files": ("a.mp4", clip.read_bytes())}, headers=headers).status_code

        assert send() == send(Origin=address) == 200
        assert send(Origin="https://evil.example") == send(Origin="null") == 403
        assert send(**{"Sec-Fetch-Site": "cross-site"}) == 403
        assert httpx.get(address).status_code == 200
        assert httpx.get(address, headers={"Host": "rebound.example"}).status_code == 400
    finally:
        page.close()


@contextlib.contextmanager
def no_network(monkeypatch):
    """Only addresses of this machine can be reached; others are noted."""
    asked, connect = [], socket.socket.connect

    def guarded(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "localhost", "::1", "0.0.0.0"):
            asked.append(address)
            raise OSError(f"no way to {address}")
        return connect(self, address)

    def looked_up(host, *args, **kwargs):
        if host not in (None, "127.0.0.1", "localhost", "::1", "0.0.0.0"):
            asked.append(host)
            raise OSError(f"no way to {host}")
        return found(host, *args, **kwargs)

    found = socket.getaddrinfo
    monkeypatch.setattr(socket.socket, "connect", guarded)
    monkeypatch.setattr(socket, "getaddrinfo", looked_up)
    yield asked


def test_it_starts_without_asking_anybody(monkeypatch, clip):
    from gradio_client import Client, handle_file

    from sta_adapter.visualization.app import serve

    with no_network(monkeypatch) as asked:
        said = []
        page = serve(block=False, port=free_port(), device="cpu", say=said.append)
        try:
            assert said == [f"the page is at {page.local_url}"]
            assert page.local_url.startswith("http://127.0.0.1:")
            client = Client(page.local_url, verbose=False, analytics_enabled=False)
            base, adapted, pictures = client.predict(handle_file(str(clip)), "What?", api_name="/ask")
        finally:
            page.close()
    assert base != adapted != ""  # the tiny base and the adapter that comes with it
    assert 'srcset="data:image/png' in pictures
    assert asked == []


def test_the_space_calls_the_package(monkeypatch):
    import runpy

    import sta_adapter.visualization.app

    calls = []
    monkeypatch.setattr(sta_adapter.visualization.app, "serve", lambda *args, **kwargs: calls.append((args, kwargs)))
    monkeypatch.setenv("STA_ADAPTER", "me/mine")
    monkeypatch.delenv("STA_MODEL", raising=False)
    runpy.run_path(str(SPACE / "app.py"), run_name="__main__")
    assert calls == [((None, "me/mine"), {"longest": 120.0})]
    front = (SPACE / "README.md").read_text(encoding="utf-8").split("---")[1]
    assert {"sdk: gradio", "app_file: app.py"} <= {line.strip() for line in front.splitlines()}


@pytest.mark.slow
def test_in_a_browser(viewer, clip, tmp_path):
    """Upload a clip, ask, see both answers and the attention; then a file that is no video."""
    find_chromium()
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    from sta_adapter.visualization.app import build

    page = build(viewer)
    page.launch(prevent_thread_lock=True, quiet=True, server_port=free_port(), ssr_mode=False)
    text = tmp_path / "text.mp4"
    text.write_text("no video")
    try:
        with chromium(tmp_path / "profile", dark=True) as browser:
            wait, css = WebDriverWait(browser, 90), By.CSS_SELECTOR
            browser.get(page.local_url)

            def upload(path):
                wait.until(lambda b: b.find_elements(css, "#video input[type=file]"))[0].send_keys(str(path))
                wait.until(lambda b: b.find_elements(css, "#video video"))

            def said(name):
                return browser.find_element(css, f"#{name} textarea").get_property("value")

            upload(clip)
            browser.find_element(By.ID, "ask").click()
            answers = viewer.answers(viewer.read(clip, "What happens?"))
            wait.until(lambda b: (said("base"), said("adapted")) == answers)  # whole, as they come word by word
            pictures = wait.until(lambda b: b.find_elements(css, "#pictures img"))
            assert len(pictures) == 3
            wait.until(lambda b: all(b.execute_script("return arguments[0].naturalWidth", p) > 300 for p in pictures))
            dark = browser.find_element(css, "#pictures source").get_attribute("srcset")
            assert browser.execute_script("return arguments[0].currentSrc", pictures[0]) == dark
            assert all(p.get_attribute("alt") for p in pictures)
            browser.find_element(css, "#video button[aria-label=Clear]").click()
            upload(text)
            browser.find_element(By.ID, "ask").click()
            alert = wait.until(lambda b: b.find_elements(css, "#pictures [role=alert]"))[0]
            assert "text.mp4 can't be read as a video" in alert.text
            outside = [u for u in requested(browser) if u.startswith("http") and not u.startswith(page.local_url)]
            assert outside == []
    finally:
        page.close()
