"""Drawn objects and backgrounds in the place of real ones, for `--quick`: no package and no network is needed for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

COLOURS = ("crimson", "seagreen", "royalblue", "gold", "purple", "darkorange")


def draw_objects(folder: Path, count: int = 40) -> Path:
    """Write objects that don't look alike when turned: a body with a head at one corner; the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        rng = np.random.default_rng(index)
        image = Image.new("RGBA", (96, 96))
        pen = ImageDraw.Draw(image)
        one, two = (COLOURS[i] for i in rng.choice(len(COLOURS), 2, replace=False))
        width, height = rng.integers(24, 40), rng.integers(60, 88)
        pen.rectangle((0, 95 - height, width, 95), fill=one)
        pen.rectangle((width, 72, int(rng.integers(70, 95)), 95), fill=one)
        pen.ellipse((0, 95 - height - 8, width + 8, 95 - height + width), fill=two)
        image.save(folder / f"{index:03d}.png")
    return folder


def draw_photographs(folder: Path, count: int = 8) -> Path:
    """Write backgrounds of smooth noise; the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        coarse = np.random.default_rng(index).integers(40, 216, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((320, 240), Image.Resampling.BICUBIC).save(folder / f"{index:02d}.png")
    return folder
