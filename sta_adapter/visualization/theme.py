"""Colours of figures in light and in dark, and the parts that every figure has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sta_adapter._lazy import importing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colorbar import Colorbar
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Theme:
    """Colours of a figure."""

    name: str
    text: str
    faint: str
    line: str
    paper: str  # behind moving pictures, which can't be see-through
    relative: tuple[str, str, str]  # less than even, even, more

    @property
    def colours(self) -> LinearSegmentedColormap:
        """From less than even to more."""
        from matplotlib.colors import LinearSegmentedColormap

        return LinearSegmentedColormap.from_list("relative", self.relative)


LIGHT = Theme("light", "#1f2328", "#57606a", "#0072B2", "#ffffff", ("#0072B2", "#f4f4f2", "#D55E00"))
DARK = Theme("dark", "#e6edf3", "#9da7b1", "#56B4E9", "#16191d", ("#56B4E9", "#2b3138", "#F0A030"))


def new_figure(width: float, height: float, paper: str = "none", gap: float = 0.02) -> Figure:
    """A figure that no global state knows, so that threads can draw at once."""
    with importing("pictures need matplotlib: pip install 'sta-adapter[viz]'"):
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.02, h_pad=gap), facecolor=paper)


def colour_bar(figure: Figure, shown: ScalarMappable, theme: Theme, label: str, **options: Any) -> Colorbar:
    """A colour bar beside what is shown."""
    bar = figure.colorbar(shown, **options)
    bar.set_label(label, fontsize=10, color=theme.text)
    bar.ax.tick_params(labelsize=10)
    bar.outline.set_visible(False)
    restyle(bar.ax, theme)
    return bar


def restyle(axes: Axes, theme: Theme) -> None:
    """Axes in a theme's colours."""
    axes.patch.set_alpha(0)
    axes.tick_params(colors=theme.text)
    axes.spines[:].set_color(theme.faint)
