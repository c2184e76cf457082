"""A page that asks a model about a video with and without its adapter, and shows the temporal attention below.

Nothing is fetched from outside, neither by this process nor by the page.
"""

from __future__ import annotations

import html
import logging
import os
import queue
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sta_adapter._lazy import importing
from sta_adapter.errors import ConfigError, STAError
from sta_adapter.tiny_base import model_and_adapter
from sta_adapter.visualization import report
from sta_adapter.visualization.local_paths import subject, without_folders
from sta_adapter.visualization.page_guard import AnswerLimit, SameOrigin, trusted_hosts
from sta_adapter.visualization.viewer import LoadedClip, Viewer

if TYPE_CHECKING:
    from starlette.middleware import Middleware

logger = logging.getLogger(__name__)
EXAMPLES = ("moves-left.mp4", "grows.mp4", "vanishes.mp4")  # of the demo's clips, in looks that its adapter never saw
LONGEST = 120.0  # seconds of a clip
LARGEST = "200mb"
LONGEST_QUESTION = 2000  # characters
WAITING = 32  # questions; more are refused
TIME_LIMIT = 300.0  # seconds of a question's work
MOST_FRAMES, MOST_TOKENS = 64, 1024  # that a question may ask for
PATCH_BUDGET = 2 << 20  # bytes of attention that an answer brings along
INTRO = """# Ask about a video

The model answers twice: as it is, and with its adapter, whose stacked temporal attention looks from frame to frame.
Below the answers stands what that attention did.
"""
UNTRAINED = """
> **No adapter was given.** STA is untrained here: both answers are the same, and the maps show chance.
> Start the app with `--adapter`, for example with the adapter that `sta-adapter demo` trains.
"""
CSS = """
.names { overflow-wrap: anywhere; font-size: 1.05rem; }
.answer textarea { font-size: 1.05rem; }
.message { border-left: 4px solid #D55E00; padding: 0.4rem 0.8rem; font-size: 1.05rem; }
footer { display: none !important; }
"""


def serve(
    model: str | os.PathLike[str] | None = None,
    adapter: str | os.PathLike[str] | None = None,
    *,
    host: str | None = None,
    port: int | None = None,
    share: bool = False,
    longest: float = LONGEST,
    title: str | None = None,
    time_limit: float | None = TIME_LIMIT,
    block: bool = True,
    say: Callable[[str], None] = logger.info,
    **options: Any,
) -> Any:
    """Load a model and its adapter, and serve the page until it is interrupted.

    Args:
        model: Hub id or folder; None takes the demo's tiny base, with its adapter unless another one is named.
        adapter: Hub id or folder; None beside a model shows untrained STA.
        host: address to listen on; None takes GRADIO_SERVER_NAME's, else this machine alone.
        port: None takes GRADIO_SERVER_PORT's, else the first free one from 7860.
        share: ask Gradio for a public address, which sends everything through its servers.
        longest: seconds; longer clips are refused.
        title: of the page; None names model and adapter.
        time_limit: seconds after which a question is given up, so that it can't hold up all others; None for no limit.
        block: stay here until interrupted.
        say: is told the page's address.
        options: of `Viewer.load`.

    Returns:
        The running `gradio.Blocks`; `close()` ends it.

    Raises:
        MissingExtraError: Gradio is not installed.
        ConfigError: the address or the port isn't available.
    """
    folder = tempfile.TemporaryDirectory(prefix="sta-adapter-")  # gone with the process, and all that was uploaded
    os.environ.setdefault("GRADIO_TEMP_DIR", folder.name)
    gradio = _gradio()
    _require_port(host, port)
    model, adapter = model_and_adapter(model, adapter)
    viewer = Viewer.load(model, adapter, longest=longest, **options)
    page = build(viewer, title=title or subject(model, adapter), time_limit=time_limit)
    page.upload_folder = folder
    page.launch(
        server_name=host,
        server_port=port,
        share=share,
        max_file_size=LARGEST,
        ssr_mode=False,
        prevent_thread_lock=True,
        quiet=True,
        theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=CSS,
        app_kwargs={"middleware": _middleware(trusted_hosts(host, share))},
    )
    say(f"the page is at {page.share_url or page.local_url}")
    if block:
        page.block_thread()
    return page


