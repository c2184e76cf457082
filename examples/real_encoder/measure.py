"""How many clips are told right, and what that was measured with."""

from __future__ import annotations

import datetime
import os
import platform
import sys
from collections import Counter
from typing import Any

import peft
import torch
import transformers
from arms import Watcher
from cache import arithmetic
from clips import FRAMES, LABELS, PAIRS
from prepare import Data
from reader import DESCRIBE, IGNORED

import sta_adapter


@torch.no_grad()
def measure(watcher: Watcher, data: Data, batch: int, *, shuffled: bool = False) -> dict[str, Any]:
    """How many clips are told right, in all, by pair, and among those whose pair is told right.

    Args:
        watcher: the model; its answer is the most probable of all words.
        data: a split.
        batch: clips at once.
        shuffled: whether each clip's frames come in an order drawn for it.
    """
    right, total, named, said = Counter[str](), Counter[str](), 0, []
    generator = torch.Generator().manual_seed(0)
    for start in range(0, len(data.clips), batch):
        indices = list(range(start, min(start + batch, len(data.clips))))
        tokens = data.tokens[indices]
        if shuffled:
            tokens = torch.stack([clip[torch.randperm(len(clip), generator=generator)] for clip in tokens])
        with arithmetic():
            logits = watcher(tokens, data.answers(watcher.reader, indices))
        said += [watcher.reader.words[i] for i in logits[:, -1].argmax(-1).tolist()]
    for clip, word in zip(data.clips, said, strict=True):
        pair = next(pair for pair in PAIRS if clip["label"] in pair)
        total["/".join(pair)] += 1
        right["/".join(pair)] += word == clip["label"]
        named += word in pair
    return {
        "correct": sum(right.values()),
        "total": len(said),
        "accuracy": sum(right.values()) / len(said),
        "pair_named": named,
        "pairs": {pair: [right[pair], total[pair]] for pair in total},
        "said": said[: 2 * len(LABELS)],
    }


@torch.no_grad()
def read(watcher: Watcher, data: Data) -> dict[str, float]:
    """What the reader reads of single frames: the share of each word of a description that is right, given those before it.

    Args:
        watcher: with nothing in the encoder.
        data: a split; the first, a middle and the last frame of each clip are asked, and the angle where an object turns.
    """
    right, total = Counter[str](), Counter[str]()
    for clip, tokens in zip(data.clips, data.tokens, strict=True):
        which = torch.tensor([[0], [FRAMES // 2], [FRAMES - 1]])
        answer = watcher.reader.descriptions([clip["states"][t] for t in which.flatten().tolist()])
        with arithmetic():
            features = watcher.features(tokens[which])
            said = watcher.reader(features, DESCRIBE, answer, which).argmax(-1)
        for index, part in enumerate(("there", "column", "row", "size", "angle")):
            if part == "angle" and len({state["angle"] for state in clip["states"]}) == 1:
                continue
            asked = answer[:, index] != IGNORED
            right[part] += int((said[:, index] == answer[:, index])[asked].sum())
            total[part] += int(asked.sum())
    return {part: round(right[part] / total[part], 3) for part in total}


def made_by() -> dict[str, Any]:
    """When, where and with what."""
    with arithmetic():
        dtype = "bfloat16" if torch.is_autocast_enabled("cpu") else "float32"
    packages = {"sta-adapter": sta_adapter, "torch": torch, "transformers": transformers, "peft": peft}
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} thread(s) of {os.cpu_count()} cores, {dtype}",
        "versions": {"python": platform.python_version(), **{k: v.__version__ for k, v in packages.items()}},
        "command": " ".join(["python", "train.py", *sys.argv[1:]]),
    }
