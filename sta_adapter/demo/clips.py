"""Made clips of ten motions, in five pairs that are each other's reversal in time.

The one clip of a pair is the other one played backwards: the same seed, drawn for the opposite label, gives exactly the
reversed frames. So no frame, and no unordered set of frames, can tell the two apart; only their order can.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sta_adapter.errors import ConfigError
from sta_adapter.video import write_clip

PAIRS = (
    ("left", "right"),
    ("up", "down"),
    ("grows", "shrinks"),
    ("clockwise", "counterclockwise"),
    ("appears", "vanishes"),
)
LABELS = tuple(label for pair in PAIRS for label in pair)
QUESTION = "What happens?"
FRAMES, SIZE, FPS = 8, 64, 8.0  # of the files; the tiny base takes 32 x 32 pixels

SHAPES = ("square", "triangle", "bar", "half", "hook", "tee", "arrow", "cross")
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 230),
    "yellow": (235, 215, 50),
    "purple": (150, 50, 190),
    "orange": (245, 140, 30),
    "cyan": (50, 205, 215),
    "white": (240, 240, 240),
}


@dataclass(frozen=True)
class Look:
    """What clips are made of: the shapes, the colours, and how light (in grey levels) their backgrounds are."""

    shapes: tuple[str, ...]
    colours: tuple[str, ...]
    background: tuple[tuple[int, int], ...]


LOOKS = {
    "train": Look(
        ("square", "bar", "half", "hook", "arrow"), ("red", "blue", "yellow", "cyan", "white"), ((20, 60), (80, 100))
    ),
    "held_out": Look(("triangle", "tee", "cross"), ("green", "purple", "orange"), ((60, 80), (100, 110))),
    "all": Look(SHAPES, tuple(COLOURS), ((20, 110),)),
}


@dataclass(frozen=True)
class Difficulty:
    """How far a thing changes from the first frame to the last, and how unsteady it is meanwhile.

    Lengths are in pixels of a 32 x 32 frame, angles in degrees, contrast between 0 and 1, noise in grey levels at that
    size.
    """

    travel: float = 8.0
    growth: float = 1.6
    turn: float = 60.0
    fade: float = 0.6
    shake: float = 0.8
    noise: float = 6.0


@dataclass
class Scene:
    """One shape's course over T frames; every array is (T,)."""

    shape: str
    colour: tuple[int, int, int]
    background: np.ndarray
    x: np.ndarray
    y: np.ndarray
    radius: np.ndarray
    angle: np.ndarray
    contrast: np.ndarray


def opposite(label: str) -> str:
    """The label of the same motion backwards."""
    index = LABELS.index(label)
    return LABELS[index + 1 - 2 * (index % 2)]


def category(label: str) -> str:
    """The name of the label's pair, such as "left/right"."""
    return "/".join(next(pair for pair in PAIRS if label in pair))


def _box(u: np.ndarray, v: np.ndarray, half_width: float, half_height: float, x: float = 0, y: float = 0) -> np.ndarray:
    return np.maximum(np.abs(u - x) - half_width, np.abs(v - y) - half_height)


def _triangle(u: np.ndarray, v: np.ndarray, top: float = -1.0, base: float = 0.7) -> np.ndarray:
    return np.maximum(v - base, (np.abs(u) - (v - top) / (base - top) * 0.95) * 0.85)


