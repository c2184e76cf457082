"""Pictures of what STA did with a clip, drawn from an `Observation`; each in light or dark, on nothing.

The colour maps, cividis and viridis, can be told apart by everybody and stay in order in grey.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sta_adapter.errors import MissingExtraError
from sta_adapter.video import write_clip
from sta_adapter.visualization.observation import Observation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "DARK",
    "LIGHT",
    "Theme",
    "draw_attention",
    "draw_branch",
    "draw_maps",
    "overlay_frames",
    "png",
    "strongest_block",
    "write_moving",
]

SHOWN = 6  # frames side by side; the moving picture has all
ATTENTION, MAPS = "cividis", "viridis"


@dataclass(frozen=True)
class Theme:
    """Colours of a figure."""

    name: str
    text: str
    faint: str
    line: str
    paper: str  # behind moving pictures, which can't be see-through


LIGHT = Theme("light", "#1f2328", "#57606a", "#0072B2", "#ffffff")
DARK = Theme("dark", "#e6edf3", "#9da7b1", "#56B4E9", "#16191d")


@dataclass(frozen=True)
class Quantity:
    """One of the maps that can be laid over frames: values (T, N) in percent, and what they are."""

    name: str
    label: str
    values: np.ndarray
    least_range: float  # smaller differences are not stretched over the whole colour map

    @property
    def limits(self) -> tuple[float, float]:
        """Lowest and highest value of the colour map."""
        low, high = float(self.values.min()), float(self.values.max())
        spare = max(0.0, self.least_range - (high - low)) / 2
        low = max(0.0, low - spare)
        return low, max(high + spare, low + self.least_range)


def quantities(seen: Observation, block: int) -> list[Quantity]:
    """The three maps, of one block (an index in the encoder) and of the encoder's output."""
    row = seen.blocks.index(block)
    even = "" if np.ptp(seen.even) else f"; even: {100 * seen.even[0]:.1f}"
    return [
        Quantity("crossing", f"attention to other\nframes (%{even})", 100 * seen.crossing[row], 2.0),
        Quantity("branch", "STA's part against\nthe residual (%)", 100 * seen.branch[row], 0.1),
        Quantity("change", "encoder's output, STA on\nagainst off (%)", 100 * seen.change, 0.1),
    ]


def strongest_block(seen: Observation) -> int:
    """The block in which STA adds most, relative to the residual stream."""
    return seen.blocks[int(seen.branch.mean((1, 2)).argmax())]


