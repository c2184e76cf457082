"""A small part of the comparison, and a page that shows it: `make demo-real`.

With `--quick` it takes seconds and needs no network: a tiny random encoder, drawn objects, a few steps. That proves nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import html
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cache import pixels
from clips import FRAMES, LABELS
from drawn import draw_objects, draw_photographs
from encoder import load_encoder
from PIL import Image
from prepare import QUICK, Settings, prepare
from table import SHORT, figure, main_table
from train import Run, run

from sta_adapter import load_sta
from sta_adapter.video import read_clip
from sta_adapter.visualization.observation import observe

SMALL = Settings(train=1200, val=100, test=200)
SHOWN, ORDER = ("reader", "lora", "sta"), "causal"
SETTINGS = ("order", "lr", "reader's lr", "steps", "data")  # columns of the table that the page leaves out
STYLE = """:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
img { max-width: 100%; image-rendering: pixelated; } table { border-collapse: collapse; display: block; overflow-x: auto; }
td, th { padding: 0.3em 0.6em; border-bottom: 1px solid #8886; text-align: left; } .right { color: #2e9e73; } .wrong { color: #d9730d; }"""


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("sta-demo-real"), help="folder for the page and all else")
    parser.add_argument("--encoder", default="pip", help='Hub id or folder of a DINOv2, or "pip"')
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args(arguments)
    settings, steps, folders = dataclasses.replace(SMALL, encoder=given.encoder), given.steps, (None, None)
    if given.quick:
        settings, steps = QUICK, 4
        folders = (draw_objects(given.out / "objects"), draw_photographs(given.out / "photographs"))
    prepare(given.out, settings, *folders)
    runs = []
    for arm in SHOWN:
        what = Run(arm, steps=steps, order=ORDER)
        file = run(given.out, settings, what, given.out / "results")
        runs.append(json.loads(Path(str(file)).read_text(encoding="utf-8")))
    print(main_table(runs))
    print(write_page(given.out, settings, runs, Run("sta", steps=steps, order=ORDER).name))


def write_page(out: Path, settings: Settings, runs: list[dict[str, Any]], adapter: str) -> Path:
    """Write `index.html`: curves, table, and a clip of each movement with the answers and where STA adds most; its path."""
    handle = load_sta(load_encoder(settings.encoder, out), out / "adapters" / adapter)
    lines = (out / "clips" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    parts = []
    for index, label in enumerate(LABELS):
        clip = read_clip(out / "clips" / json.loads(lines[index])["video"], num_frames=FRAMES).frames
        with torch.no_grad(), handle.clips([FRAMES]):
            seen = observe(handle, {"pixel_values": pixels(clip)})
        strip = out / f"clip-{index}.png"
        Image.fromarray(np.concatenate([film(clip), film(heated(clip, seen.on_picture(seen.branch[-1])))])).save(strip)
        answers = ", ".join(said(run, index, label) for run in runs)
        parts.append(f'<h3>{label}</h3><img src="{strip.name}" alt="frames of the clip"><p>{answers}</p>')
    page = f"""<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>STA on a real encoder</title><style>{STYLE}</style><h1>STA on a real encoder</h1>{figure(runs)}{table(runs)}
<p>{len(lines)} clips of objects and photographs never trained on; one seed, which is no proof: docs/proof.md has more.</p>
<h2>Clips</h2><p>Below each clip: where STA in the last block adds most to a token, relative to the token.</p>{"".join(parts)}"""
    (out / "index.html").write_text(page, encoding="utf-8")
    return out / "index.html"


def table(runs: list[dict[str, Any]]) -> str:
    """The table in HTML, without the settings."""
    heads, _, *rows = [line[2:-2].split(" | ") for line in main_table(runs).splitlines()]
    shown = [column for column, head in enumerate(heads) if head not in SETTINGS]
    body = "".join("<tr>" + "".join(f"<td>{row[i]}</td>" for i in shown) + "</tr>" for row in (heads, *rows))
    return f"<table>{body}</table>"


def film(frames: np.ndarray) -> np.ndarray:
    """Frames (T, H, W, 3) side by side."""
    return np.concatenate(list(frames), axis=1)


def heated(frames: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Frames in grey, red where the sizes (T, rows, columns) are large."""
    scale = frames.shape[1] // sizes.shape[1]
    heat = np.kron(sizes / max(float(sizes.max()), 1e-9), np.ones((1, scale, scale)))[..., None]
    grey = frames.mean(-1, keepdims=True).repeat(3, -1) * 0.6
    return (grey * (1 - heat) + heat * np.array([235, 90, 40])).astype(np.uint8)


def said(run: dict[str, Any], index: int, label: str) -> str:
    """An arm's answer to a test clip, marked right or wrong."""
    word = run["ordered"]["said"][index]
    mark = "right" if word == label else "wrong"
    return f'{SHORT[run["run"]["arm"]]}: <span class="{mark}">{html.escape(word)}</span>'


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))))
    main()
