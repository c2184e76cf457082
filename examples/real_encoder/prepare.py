"""What all runs share: how large they are, the clips, and what the frozen blocks make of each frame."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from cache import below, store, stored_tokens
from clips import FRAMES, list_objects, list_photographs, write_split
from encoder import load_encoder
from reader import Reader
from torch import Tensor


@dataclass(frozen=True)
class Settings:
    """How large the comparison is.

    Attributes:
        encoder: as `load_encoder` takes it.
        first: the block in play that comes first; what is below is frozen and stored.
        train: clips trained on.
        val: clips on which learning rates are chosen.
        test: clips of the table, with objects and photographs of their own.
        circling: whether what moves (counter)clockwise goes round in a circle instead of turning where it is.
        batch: clips a step.
        reader_steps: of describing single frames, in steps of `reader_batch` frames at `reader_rate`.
        word_steps: then of also naming the movement, as far as single frames tell it, at half that rate.
        reader_batch: frames a step.
        reader_rate: learning rate of it.
    """

    encoder: str = "pip"
    first: int = 8
    train: int = 2000
    val: int = 200
    test: int = 600
    circling: bool = False
    batch: int = 16
    reader_steps: int = 1000
    word_steps: int = 200
    reader_batch: int = 64
    reader_rate: float = 1e-3


QUICK = Settings(
    encoder="tiny", first=2, train=20, val=10, test=10, batch=4, reader_steps=4, word_steps=2, reader_batch=8
)


class Data:
    """A split in memory: tokens (clips, T, 1 + N, C) bf16, labels, and the states of every frame."""

    def __init__(self, work: Path, split: str, depth: int, share: float = 1.0) -> None:
        lines = (work / "clips" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        self.tokens = stored_tokens(work / "tokens", depth, split)
        count = round(share * len(lines))
        self.tokens, self.clips = self.tokens[:count], [json.loads(line) for line in lines[:count]]

    def answers(self, reader: Reader, indices: list[int]) -> Tensor:
        """The words of the movements, (B, 1)."""
        return torch.tensor([[reader.number(self.clips[i]["label"])] for i in indices])


def count_pictures(work: Path, split: str) -> dict[str, int]:
    """How many objects and photographs a split's clips are made of."""
    lines = (work / "clips" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return {kind: len({json.loads(line)[kind] for line in lines}) for kind in ("object", "photograph")}


def prepare(work: Path, settings: Settings, objects: Path | None = None, photographs: Path | None = None) -> None:
    """Write the clips and store what the frozen blocks make of them; what is there stays."""
    things, places = list_objects(objects, work / "objects.json"), list_photographs(photographs)
    encoder = load_encoder(settings.encoder, work)
    whole = len(encoder.encoder.layer)
    part = below(encoder, whole)
    for split in ("val", "test", "train"):
        count = getattr(settings, split)
        file = write_split(work / "clips", split, count, things[split], places[split], circling=settings.circling)
        store(part, (settings.first, whole), file, work / "tokens", FRAMES)
        print(f"{split}: {count} clips", flush=True)
