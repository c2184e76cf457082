"""Who may use the app's page, and for how long: hosts, origins, and a limit to each answer."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast
from urllib.parse import urlsplit

from torch import nn

from sta_adapter.errors import STAError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send
    from transformers import PreTrainedModel

LOCAL = ("127.0.0.1", "localhost")
EVERY_ADDRESS = ("0.0.0.0", "::")
SHARED = "*.gradio.live"  # of Gradio's own servers, for share=True


class AnswerLimit:
    """Ends a question's work: so many seconds from now (None: never), or when its asker stops it."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self.stopped = threading.Event()
        self._end = None if seconds is None else time.monotonic() + seconds

    def check(self, *_: object) -> None:
        """Go on, or raise an STAError that says why not."""
        if self.stopped.is_set():
            raise STAError("The question was stopped.")
        if self._end is not None and time.monotonic() > self._end:
            raise STAError(
                f"The answer took longer than {self.seconds:.0f} s and was stopped. Take a shorter clip or fewer frames, or "
                "start the app with a longer --time-limit."
            )

    @contextlib.contextmanager
    def over(self, model: nn.Module) -> Iterator[None]:
        """Check before each forward of a language model, so before each token that it generates."""
        hook = cast("PreTrainedModel", model).get_input_embeddings().register_forward_pre_hook(self.check)
        try:
            yield
        finally:
            hook.remove()


def trusted_hosts(host: str | None, share: bool) -> list[str]:
    """The names under which a page answers; a page of another name that resolves to this machine is none of them."""
    host = host or os.environ.get("GRADIO_SERVER_NAME") or LOCAL[0]
    if host in EVERY_ADDRESS or "SPACE_ID" in os.environ:  # by which names others reach this machine can't be known
        return ["*"]
    return [*LOCAL, *([host] if host not in LOCAL else []), *([SHARED] if share else [])]


class SameOrigin:
    """ASGI middleware that takes what changes something (uploads, questions) from the page itself alone, not from others' pages.

    Programs, which send no Origin, are not concerned.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 403."""
        if scope["type"] == "http" and scope["method"] not in ("GET", "HEAD", "OPTIONS") and _foreign(scope["headers"]):
            from starlette.responses import PlainTextResponse

            await PlainTextResponse("refused: sent by another site's page", status_code=403)(scope, receive, send)
            return
        await self.app(scope, receive, send)


def _foreign(raw: list[tuple[bytes, bytes]]) -> bool:
    headers = {name.lower(): value.decode("latin-1") for name, value in raw}
    if headers.get(b"sec-fetch-site") == "cross-site":
        return True
    origin = headers.get(b"origin")
    hosts = (headers.get(b"host"), headers.get(b"x-forwarded-host"))
    return origin is not None and urlsplit(origin).netloc not in hosts
