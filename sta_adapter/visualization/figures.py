"""Pictures of what STA did with a clip, drawn from an `Observation`; each in light or dark, on nothing.

Attention is shown against even spread, in blue (less) over a neutral colour (even) to orange (more), which everybody
can tell apart; sizes in viridis, which stays in order in grey.
"""

from __future__ import annotations

import base64
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sta_adapter.video import write_clip
from sta_adapter.visualization.observation import Observation
from sta_adapter.visualization.patch_attention import scale_of
from sta_adapter.visualization.theme import DARK, LIGHT, Theme, colour_bar, new_figure, restyle

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

SHOWN = 4  # frames side by side; the moving picture has all
SQUARES = 48  # of blocks and heads; with more of them the heads are averaged
SIZES = "viridis"


@dataclass(frozen=True)
class Quantity:
    """One of the maps that can be laid over frames: values (T, N), in percent or as multiples of even, and what they are."""

    name: str
    label: str
    values: np.ndarray
    least_range: float  # smaller differences are not stretched over the whole colour map
    relative: bool = False  # to 1, which is in the middle of the colours

    @property
    def limits(self) -> tuple[float, float]:
        """Lowest and highest value of the colour map."""
        if self.relative:
            away = max(float(np.abs(self.values - 1).max()), self.least_range / 2)
            return 1 - away, 1 + away
        low, high = float(self.values.min()), float(self.values.max())
        spare = max(0.0, self.least_range - (high - low)) / 2
        low = max(0.0, low - spare)
        return low, max(high + spare, low + self.least_range)


def quantities(seen: Observation, block: int) -> list[Quantity]:
    """The three maps, of one block (an index in the encoder) and of the encoder's output."""
    row = seen.blocks.index(block)
    crossing = seen.relative_crossing[row]
    return [
        Quantity("crossing", "attention to other\nframes (1: uniform)", crossing, 0.04, relative=True),
        Quantity("branch", "STA's update relative to\nthe residual (%)", 100 * seen.branch[row], 0.1),
        Quantity("change", "encoder's output, STA on\nrelative to off (%)", 100 * seen.change, 0.1),
    ]


def strongest_block(seen: Observation) -> int:
    """The block in which STA adds most, relative to the residual stream."""
    return seen.blocks[int(np.argmax(seen.branch.mean((1, 2))))]


