"""The comparison's runs, each resumed where it stopped and written down as one JSON file.

python train.py --work FOLDER prepare                  clips, stored tokens
python train.py --work FOLDER run sta --seed 0 --lr 5e-4 --steps 600
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from arms import ARMS, ORDERS, Watcher
from cache import below, store, stored_tokens
from clips import FRAMES, LABELS, PAIRS, SIZE, list_objects, list_photographs, write_split
from encoder import load_encoder
from reader import DESCRIBE, IGNORED, MOVEMENT, Reader
from torch import Tensor
from torch.nn import functional
from transformers import Dinov2Model

import sta_adapter

RESULTS = Path(__file__).parent / "results"
CLIP_NORM, WEIGHT_DECAY, WARMUP, SAVE_EVERY, POINTS = 1.0, 0.01, 50, 50, 4
READER_LR = 5e-4


@dataclass(frozen=True)
class Settings:
    """How large the comparison is.

    Attributes:
        encoder: as `load_encoder` takes it.
        first: the block in play that comes first; what is below is frozen and stored.
        train: clips trained on.
        val: clips on which learning rates are chosen.
        test: clips of the table, with objects and photographs of their own.
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
    batch: int = 8
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


def prepare(work: Path, settings: Settings, objects: Path | None = None, photographs: Path | None = None) -> None:
    """Write the clips and store what the frozen blocks make of them; what is there stays."""
    things, places = list_objects(objects, work / "objects.json"), list_photographs(photographs)
    encoder = load_encoder(settings.encoder, work)
    whole = len(encoder.encoder.layer)
    part = below(encoder, whole)
    for split in ("val", "test", "train"):
        count = getattr(settings, split)
        file = write_split(work / "clips", split, count, things[split], places[split])
        store(part, (settings.first, whole), file, work / "tokens", FRAMES)
        print(f"{split}: {count} clips", flush=True)


def new_reader(encoder: Dinov2Model) -> Reader:
    """An untrained reader."""
    torch.manual_seed(0)
    return Reader(encoder.config.hidden_size, SIZE // encoder.config.patch_size, FRAMES, LABELS)


def picked(count: int, size: int, seed: int, step: int) -> list[int]:
    """The indices of a step, the same whenever it is run: without return within each pass over the data."""
    chosen: list[int] = []
    at = step * size
    while len(chosen) < size:
        epoch, place = divmod(at + len(chosen), count)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(1000 * seed + epoch))
        chosen += order[place : place + size - len(chosen)].tolist()
    return chosen


def schedule(step: int, steps: int) -> float:
    """Warm-up, then a cosine to zero."""
    return min(1.0, (step + 1) / min(WARMUP, max(1, steps // 4))) * 0.5 * (1 + math.cos(math.pi * step / steps))


def read_frames(work: Path, settings: Settings) -> dict[str, Tensor]:
    """The weights of the reader that all runs begin with: it has learned to read single frames of the untouched encoder.

    First it describes them; then, in fewer steps, it also says what may be the movement of the clip that a frame is from, as
    far as one frame tells: which words answer that question, but not which of a pair.
    """
    stages = (
        (work / "reader-describes.pt", settings.reader_steps, settings.reader_rate, (DESCRIBE,)),
        (work / "reader.pt", settings.word_steps, settings.reader_rate / 2, (DESCRIBE, MOVEMENT)),
    )
    if stages[-1][0].exists():
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
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        features = watcher.features(data.tokens[chosen, which].unsqueeze(1))
    loss = torch.zeros(())
    for question in questions:
        answer = reader.descriptions(states) if question == DESCRIBE else data.answers(reader, chosen)
        loss = loss + loss_of(reader(features, question, answer, which.unsqueeze(1)), answer)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(reader.parameters(), CLIP_NORM)
    optimizer.step()
    return loss.item()


def train_step(watcher: Watcher, optimizer: torch.optim.Optimizer, tokens: Tensor, answer: Tensor) -> float:
    """One step on clips; the loss."""
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(watcher(tokens, answer), answer)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], CLIP_NORM)
    optimizer.step()
    return loss.item()


def loss_of(logits: Tensor, answer: Tensor) -> Tensor:
    """Cross-entropy of the answer's words."""
    return functional.cross_entropy(logits.float().flatten(0, 1), answer.flatten(), ignore_index=IGNORED)


@dataclass(frozen=True)
class Run:
    """One run; its name is that of its files."""

    arm: str
    seed: int = 0
    lr: float = 5e-4
    steps: int = 600
    reader_lr: float = READER_LR
    share: float = 1.0  # of the clips trained on
    order: str = "told"  # of `ORDERS`: what the reader knows of the frames' order
    test: bool = True  # whether the test's clips are asked at the end

    @property
    def name(self) -> str:
        """For files."""
        part = ("" if self.share == 1 else f"-share{self.share:g}") + (
            "" if self.order == "told" else f"-order-{self.order}"
        )
        kind = "" if self.test else "search-"
        return f"{kind}{self.arm}-seed{self.seed}-lr{self.lr:g}-reader{self.reader_lr:g}-steps{self.steps}{part}"


def run(
    work: Path, settings: Settings, what: Run, results: Path = RESULTS, stop_after: int | None = None
) -> Path | None:
    """Train and measure; go on where an earlier process stopped. The file of the result, which is kept if it exists.

    Args:
        work: folder of `prepare`.
        settings: how large.
        what: the run.
        results: gets the JSON file.
        stop_after: stop, to be resumed, after so many steps of this process; then None is returned.
    """
    target, state = results / f"{what.name}.json", work / "runs" / f"{what.name}.pt"
    if target.exists():
        return target
    encoder = load_encoder(settings.encoder, work)
    reader = new_reader(encoder)
    reader.load_state_dict(read_frames(work, settings))
    torch.manual_seed(what.seed)
    depth = len(encoder.encoder.layer) if what.arm == "reader" else settings.first
    watcher = Watcher(encoder, reader, depth, ARMS[what.arm], what.order)
    groups = [{"params": list(reader.parameters()), "lr": what.reader_lr}]
    adapter = list(watcher.adapter())
    if adapter:
        groups.append({"params": adapter, "lr": what.lr})
    optimizer = torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY)
    train, val = Data(work, "train", depth, what.share), Data(work, "val", depth)
    record = resume(state, watcher, optimizer) or {"step": 0, "curve": [], "seconds": 0.0, "losses": []}
    begun, rates = record["step"], [what.reader_lr, what.lr]
    every = max(1, what.steps // POINTS)
    started, before = time.process_time(), record["seconds"]
    for step in range(begun, what.steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=False):
            group["lr"] = rate * schedule(step, what.steps)
        chosen = picked(len(train.clips), settings.batch, what.seed, step)
        answer = train.answers(reader, chosen)
        record["losses"].append(train_step(watcher, optimizer, train.tokens[chosen], answer))
        record |= {"step": step + 1, "seconds": before + time.process_time() - started}
        if (step + 1) % every == 0:
            accuracy = measure(watcher, val, settings.batch)["accuracy"]
            mean = sum(record["losses"]) / len(record["losses"])
            record["curve"].append({"step": step + 1, "loss": round(mean, 4), "val": accuracy})
            record["losses"] = []
            print(f"{what.name}: {record['curve'][-1]}, {record['seconds']:.0f} s", flush=True)
        stopped = stop_after is not None and step + 1 - begun >= stop_after
        if stopped or (step + 1) % SAVE_EVERY == 0:
            keep(state, watcher, optimizer, record)
        if stopped:
            return None
    conclude(work, settings, what, watcher, depth, record, target)
    state.unlink(missing_ok=True)
    return target


def conclude(
    work: Path, settings: Settings, what: Run, watcher: Watcher, depth: int, record: dict[str, Any], target: Path
) -> None:
    """Ask the test's clips, keep the adapter, and write the result."""
    outcome: dict[str, Any] = {"run": asdict(what), "settings": asdict(settings), "curve": record["curve"]}
    outcome |= {"parameters": sum(p.numel() for p in watcher.adapter()), "seconds": round(record["seconds"])}
    if what.test:
        test = Data(work, "test", depth)
        outcome["ordered"] = measure(watcher, test, settings.batch)
        outcome["shuffled"] = measure(watcher, test, settings.batch, shuffled=True)
    if what.test and watcher.handle is not None and not ARMS[what.arm].lora:
        watcher.handle.save_pretrained(work / "adapters" / what.name)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(outcome | made_by(), indent=1) + "\n", encoding="utf-8")