def draw_attention(seen: Observation, theme: Theme = LIGHT) -> Figure:
    """Which frame looks at which: a square of T x T for each block and head, mean over positions."""
    blocks, heads, frames, _ = seen.attention.shape
    tiles = [(b, h) for b in range(blocks) for h in range(heads)]
    many = len(tiles) > 48
    across = heads * min(blocks, max(1, (12 if many else 6) // heads))
    down = -(-len(tiles) // across)
    inch = 0.85 if many else 1.25
    figure, scale = _figure(across * inch + 1.4, down * inch + 0.9), 100 * seen.attention.max()
    axes = figure.add_subplot()
    gap, size = frames * 0.34, frames
    for place, (b, h) in enumerate(tiles):
        x, y = place % across * (size + gap * 0.6), place // across * (size + gap)
        tile = 100 * seen.attention[b, h]
        shown = axes.imshow(tile, cmap=ATTENTION, vmin=0, vmax=scale, extent=(x, x + size, y + size, y), aspect="equal")
        name = f"block {seen.blocks[b]}" if heads == 1 else f"{seen.blocks[b]} · {h}"
        axes.text(x, y - gap * 0.12, name, fontsize=8 if many else 9, color=theme.text, va="bottom")
    axes.set(xlim=(-0.5, across * (size + gap * 0.6)), ylim=(down * (size + gap) - gap + 0.5, -gap))
    axes.set_axis_off()
    where = "" if heads == 1 else "above each square: block · head.  "
    told = f"{where}down: frame that looks, across: frame looked at,\nthe first frame at the top left"
    figure.suptitle(told, x=0.01, ha="left", fontsize=9, color=theme.faint)
    label = f"attention (%)\neven: {100 / frames:.1f}"
    _colour_bar(figure, shown, theme, label, ax=axes, pad=0.015, shrink=min(1.0, 2.2 / (down * inch)), anchor=(0, 1))
    return figure


def draw_branch(seen: Observation, theme: Theme = LIGHT) -> Figure:
    """What STA adds in each block, relative to the residual stream: median over tokens, and the middle 80 %."""
    figure = _figure(6.4, 3.0)
    axes = figure.add_subplot()
    low, middle, high = np.percentile(100 * seen.branch.reshape(len(seen.blocks), -1), [10, 50, 90], axis=1)
    bars = np.stack([middle - low, high - middle])
    axes.errorbar(seen.blocks, middle, yerr=bars, fmt="o", color=theme.line, ecolor=theme.faint, capsize=3, zorder=3)
    axes.set_xlabel("block of the encoder", color=theme.text)
    axes.set_ylabel("length of STA's part\n(% of the residual's)", color=theme.text)
    axes.set_ylim(0, max(1.15 * float(high.max()), 0.1))
    axes.set_xlim(min(seen.blocks) - 0.6, max(seen.blocks) + 0.6)
    axes.locator_params(axis="x", integer=True)
    axes.grid(axis="y", color=theme.faint, alpha=0.25)
    _restyle(axes, theme)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw_maps(
    seen: Observation, frames: np.ndarray, times: np.ndarray | None, block: int, theme: Theme = LIGHT
) -> Figure:
    """Frames (T, height, width, 3), up to six of them, and below them the maps of a block laid over them."""
    count = len(frames)
    chosen = np.unique(np.linspace(0, count - 1, min(count, SHOWN)).round().astype(int))
    maps, shape = quantities(seen, block), frames.shape[1] / frames.shape[2]
    width = min(1.6, 1.6 / shape)
    figure = _figure(width * len(chosen) + 0.9, (width * shape + 0.3) * (1 + len(maps)), gap=0.13)
    grid = figure.subplots(1 + len(maps), len(chosen) + 1, width_ratios=[1] * len(chosen) + [0.07], squeeze=False)
    grid[0, -1].set_axis_off()
    grey = _shades(frames)
    for axes, index in zip(grid[0], chosen, strict=False):
        axes.imshow(frames[index])
        axes.set_title(_when(index, times), fontsize=11, color=theme.text)
    for row, quantity in zip(grid[1:], maps, strict=True):
        for axes, index in zip(row, chosen, strict=False):
            _lay_over(axes, grey[index], seen.on_picture(quantity.values[index]), quantity.limits)
        told = f"{quantity.name}: {quantity.label}".replace("\n", " ")  # may reach over the pictures beside it
        place: dict[str, Any] = {"transform": row[0].transAxes, "va": "bottom", "in_layout": False}
        row[0].text(0, 1.03, told, fontsize=11, color=theme.text, **place)
        _colour_bar(figure, _solid(quantity), theme, "", cax=row[-1])
    for axes in grid[:, :-1].flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    return figure


def overlay_frames(
    seen: Observation, frames: np.ndarray, times: np.ndarray | None, block: int, theme: Theme = DARK
) -> np.ndarray:
    """All T steps as pictures (T, height, width, 3) uint8: the frame, and the three maps beside it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    maps, shape = quantities(seen, block), frames.shape[1] / frames.shape[2]
    width = min(2.2, 2.2 / shape)
    figure = _figure(4 * (width + 0.3) + 1.4, width * shape + 0.75, paper=theme.paper)
    canvas, row, drawn = FigureCanvasAgg(figure), figure.subplots(1, 1 + len(maps)), []
    grey = _shades(frames)
    for axes, quantity in zip(row[1:], maps, strict=True):
        _colour_bar(figure, _solid(quantity), theme, "", ax=axes, shrink=0.8, aspect=14)
    for index, frame in enumerate(frames):
        for axes in row:
            axes.clear()
            axes.set(xticks=[], yticks=[])
        row[0].imshow(frame)
        row[0].set_title(_when(index, times), fontsize=9, color=theme.text)
        for axes, quantity in zip(row[1:], maps, strict=True):
            _lay_over(axes, grey[index], seen.on_picture(quantity.values[index]), quantity.limits)
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


def write_moving(folder: str | os.PathLike[str], name: str, pictures: np.ndarray, fps: float = 2.0) -> list[Path]:
    """Write pictures (T, height, width, 3) as `NAME.mp4` and `NAME.gif`; the files' paths."""
    from PIL import Image

    first, *rest = (Image.fromarray(picture).quantize(256, method=Image.Quantize.MEDIANCUT) for picture in pictures)
    gif = Path(folder, f"{name}.gif")
    first.save(gif, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)
    return [write_clip(Path(folder, f"{name}.mp4"), pictures, fps), gif]


def _figure(width: float, height: float, paper: str = "none", gap: float = 0.02) -> Figure:
    """A figure that no global state knows, so that threads can draw at once."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise MissingExtraError("pictures need matplotlib: pip install 'sta-adapter[viz]'") from error
    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.02, h_pad=gap), facecolor=paper)


def _when(index: int, times: np.ndarray | None) -> str:
    return f"step {index}" if times is None else f"{times[index]:.2f} s"


def _shades(frames: np.ndarray) -> np.ndarray:
    """Frames (T, height, width, 3) in grey, (T, height, width) from 0 to 1, along the colours in which they differ most.

    Plain lightness would hide a thing that is as light as what is behind it.
    """
    flat = frames.reshape(-1, 3).astype(np.float64)
    axis = np.linalg.eigh(np.cov(flat.T))[1][:, -1]
    grey = flat @ (axis if axis.sum() >= 0 else -axis)
    low, high = np.percentile(grey, [1, 99])
    return np.clip((grey - low) / max(high - low, 1e-9), 0, 1).reshape(frames.shape[:-1])


def _lay_over(axes: Any, shades: np.ndarray, values: np.ndarray, limits: tuple[float, float]) -> None:
    """A map (rows, columns) over a grey frame (height, width), each value on the patch that it belongs to."""
    height, width = shades.shape
    axes.imshow(shades, cmap="gray", vmin=-0.5, vmax=1.5)  # pale, so that the map's colours stay its own
    span = (-0.5, width - 0.5, height - 0.5, -0.5)
    axes.imshow(values, cmap=MAPS, vmin=limits[0], vmax=limits[1], alpha=0.6, extent=span, interpolation="nearest")


def _solid(quantity: Quantity) -> Any:
    """What the colour bar shows: the colour map without the frame below it."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    return ScalarMappable(Normalize(*quantity.limits), MAPS)


def _colour_bar(figure: Figure, shown: Any, theme: Theme, label: str, **options: Any) -> None:
    bar = figure.colorbar(shown, **options)
    bar.set_label(label, fontsize=10, color=theme.text)
    bar.ax.tick_params(labelsize=10)
    bar.outline.set_visible(False)
    _restyle(bar.ax, theme)


def _restyle(axes: Any, theme: Theme) -> None:
    axes.patch.set_alpha(0)
    axes.tick_params(colors=theme.text)
    axes.spines[:].set_color(theme.faint)
