"""The reader learns to read single frames of the untouched encoder, before any run."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from arms import ARMS, Watcher
from cache import arithmetic
from clips import FRAMES, LABELS, SIZE
from encoder import load_encoder
from measure import read
from prepare import Data, Settings
from reader import DESCRIBE, MOVEMENT, Reader
from steps import WEIGHT_DECAY, loss_of, picked, schedule, update
from torch import Tensor
from transformers import Dinov2Model

READS = "reader.json"  # what the reader reads of single frames of validation clips


def new_reader(encoder: Dinov2Model) -> Reader:
    """An untrained reader."""
    torch.manual_seed(0)
    return Reader(encoder.config.hidden_size, SIZE // encoder.config.patch_size, FRAMES, LABELS)


def read_frames(work: Path, settings: Settings) -> dict[str, Tensor]:
    """The weights of the reader that all runs begin with: it has learned to read single frames of the untouched encoder.

    First it describes them; then, in fewer steps, it also says what may be the movement of the clip that a frame is from, as
    far as one frame tells: which words answer that question, but not which of a pair.
    """
    stages = (
        (work / "reader-describes.pt", settings.reader_steps, settings.reader_rate, (DESCRIBE,)),
        (work / "reader.pt", settings.word_steps, settings.reader_rate / 2, (DESCRIBE, MOVEMENT)),
    )
    if stages[-1][0].exists() and (work / READS).exists():
        return torch.load(stages[-1][0], weights_only=True)
    encoder = load_encoder(settings.encoder, work)
    whole = len(encoder.encoder.layer)
    watcher, data = Watcher(encoder, new_reader(encoder), whole, ARMS["reader"]), Data(work, "train", whole)
    for file, steps, rate, questions in stages:
        if file.exists():
            watcher.reader.load_state_dict(torch.load(file, weights_only=True))
            continue
        optimizer = torch.optim.AdamW(watcher.reader.parameters(), rate, weight_decay=WEIGHT_DECAY)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = rate * schedule(step, steps)
            chosen = picked(len(data.clips), settings.reader_batch, 0, step)
            which = torch.randint(FRAMES, (len(chosen),), generator=torch.Generator().manual_seed(step))
            loss = read_step(watcher, optimizer, data, chosen, which, questions)
            if step % 100 == 99:
                print(f"{file.stem}: step {step + 1}, loss {loss:.3f}", flush=True)
        torch.save(watcher.reader.state_dict(), file)
    reads = read(watcher, Data(work, "val", whole))
    print(f"of single frames of validation clips the reader reads {reads}", flush=True)
    (work / READS).write_text(json.dumps(reads), encoding="utf-8")
    return watcher.reader.state_dict()


def read_step(
    watcher: Watcher,
    optimizer: torch.optim.Optimizer,
    data: Data,
    chosen: list[int],
    which: Tensor,
    questions: tuple[str, ...],
) -> float:
    """One step on a frame, `which` of each of the chosen clips; the loss."""
    reader = watcher.reader
    states = [data.clips[i]["states"][t] for i, t in zip(chosen, which.tolist(), strict=True)]
    with torch.no_grad(), arithmetic():
        features = watcher.features(data.tokens[chosen, which].unsqueeze(1))
    loss = torch.zeros(())
    for question in questions:
        answer = reader.descriptions(states) if question == DESCRIBE else data.answers(reader, chosen)
        loss = loss + loss_of(reader(features, question, answer, which.unsqueeze(1)), answer)
    return update(loss, optimizer)