def resume(state: Path, watcher: Watcher, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
    """Put back what `keep` wrote, if it did."""
    if not state.exists():
        return None
    saved = torch.load(state, weights_only=True)
    watcher.load_state_dict(saved["trained"], strict=False)
    optimizer.load_state_dict(saved["optimizer"])
    return saved["record"]


def keep(state: Path, watcher: Watcher, optimizer: torch.optim.Optimizer, record: dict[str, Any]) -> None:
    """Write what a run needs to go on."""
    trained = {name: p.detach() for name, p in watcher.named_parameters() if p.requires_grad}
    state.parent.mkdir(parents=True, exist_ok=True)
    part = state.with_suffix(".part")
    torch.save({"trained": trained, "optimizer": optimizer.state_dict(), "record": record}, part)
    part.replace(state)


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
        with torch.autocast("cpu", torch.bfloat16):
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


def made_by() -> dict[str, Any]:
    """When, where and with what."""
    packages = {"sta-adapter": sta_adapter, "torch": torch, "transformers": transformers, "peft": peft}
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} thread(s) of {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), **{k: v.__version__ for k, v in packages.items()}},
        "command": " ".join(["python", "train.py", *sys.argv[1:]]),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, default=Path("real-encoder"), help="folder for clips, tokens and checkpoints"
    )
    parser.add_argument("--encoder", default="pip", help='Hub id or folder of a DINOv2, or "pip"')
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("prepare", help="write the clips and store tokens")
    first.add_argument("--objects", type=Path, help="folder of SVG or PNG files with transparency, instead of OpenMoji")
    first.add_argument("--photographs", type=Path, help="folder of pictures, instead of scikit-image's")
    one = commands.add_parser("run", help="one run")
    one.add_argument("arm", choices=ARMS)
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--lr", type=float, default=Run.lr)
    one.add_argument("--reader-lr", type=float, default=READER_LR)
    one.add_argument("--steps", type=int, default=Run.steps)
    one.add_argument("--share", type=float, default=1.0, help="of the clips trained on")
    one.add_argument("--order", choices=ORDERS, default=Run.order, help="what the reader knows of the frames' order")
    one.add_argument("--search", action="store_true", help="validation alone; the test's clips are not asked")
    given = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    settings = Settings(encoder=given.encoder)
    if given.command == "prepare":
        prepare(given.work, settings, given.objects, given.photographs)
    else:
        what = Run(
            given.arm,
            given.seed,
            given.lr,
            given.steps,
            given.reader_lr,
            given.share,
            order=given.order,
            test=not given.search,
        )
        print(run(given.work, settings, what))


if __name__ == "__main__":
    main()
