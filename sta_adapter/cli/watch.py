"""`sta-adapter watch`: a model that watches a file, an address or a camera, and answers while it does."""

from __future__ import annotations

import json
import queue
import sys
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import click

from sta_adapter.cli.options import (
    Grouped,
    adapter_options,
    find_adapter,
    frame_rate,
    model_options,
    option,
    viewer_settings,
)
from sta_adapter.requirements import require_device

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from sta_adapter.cli.options import ModelOptions
    from sta_adapter.visualization.viewer import Viewer

    class Options(ModelOptions):
        """Those of the command, but for the ones that it names itself."""

        model: str
        ask: str | None
        every: float
        fps: float | None
        window: int | None
        budget: int
        timeout: float
        fast: bool


HELP = """\b
Example: sta-adapter watch rtsp://camera/1 --model ID --adapter ADAPTER

Encodes frames as they come, each once, and answers every few seconds, or
when Enter is pressed (a line of text is a new question). SOURCE is a file,
played at its own pace, an address (rtsp, rtsps, http, https) or a camera
such as /dev/video0. The adapter is one trained with causal=True.
"""


@click.command(cls=Grouped, needs={"train": ("torchvision", "PIL")}, help=HELP)
@click.argument("source")
@option("What", "--model", metavar="ID", required=True, help="Model on the Hub, or its folder.")
@option("What", "--adapter", metavar="ID", required=True, help="Causal adapter on the Hub, or its folder.")
@option("What", "--ask", metavar="TEXT", help="The question. [default: what happens]")
@option(
    "What", "--every", type=float, default=10.0, show_default=True, help="Seconds between answers; 0: only at the end."
)
@option("What", "--device", metavar="DEVICE", help="cpu, cuda:1, ... [default: CUDA if it is there]")
@option("Frames", "--fps", type=float, metavar="RATE", help="Frames a second. [default: as trained]")
@option("Frames", "--window", type=int, metavar="N", help="Frames to look back. [default: adapter's, or 64]")
@option(
    "Frames",
    "--budget",
    type=int,
    default=4096,
    show_default=True,
    help="Visual tokens to keep; older frames thin out.",
)
@option(
    "Frames",
    "--timeout",
    type=float,
    default=10.0,
    show_default=True,
    help="Stop after this many seconds without a frame.",
)
@option("Frames", "--fast", is_flag=True, help="Read a file as fast as it can be encoded.")
@option("Result", "--json", "as_json", is_flag=True, help="Print a line of JSON for each event.")
@model_options
@adapter_options
def command(source: str, adapter: str, as_json: bool, **options: Unpack[Options]) -> None:
    """Watch, and print what happens."""
    from sta_adapter.errors import ConfigError
    from sta_adapter.live.source import LiveSource
    from sta_adapter.live.watcher import Watcher, WatchSettings

    require_device(options["device"])
    if not 0 < options["timeout"] < float("inf"):
        raise ConfigError(f"--timeout {options['timeout']}: expected seconds above 0.")
    question = WatchSettings.question if options["ask"] is None else options["ask"]
    settings = WatchSettings(question, options["every"], options["window"], options["budget"])
    live = LiveSource(
        source, timeout=options["timeout"], fast=options["fast"]
    )  # that is not there is known before the model
    viewer = load_viewer(adapter, options)
    live.fps = viewer.settings.fps
    watcher = Watcher(viewer.handle, viewer.processor, viewer.settings, settings)
    for event in watcher.watch(live, _asked() if sys.stdin.isatty() else lambda: None):
        click.echo(json.dumps(event) if as_json else described(event))


def load_viewer(adapter: str, options: Options) -> Viewer:
    """Model, processor and adapter."""
    from sta_adapter.visualization.viewer import Viewer

    folder = find_adapter(adapter, options["adapter_revision"])
    return Viewer.load(options["model"], folder, frames=frame_rate(options["fps"], None), **viewer_settings(options))


def described(event: Mapping[str, Any]) -> str:
    """An event in words, for a terminal."""
    seconds = event.get("seconds", 0.0)
    at = f"[{int(seconds // 3600)}:{int(seconds // 60 % 60):02}:{int(seconds % 60):02}]"
    kind = event["event"]
    if kind == "start":
        return f"watching {event['source']}; a frame looks back over {event['window']} (Ctrl-C ends)"
    if kind == "answer":
        return f"{at} {event['question']}\n{' ' * len(at)} {event['answer'] or '(nothing)'}"
    if kind == "dropped":
        return f"{at} can't keep up: {event['frames']} frames dropped so far, {event['step_seconds']:.2f} s for a step"
    if kind == "restart":
        return f"{at} begun anew: {event['reason']}"
    if kind == "error":
        return f"{at} {event['error']}"
    kept = f"{event['kept']} kept as {event['tokens']} tokens"
    broken = f", {event['broken']} packets broken" if event["broken"] else ""
    return f"{at} ended: {event['steps']} steps encoded, {kept}, {event['dropped']} frames dropped{broken}"


def _asked() -> Callable[[], str | None]:
    """A function that gives the line that was typed since the last call, or None."""
    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line.strip())

    threading.Thread(target=read, daemon=True).start()
    return lambda: None if lines.empty() else lines.get()