def draw_attention(seen: Observation, theme: Theme = LIGHT) -> Figure:
    """Which frame looks at which, against even spread: a square of T x T for each block and head, mean over positions."""
    values = seen.relative
    apart = values.shape[0] * values.shape[1] <= SQUARES
    values = values if apart else values.mean(1, keepdims=True)
    blocks, heads, frames, _ = values.shape
    tiles = [(b, h) for b in range(blocks) for h in range(heads)]
    across = min(4, heads * max(1, 4 // heads)) if heads <= 4 else 4 if heads % 4 == 0 else 3
    across, down = min(across, len(tiles)), -(-len(tiles) // min(across, len(tiles)))
    inch, scale = min(1.3, 5.2 / across), np.log2(scale_of(values))
    figure = new_figure(across * inch + 1.1, down * inch * 1.22 + 0.6)
    axes = figure.add_subplot()
    gap, size, ticks, small = frames * 0.28, frames, _ticks(frames), {"fontsize": 7, "color": theme.faint}
    for place, (b, h) in enumerate(tiles):
        column, row = place % across, place // across
        x, y = column * (size + gap * 0.5), row * (size + gap)
        shades = {"cmap": theme.colours, "vmin": -scale, "vmax": scale, "aspect": "equal", "interpolation": "nearest"}
        shown = axes.imshow(np.log2(np.maximum(values[b, h], 1e-6)), extent=(x, x + size, y + size, y), **shades)
        name = f"block {seen.blocks[b]}" if heads == 1 else f"{seen.blocks[b]} \u00b7 {h}"
        axes.text(x, y - gap * 0.1, name, fontsize=9, color=theme.text, va="bottom")
        for tick in ticks:  # frames of the squares at the left and at the bottom
            if column == 0:
                axes.text(x - gap * 0.1, y + tick + 0.5, str(tick), small, ha="right", va="center")
            if place + across >= len(tiles):
                axes.text(x + tick + 0.5, y + size + gap * 0.1, str(tick), small, ha="center", va="top")
    axes.set(xlim=(-gap * 0.6, across * (size + gap * 0.5)), ylim=(down * (size + gap) - gap + gap * 0.7, -gap))
    axes.set_axis_off()
    where = "" if heads == 1 else "above each square: block \u00b7 head; "
    figure.suptitle(
        f"{where}down: frame that looks,\nacross: frame looked at", x=0.01, ha="left", fontsize=9, color=theme.faint
    )
    bar = colour_bar(figure, shown, theme, "attention, relative to uniform", ax=axes, pad=0.02, anchor=(0, 1),
                      shrink=min(1.0, 2.0 / (down * inch)), ticks=[-scale, 0, scale])  # fmt: skip
    end = f"{2**scale:g}"
    bar.ax.set_yticklabels([f"1/{end}", "1", end])
    return figure


def _ticks(frames: int) -> list[int]:
    """At most five frames, evenly apart, the first among them."""
    step = next(step for step in (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 128, frames) if frames <= 5 * step)
    return list(range(0, frames, step))


def draw_branch(seen: Observation, theme: Theme = LIGHT) -> Figure:
    """What STA adds in each block, relative to the residual stream: median over tokens, and the middle 80 %."""
    figure = new_figure(6.4, 3.0)
    axes = figure.add_subplot()
    low, middle, high = np.percentile(100 * seen.branch.reshape(len(seen.blocks), -1), [10, 50, 90], axis=1)
    bars = np.stack([middle - low, high - middle])
    axes.errorbar(seen.blocks, middle, yerr=bars, fmt="o", color=theme.line, ecolor=theme.faint, capsize=3, zorder=3)
    axes.set_xlabel("block of the encoder", color=theme.text)
    axes.set_ylabel("norm of STA's update\n(% of the residual's)", color=theme.text)
    axes.set_ylim(0, max(1.15 * float(high.max()), 0.1))
    axes.set_xlim(min(seen.blocks) - 0.6, max(seen.blocks) + 0.6)
    axes.locator_params(axis="x", integer=True)
    axes.grid(axis="y", color=theme.faint, alpha=0.25)
    restyle(axes, theme)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw_maps(
    seen: Observation, frames: np.ndarray, times: np.ndarray | None, block: int, theme: Theme = LIGHT
) -> Figure:
    """Frames (T, height, width, 3), up to four of them, and below them the maps of a block laid over them."""
    count = len(frames)
    chosen = np.unique(np.linspace(0, count - 1, min(count, SHOWN)).round().astype(int))
    maps, shape = quantities(seen, block), frames.shape[1] / frames.shape[2]
    width = min(1.6, 1.6 / shape)
    figure = new_figure(width * len(chosen) + 0.9, (width * shape + 0.3) * (1 + len(maps)), gap=0.13)
    grid = figure.subplots(1 + len(maps), len(chosen) + 1, width_ratios=[1] * len(chosen) + [0.07], squeeze=False)
    grid[0, -1].set_axis_off()
    grey = shades(frames)
    for axes, index in zip(grid[0], chosen, strict=False):
        axes.imshow(frames[index])
        axes.set_title(_when(index, times), fontsize=11, color=theme.text)
    for row, quantity in zip(grid[1:], maps, strict=True):
        for axes, index in zip(row, chosen, strict=False):
            _lay_over(axes, grey[index], seen.on_picture(quantity.values[index]), quantity, theme)
        told = f"{quantity.name}: {quantity.label}".replace("\n", " ")  # may reach over the pictures beside it
        heading = row[0].text(0, 1.03, told, fontsize=11, color=theme.text, transform=row[0].transAxes, va="bottom")
        heading.set_in_layout(False)
        colour_bar(figure, _solid(quantity, theme), theme, "", cax=row[-1])
    for axes in grid[:, :-1].flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    return figure


def overlay_frames(
    seen: Observation, frames: np.ndarray, times: np.ndarray | None, block: int, theme: Theme = DARK
) -> np.ndarray:
    """All T steps as pictures (T, height, width, 3) uint8: the frame, and the three maps beside and below it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    maps, shape = quantities(seen, block), frames.shape[1] / frames.shape[2]
    width = min(2.2, 2.2 / shape)
    figure = new_figure(2 * (width + 0.6), 2 * (width * shape + 0.6), paper=theme.paper)
    canvas, row, drawn = FigureCanvasAgg(figure), figure.subplots(2, 2).ravel(), []
    grey = shades(frames)
    for axes, quantity in zip(row[1:], maps, strict=True):
        colour_bar(figure, _solid(quantity, theme), theme, "", ax=axes, shrink=0.8, aspect=14)
    for index, frame in enumerate(frames):
        for axes in row:
            axes.clear()
            axes.set(xticks=[], yticks=[])
        row[0].imshow(frame)
        row[0].set_title(_when(index, times), fontsize=9, color=theme.text)
        for axes, quantity in zip(row[1:], maps, strict=True):
            _lay_over(axes, grey[index], seen.on_picture(quantity.values[index]), quantity, theme)
            axes.set_title(quantity.label, fontsize=9, color=theme.text)
        canvas.draw()
        figure.set_layout_engine("none")  # the first drawing has laid everything out
        picture = np.asarray(canvas.buffer_rgba())[..., :3]
        drawn.append(picture[: len(picture) // 2 * 2, : picture.shape[1] // 2 * 2].copy())
    return np.stack(drawn)


def png(figure: Figure) -> bytes:
    """A figure as a PNG file, see-through where nothing is drawn."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, transparent=True)
    return buffer.getvalue()


def data_uri(kind: str, content: bytes) -> str:
    """A file as a page holds it; `kind` is its MIME type."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def write_moving(folder: str | os.PathLike[str], name: str, pictures: np.ndarray, fps: float = 2.0) -> list[Path]:
    """Write pictures (T, height, width, 3) as `NAME.mp4` and `NAME.gif`; the files' paths."""
    from PIL import Image

    first, *rest = (Image.fromarray(picture).quantize(256, method=Image.Quantize.MEDIANCUT) for picture in pictures)
    gif = Path(folder, f"{name}.gif")
    first.save(gif, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)
    return [write_clip(Path(folder, f"{name}.mp4"), pictures, fps), gif]


def _when(index: int, times: np.ndarray | None) -> str:
    return f"step {index}" if times is None else f"{times[index]:.2f} s"


def shades(frames: np.ndarray) -> np.ndarray:
    """Frames (T, height, width, 3) in grey, (T, height, width) from 0 to 1, along the colours in which they differ most.

    Plain lightness would hide a thing that is as light as what is behind it.
    """
    flat = frames.reshape(-1, 3).astype(np.float64)
    axis = np.linalg.eigh(np.cov(flat.T))[1][:, -1]
    grey = flat @ (axis if axis.sum() >= 0 else -axis)
    low, high = np.percentile(grey, [1, 99])
    return np.clip((grey - low) / max(high - low, 1e-9), 0, 1).reshape(frames.shape[:-1])


def _lay_over(axes: Axes, grey: np.ndarray, values: np.ndarray, quantity: Quantity, theme: Theme) -> None:
    """A map (rows, columns) over a grey frame (height, width), each value on the patch that it belongs to."""
    height, width = grey.shape
    axes.imshow(grey, cmap="gray", vmin=-0.5, vmax=1.5)  # pale, so that the map's colours stay its own
    span = (-0.5, width - 0.5, height - 0.5, -0.5)
    low, high = quantity.limits
    colours = theme.colours if quantity.relative else SIZES
    axes.imshow(values, cmap=colours, vmin=low, vmax=high, alpha=0.65, extent=span, interpolation="nearest")


def _solid(quantity: Quantity, theme: Theme) -> ScalarMappable:
    """What the colour bar shows: the colour map without the frame below it."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    return ScalarMappable(Normalize(*quantity.limits), theme.colours if quantity.relative else SIZES)
