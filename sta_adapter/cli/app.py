"""`sta-adapter app`: ask a model about videos in the browser, with and without its adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from sta_adapter.cli.options import (
    Grouped,
    adapter_options,
    find_adapter,
    frame_rate,
    model_options,
    option,
    shown_model_options,
    viewer_settings,
)
from sta_adapter.requirements import require_device
from sta_adapter.tiny_base import model_and_adapter
from sta_adapter.visualization.local_paths import subject

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from sta_adapter.cli.options import ModelOptions

SECONDS = click.FloatRange(0, min_open=True)
HELP = """\b
Example: sta-adapter app --model Qwen/Qwen2-VL-2B-Instruct \\
             --adapter my-adapter

Opens a page for this machine alone: a video and a question, the answers of
base and adapter side by side, and the temporal attention below. Without
options it shows the demo's tiny base with its adapter. End it with Ctrl-C.
"""


@click.command(cls=Grouped, needs={"app": ("gradio", "matplotlib", "PIL", "torchvision")}, help=HELP)
@shown_model_options
@option("What", "--device", metavar="DEVICE", help="cpu, cuda:1, ... [default: CUDA if it is there]")
@option("Page", "--host", metavar="ADDRESS", help="0.0.0.0: open to the network. [default: 127.0.0.1]")
@option("Page", "--port", type=click.IntRange(1, 65535), metavar="N", help="Port. [default: first free from 7860]")
@option("Page", "--share", is_flag=True, help="Get a public address through Gradio's servers.")
@option("Frames", "--fps", type=float, metavar="RATE", help="Frames a second. [default: as trained]")
@option("Frames", "--nframes", type=int, metavar="N", help="The same number of frames of every clip.")
@option("Frames", "--longest", type=SECONDS, metavar="S", default=120, help="Longest clip, in seconds. [default: 120]")
@option(
    "Page", "--time-limit", type=SECONDS, metavar="S", default=300, help="Longest answer, in seconds. [default: 300]"
)
@model_options
@adapter_options
def command(
    model: str | None,
    adapter: str | None,
    host: str | None,
    port: int | None,
    share: bool,
    fps: float | None,
    nframes: int | None,
    longest: float,
    time_limit: float,
    **options: Unpack[ModelOptions],
) -> None:
    """Serve the page."""
    from sta_adapter.visualization.app import serve

    require_device(options["device"])
    frames = frame_rate(fps, nframes)
    serve(
        model,
        find_adapter(adapter, options["adapter_revision"], options["any_base"]),
        host=host,
        port=port,
        share=share,
        longest=longest,
        title=subject(*model_and_adapter(model, adapter)),
        time_limit=time_limit,
        say=click.echo,
        frames=frames,
        **viewer_settings(options),
    )
