"""`sta-adapter visualize`: what STA does with a clip, as pictures and a page."""

from __future__ import annotations

import json
from pathlib import Path
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
from sta_adapter.errors import ConfigError
from sta_adapter.requirements import require_device, require_free, require_writable
from sta_adapter.tiny_base import model_and_adapter
from sta_adapter.visualization.local_paths import subject

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from sta_adapter.cli.options import ModelOptions
    from sta_adapter.visualization.report import Summary
    from sta_adapter.visualization.viewer import Viewer

    class Look(Summary):
        """What --json prints."""

        files: list[str]


MADE = (
    *("index.html", "attention.png", "branch.png", "overlay.png", "overlay.mp4", "overlay.gif"),
    *("arrays.npz", "numbers.json"),
)
HELP = """\b
Example: sta-adapter visualize clip.mp4 --out look \\
             --model Qwen/Qwen2-VL-2B-Instruct --adapter my-adapter

Shows where each patch attends in the other frames, relative to uniform
attention, by block and head; and how much STA adds and changes. FOLDER gets
index.html (interactive, all in one file), PNG, MP4, GIF, arrays.npz and
numbers.json.
"""


@click.command(cls=Grouped, needs={"train": ("torchvision", "PIL"), "viz": ("matplotlib",)}, help=HELP)
@click.argument("clip", type=click.Path())
@option("What", "--out", metavar="FOLDER", required=True, help="Gets the page and the pictures.")
@option("What", "--overwrite", is_flag=True, help="Replace the page and the pictures in FOLDER.")
@shown_model_options
@option("What", "--block", type=int, metavar="N", help="Block to draw. [default: where STA adds most]")
@option("What", "--device", metavar="DEVICE", help="cpu, cuda:1, ... [default: CUDA if it is there]")
@option("Frames", "--fps", type=float, metavar="RATE", help="Frames a second. [default: as trained]")
@option("Frames", "--nframes", type=int, metavar="N", help="Number of frames of the clip.")
@option("Result", "--json", "as_json", is_flag=True, help="Print the numbers as JSON.")
@model_options
@adapter_options
def command(
    clip: str,
    out: str,
    overwrite: bool,
    model: str | None,
    adapter: str | None,
    block: int | None,
    fps: float | None,
    nframes: int | None,
    as_json: bool,
    **options: Unpack[ModelOptions],
) -> None:
    """Look at a clip and write what was seen."""
    from sta_adapter.video.frame_table import checked_path
    from sta_adapter.visualization.viewer import Viewer

    frames = frame_rate(fps, nframes)
    require_device(options["device"])
    require_free(Path(out), MADE, overwrite)
    require_writable(Path(out))
    checked_path(clip)  # before a model is downloaded and loaded
    base, shown = model_and_adapter(model, adapter)
    folder = find_adapter(adapter, options["adapter_revision"], options["any_base"]) or shown
    viewer = Viewer.load(base, folder, frames=frames, **viewer_settings(options))
    numbers = write_look(viewer, clip, Path(out), block, subject(base, shown))
    click.echo(json.dumps(numbers, indent=1) if as_json else describe(numbers, out))


def write_look(viewer: Viewer, clip: str, out: Path, block: int | None, subject: str) -> Look:
    """Write everything into a folder; the numbers."""
    import numpy as np

    import sta_adapter
    from sta_adapter.visualization import figures as pictures
    from sta_adapter.visualization import report as look_page

    loaded = viewer.read(clip)
    seen = viewer.observe(loaded)
    if block is not None and block not in seen.blocks:
        raise ConfigError(f"--block {block}: STA is in the blocks {', '.join(map(str, seen.blocks))}.")
    shown = pictures.strongest_block(seen) if block is None else block
    frames, times, why = loaded.step_frames(seen)
    noted = look_page.notes(seen, why, trained=viewer.trained)
    out.mkdir(parents=True, exist_ok=True)
    for name in MADE:  # of a clip before, which may have had an overlay
        (out / name).unlink(missing_ok=True)
    figures = {"attention": pictures.draw_attention(seen), "branch": pictures.draw_branch(seen)}
    movie, files = None, []
    if not why:
        figures["overlay"] = pictures.draw_maps(seen, frames, times, shown)
        files = pictures.write_moving(out, "overlay", pictures.overlay_frames(seen, frames, times, shown))
        movie = files[0].read_bytes()
    for name, figure in figures.items():
        files.append(out / f"{name}.png")
        files[-1].write_bytes(pictures.png(figure))
    arrays = {name: getattr(seen, name) for name in ("blocks", "attention", "crossing", "branch", "change", "even")}
    arrays |= {} if seen.positions is None else {"positions": seen.positions}
    np.savez_compressed(out / "arrays.npz", **arrays)
    numbers = look_page.summary(seen, noted, shown)
    (out / "numbers.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    content = look_page.sections(seen, frames, times, noted=noted, block=shown, movie=movie)
    made = f"Made by sta-adapter {sta_adapter.__version__}. The arrays are in arrays.npz, the numbers in numbers.json."
    page = look_page.page(f"What STA does with {Path(clip).name}", subject, made, content)
    (out / "index.html").write_text(page, encoding="utf-8")
    names = [*(file.name for file in files), "arrays.npz", "numbers.json", "index.html"]
    return {**numbers, "files": sorted(names)}


def describe(numbers: Look, out: str) -> str:
    """The numbers in words, for a terminal."""
    lines = [f"note: {note}" for note in numbers["notes"]]
    lines.append(
        f"{numbers['frames']} step{'s' * (numbers['frames'] != 1)} of {numbers['positions']} positions; the maps show block "
        f"{numbers['block_shown']}"
    )
    lines.append("block  STA's part of the residual  attention to other frames")
    for row in numbers["blocks"]:
        lines.append(f"{row['block']:5}  {100 * row['branch']:24.2f} %  {100 * row['crossing']:23.1f} %")
    lines.append(f"spread evenly, {100 * numbers['even_crossing']:.1f} % of attention would go to other frames")
    lines.append(f"the encoder's output changes by {100 * numbers['change']:.2f} %")
    lines.append(f"page: {Path(out) / 'index.html'}")
    return "\n".join(lines)
