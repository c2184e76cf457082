"""`sta-adapter app`: ask a model about videos in the browser, with and without its adapter."""

from __future__ import annotations

from typing import Any

import click

from sta_adapter.cli.options import Grouped, adapter_options, base_model_of, find_adapter, model_options, option
from sta_adapter.errors import ConfigError
from sta_adapter.requirements import require_device
from sta_adapter.tiny_base import model_and_adapter
from sta_adapter.visualization.local_paths import subject

__all__ = ["command"]

HELP = """\b
Example: sta-adapter app --model Qwen/Qwen2-VL-2B-Instruct \\
             --adapter my-adapter

Opens a page for this machine alone: a video and a question, the answers of
base and adapter side by side, and the temporal attention below. Without
options it shows the demo's tiny base with its adapter. End it with Ctrl-C.
"""


@click.command(
    cls=Grouped,
    needs={"app": ("gradio", "matplotlib", "PIL", "torchvision")},
    help=HELP,
    short_help="Ask base and adapter about a video in the browser.",
)
@option("What", "--model", metavar="ID", help="Model on the Hub, or its folder. [default: the demo's tiny base]")
@option(
    "What",
    "--adapter",
    metavar="ID",
    help="Adapter on the Hub, or its folder. [default: the tiny base's; else untrained STA]",
)
@option("What", "--device", metavar="DEVICE", help="cpu, cuda:1, ... [default: CUDA if it is there]")
@option("Page", "--host", metavar="ADDRESS", help="0.0.0.0 for all. [default: 127.0.0.1]")
@option("Page", "--port", type=click.IntRange(1, 65535), metavar="N", help="[default: first free from 7860]")
@option("Page", "--share", is_flag=True, help="Public address through Gradio's servers.")
@option("Frames", "--fps", type=float, metavar="RATE", help="Frames a second. [default: as trained]")
@option("Frames", "--nframes", type=int, metavar="N", help="Frames of every clip instead.")
@option("Frames", "--longest", type=float, metavar="S", default=120, help="Seconds of a clip. [default: 120]")
@option("Page", "--time-limit", type=float, metavar="S", default=300, help="Seconds of an answer. [default: 300]")
@model_options
@adapter_options
def command(**options: Any) -> None:
    """Serve the page."""
    from sta_adapter.visualization.app import serve

    require_device(options["device"])
    fps, nframes = options.pop("fps"), options.pop("nframes")
    if fps is not None and nframes is not None:
        raise ConfigError("--fps and --nframes exclude each other; give one of them.")
    frames = {"nframes": nframes} if nframes is not None else {"fps": fps, "nframes": None} if fps is not None else {}
    options["dtype"] = options["dtype"] or "auto"
    name, any_base = options.pop("adapter"), options.pop("any_base")
    base_model = base_model_of(any_base)
    adapter = find_adapter(name, options.pop("adapter_revision"), any_base)
    title = subject(*model_and_adapter(options["model"], name))
    serve(adapter=adapter, title=title, frames=frames, base_model=base_model, say=click.echo, **options)