def _middleware(hosts: list[str]) -> list[Middleware]:
    """What answers under these names alone, and only to the page itself."""
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    return [Middleware(TrustedHostMiddleware, allowed_hosts=hosts), Middleware(SameOrigin)]


def _require_port(host: str | None, port: int | None) -> None:
    """Look whether the page can be served, before the model is loaded; without a port Gradio looks for one itself."""
    address = host or os.environ.get("GRADIO_SERVER_NAME") or "127.0.0.1"
    wanted = port or os.environ.get("GRADIO_SERVER_PORT")
    try:
        number = int(wanted or 0)
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        socket.create_server((address, number), family=family).close()
    except (OSError, ValueError, OverflowError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise ConfigError(
            f"the page can't be served at {address}{f':{wanted}' if wanted else ''}: {reason}. Take another --port, or leave it "
            "out to get a free one; --host 127.0.0.1 is this machine."
        ) from error


def build(viewer: Viewer, *, title: str = "sta-adapter", time_limit: float | None = TIME_LIMIT) -> Any:
    """The page as a `gradio.Blocks`, not yet served.

    Args:
        viewer: the model to ask.
        title: the names of model and adapter, on the page and on the browser's tab.
        time_limit: seconds after which a question is given up; None for no limit.
    """
    gradio = _gradio()
    ask, stop = _functions(viewer, time_limit)
    for function in (ask, stop):  # Gradio passes what is declared as its request
        function.__annotations__["request"] = gradio.Request
    with gradio.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gradio.Markdown(INTRO + ("" if viewer.trained else UNTRAINED))
        gradio.HTML(f'<p class="names" id="names">Model and adapter: <b>{html.escape(title)}</b></p>')
        with gradio.Row():
            video = gradio.Video(label="Video", sources=["upload"], height=320, elem_id="video")
            with gradio.Column():
                question = gradio.Textbox(
                    label="Question", value="What happens?", lines=2, elem_id="question", max_length=LONGEST_QUESTION
                )
                with gradio.Row():
                    settings = [_number(gradio, "Frames", MOST_FRAMES), _number(gradio, "Tokens a frame", MOST_TOKENS)]
                with gradio.Row():
                    button = gradio.Button("Ask", variant="primary", elem_id="ask")
                    stop_button = gradio.Button("Stop", elem_id="stop")
                clips = [[path, "What happens?"] for path in _examples(page)]
                gradio.Examples(clips, [video, question], label="Clips to try")
        with gradio.Row():
            base = gradio.Textbox(label="Base model", lines=3, elem_id="base", elem_classes="answer")
            adapted = gradio.Textbox(label="With the adapter", lines=3, elem_id="adapted", elem_classes="answer")
        pictures = gradio.HTML(elem_id="pictures")
        asked = {"inputs": [video, question, *settings], "outputs": [base, adapted, pictures], "concurrency_id": "ask"}
        asking = [
            button.click(ask, **asked, api_name="ask", concurrency_limit=1),  # the others wait in the queue
            question.submit(ask, **asked, api_name=False, concurrency_limit=1),
        ]
        stop_button.click(stop, api_name=False, queue=False, cancels=asking)
        page.unload(stop)
    return page.queue(max_size=WAITING)


def _functions(
    viewer: Viewer, time_limit: float | None
) -> tuple[Callable[..., Iterator[tuple[str, str, str]]], Callable[..., None]]:
    """What the page calls to ask a question, and to stop the one that its session asks."""
    running: dict[str | None, AnswerLimit] = {}  # by session

    def ask(
        path: str | None,
        question: str | None,
        frames: float | None = None,
        tokens: float | None = None,
        request: object = None,
    ) -> Iterator[tuple[str, str, str]]:
        session = getattr(request, "session_hash", None)
        limit = running[session] = AnswerLimit(time_limit)
        try:
            yield from _ask(viewer, path, question, _frame_settings(frames, tokens), limit)
        except STAError as error:
            said = html.escape(without_folders(str(error), [Path(path).parent] if path else ()))
            alert = f'<div class="sta-look message" role="alert"><strong>That did not work.</strong> {said}</div>'
            yield "", "", alert
        finally:
            limit.stopped.set()
            running.pop(session, None)

    def stop(request: object = None) -> None:
        limit = running.get(getattr(request, "session_hash", None))
        if limit is not None:
            limit.stopped.set()

    return ask, stop


def _number(gradio: Any, label: str, most: int) -> Any:
    """A field for a whole number up to `most`; 0, as which the page also sends an empty field, leaves what was trained."""
    info, name = f"up to {most}; 0: as trained", label.lower().split()[0]
    return gradio.Number(0, label=label, info=info, precision=0, minimum=0, maximum=most, elem_id=name, min_width=120)


def _frame_settings(frames: float | None, tokens: float | None) -> dict[str, int]:
    """Fields of `FrameSettings` from what the page's fields hold; the page's own bounds bind no program."""
    for name, value, most in (("frames", frames, MOST_FRAMES), ("tokens a frame", tokens, MOST_TOKENS)):
        if value and not (isinstance(value, (int, float)) and 1 <= value <= most and value == int(value)):
            raise ConfigError(
                f"{name}: {value!r}, expected a whole number from 1 to {most}, or 0 for what was trained."
            )
    chosen = {"nframes": int(frames)} if frames else {}
    return {**chosen, "min_tokens": 1, "max_tokens": int(tokens)} if tokens else chosen


def _ask(
    viewer: Viewer, path: str | None, question: str | None, frames: dict[str, int], limit: AnswerLimit
) -> Iterator[tuple[str, str, str]]:
    """Both answers as they grow, and then the pictures as HTML."""
    if not path:
        raise STAError("There is no video yet: choose a file, or a clip to try.")
    if not (question or "").strip():
        raise STAError("There is no question yet: write one.")
    if len(str(question)) > LONGEST_QUESTION:
        raise STAError(f"The question has {len(str(question)):,} characters; at most {LONGEST_QUESTION:,} are allowed.")
    clip = viewer.read(path, str(question).strip(), frames)
    base = adapted = ""
    for base, adapted in _growing(viewer, clip, limit):
        yield base, adapted, ""
    seen = viewer.observe(clip, limit, PATCH_BUDGET)
    shown, times, why = clip.step_frames(seen)
    noted = report.notes(seen, why, trained=True)  # the page says at its top whether there is an adapter
    found = report.sections(seen, shown, times, noted=noted, budget=PATCH_BUDGET, framed=True)
    yield base, adapted, found


def _growing(viewer: Viewer, clip: LoadedClip, limit: AnswerLimit) -> Iterator[tuple[str, str]]:
    """Both answers each time that one of them has grown; the model runs in a thread meanwhile."""
    told: queue.SimpleQueue[tuple[str, str] | None] = queue.SimpleQueue()

    def work() -> tuple[str, str]:
        try:
            return viewer.answers(clip, limit=limit, said=lambda base, adapted: told.put((base, adapted)))
        finally:
            told.put(None)

    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(work)
        try:
            while (said := told.get()) is not None:
                yield said
        finally:  # whoever asked may have gone
            if not answers.done() and said is not None:
                limit.stopped.set()
        yield answers.result()


def _examples(page: Any) -> list[str]:
    """Copies of the clips to try, which go with the page."""
    folder = page.example_folder = tempfile.TemporaryDirectory(prefix="sta-adapter-")
    return [shutil.copy(Path(__file__).parent / name, folder.name) for name in EXAMPLES]


def _gradio() -> Any:
    """Gradio, told to report nothing to anybody."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    with importing("the app needs Gradio ({}): pip install 'sta-adapter[app]'"):
        import gradio
    return gradio