def signed_distance(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Distance to a shape's outline, negative inside; u points right and v down, and the shape fills about [-1, 1]."""
    if shape == "square":
        return _box(u, v, 0.75, 0.75)
    if shape == "triangle":
        return _triangle(u, v)
    if shape == "bar":
        return _box(u, v, 0.35, 1.0)
    if shape == "half":
        return np.maximum(np.hypot(u, v - 0.3) - 1.0, v - 0.3)
    if shape == "hook":
        return np.minimum(_box(u, v, 0.28, 0.9, x=-0.5), _box(u, v, 0.75, 0.28, y=0.65))
    if shape == "tee":
        return np.minimum(_box(u, v, 0.85, 0.28, y=-0.6), _box(u, v, 0.28, 0.85))
    if shape == "arrow":
        return np.minimum(_triangle(u, v, -1.0, 0.1), _box(u, v, 0.28, 0.5, y=0.5))
    return np.minimum(_box(u, v, 0.28, 0.95), _box(u, v, 0.95, 0.28))


def draw(scene: Scene, size: int, noise: float, rng: np.random.Generator) -> np.ndarray:
    """Frames (T, size, size, 3) uint8 of a scene, with soft edges so that a tenth of a pixel shows."""
    rows, columns = np.meshgrid(np.arange(size) + 0.5, np.arange(size) + 0.5, indexing="ij")
    dx, dy = columns[None] - scene.x[:, None, None], rows[None] - scene.y[:, None, None]
    angle, radius = np.deg2rad(scene.angle)[:, None, None], scene.radius[:, None, None]
    u = (dx * np.cos(angle) + dy * np.sin(angle)) / radius
    v = (dy * np.cos(angle) - dx * np.sin(angle)) / radius
    cover = np.clip(0.5 - signed_distance(scene.shape, u, v) * radius, 0, 1) * scene.contrast[:, None, None]
    frames = scene.background + cover[..., None] * (np.array(scene.colour, dtype=float) - scene.background)
    frames = frames + rng.normal(0, noise * size / 32, frames.shape)
    return np.clip(np.round(frames), 0, 255).astype(np.uint8)


def still(rng: np.random.Generator, look: Look, frames: int, size: int) -> Scene:
    """A shape at rest: its kind, colour, place, size and tilt at random."""
    unit = size / 32
    radius = rng.uniform(5.5, 8.0) * unit
    margin = radius + 1.5 * unit
    low, high = look.background[rng.integers(len(look.background))]
    shade, slope = rng.uniform(low, high), rng.uniform(-15, 15, 2)
    ramp = np.linspace(-0.5, 0.5, size)
    background = shade + slope[0] * ramp[:, None] + slope[1] * ramp[None, :]
    colour = COLOURS[look.colours[rng.integers(len(look.colours))]]

    def steady(value: float) -> np.ndarray:
        return np.full(frames, float(value))

    return Scene(
        shape=look.shapes[rng.integers(len(look.shapes))],
        colour=colour,
        background=np.repeat(background[..., None], 3, axis=2),
        x=steady(rng.uniform(margin, size - margin)),
        y=steady(rng.uniform(margin, size - margin)),
        radius=steady(radius),
        angle=steady(rng.uniform(-40, 40)),
        contrast=steady(1.0),
    )


def _move(scene: Scene, pair: tuple[str, str], course: np.ndarray, level: Difficulty, unit: float) -> None:
    """Add a pair's first motion to a scene at rest; course is (T,), rising evenly about 0."""
    if pair[0] == "left":
        scene.x -= course * level.travel * unit
    elif pair[0] == "up":
        scene.y -= course * level.travel * unit
    elif pair[0] == "grows":
        scene.radius *= level.growth**course
    elif pair[0] == "clockwise":
        scene.angle += course * level.turn
    else:
        scene.contrast *= 1 - level.fade * (course[-1] - course)


def render(
    label: str,
    seed: int,
    look: str = "train",
    frames: int = FRAMES,
    size: int = SIZE,
    level: Difficulty | None = None,
    rest: int = 0,
) -> np.ndarray:
    """Frames (rest + T + rest, size, size, 3) uint8 of a label and a seed; with the opposite label the same frames in reverse.

    Args:
        label: One of `LABELS`.
        seed: Of shape, colour, place and noise.
        look: A key of `LOOKS`.
        frames: T, the number of frames.
        size: Height and width in pixels.
        level: How hard the motion is to see; the demo's own unless given.
        rest: Frames before the motion, and as many behind it, in which the shape only shakes.

    Raises:
        ConfigError: the label or the look is unknown, or there are too few frames.
    """
    for name, value, known in (("label", label, LABELS), ("look", look, LOOKS)):
        if value not in known:
            raise ConfigError(f"{name} is {value!r}, expected one of {', '.join(known)}.")
    if frames < 2:
        raise ConfigError(f"frames is {frames!r}, expected at least 2: nothing moves in fewer.")
    level = level or Difficulty()
    scene, rng = _course(label, seed, look, frames, size, level, rest)
    clip = draw(scene, size, level.noise, rng)
    return clip[::-1].copy() if _backwards(label) else clip


def describe(label: str, seed: int) -> list[str]:
    """What `render` draws in each frame: column, row, size, tilt and contrast, a digit each, of the range that occurs."""
    scene, _ = _course(label, seed, "train", FRAMES, 32, Difficulty(), 0)
    drawn = np.stack([scene.x, scene.y, scene.radius, scene.angle, scene.contrast], 1)
    low, high = np.array([0, 0, 4, -75, 0.4]), np.array([32, 32, 10.5, 75, 1])
    digits = np.clip(10 * (drawn - low) / (high - low), 0, 9).astype(int)
    words = ["".join(map(str, row)) for row in digits]
    return words[::-1] if _backwards(label) else words


def _backwards(label: str) -> bool:
    return LABELS.index(label) % 2 == 1


def _course(
    label: str, seed: int, look: str, frames: int, size: int, level: Difficulty, rest: int
) -> tuple[Scene, np.random.Generator]:
    """A pair's first motion, whichever of the two the label is, and what goes on to draw the noise."""
    pair = next(pair for pair in PAIRS if label in pair)
    rng = np.random.default_rng([seed, PAIRS.index(pair), sorted(LOOKS).index(look)])
    unit = size / 32
    course = np.pad(np.linspace(-0.5, 0.5, frames), rest, mode="edge")
    scene = still(rng, LOOKS[look], len(course), size)
    _move(scene, pair, course, level, unit)
    scene.x += rng.normal(0, level.shake * unit, len(course))
    scene.y += rng.normal(0, level.shake * unit, len(course))
    return scene, rng


def write_dataset(
    folder: Path,
    name: str,
    seeds: range,
    look: str = "train",
    frames: int = FRAMES,
    size: int = SIZE,
    progress: bool = False,
) -> Path:
    """Write clips and their JSON Lines file; labels take turns, so every label has as many clips as its opposite.

    A clip and the next one, its opposite, have different seeds: no clip of a data set is another one's reversal.

    Args:
        folder: Gets `NAME.jsonl` and the clips in `NAME/`.
        name: Of the data set.
        seeds: One for each clip.
        look: A key of `LOOKS`.
        frames: T of every clip.
        size: Height and width in pixels.
        progress: Show a bar.

    Returns:
        The JSON Lines file; its paths are relative to it.
    """
    from tqdm.auto import tqdm

    (folder / name).mkdir(parents=True, exist_ok=True)

    def write(index: int) -> str:
        label = LABELS[index % len(LABELS)]
        path = f"{name}/{index:04d}-{label}.mp4"
        write_clip(folder / path, render(label, seeds[index], look, frames, size), FPS)
        question = [{"type": "video", "video": path, "nframes": frames}, {"type": "text", "text": QUESTION}]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": label}]
        return json.dumps({"messages": messages, "category": category(label)})

    bar = {"desc": f"write {name}", "total": len(seeds), "dynamic_ncols": True, "disable": not progress}
    with ThreadPoolExecutor(2) as pool:
        lines = list(tqdm(pool.map(write, range(len(seeds))), **bar))
    file = folder / f"{name}.jsonl"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file
