"""The comparison's runs, each resumed where it stopped and written down as one JSON file.

python train.py --work FOLDER prepare                  clips, stored tokens
python train.py --work FOLDER run sta --order causal --seed 0
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from arms import ARMS, ORDERS, Watcher
from cache import arithmetic
from encoder import load_encoder
from measure import made_by, measure
from prepare import Data, Settings, count_pictures, prepare
from pretrain_reader import READS, new_reader, read_frames
from steps import WEIGHT_DECAY, loss_of, picked, schedule, update
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
SAVE_EVERY, POINTS = 50, 4
READER_LR = 5e-4


@dataclass(frozen=True)
class Run:
    """One run; its name is that of its files."""

    arm: str
    seed: int = 0
    lr: float | None = None  # the arm's own
    steps: int = 500
    reader_lr: float = READER_LR
    share: float = 1.0  # of the clips trained on
    order: str = "told"  # of `ORDERS`: what the reader knows of the frames' order
    test: bool = True  # whether the test's clips are asked at the end

    def __post_init__(self) -> None:
        if self.lr is None:
            object.__setattr__(self, "lr", ARMS[self.arm].lr)

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
    groups = [{"params": watcher.reading(), "lr": what.reader_lr}]
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
        watcher.train_lora(step >= ARMS[what.arm].sta_first * what.steps)
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
    outcome["pictures"] = {split: count_pictures(work, split) for split in ("train", "val", "test")}
    outcome["reader_reads"] = json.loads((work / READS).read_text(encoding="utf-8"))
    outcome |= {"parameters": sum(p.numel() for p in watcher.adapter()), "seconds": round(record["seconds"])}
    if what.test:
        test = Data(work, "test", depth)
        outcome["ordered"] = measure(watcher, test, settings.batch)
        outcome["shuffled"] = measure(watcher, test, settings.batch, shuffled=True)
    if what.test and watcher.handle is not None and not ARMS[what.arm].lora:
        # the encoder was changed only in front of STA, where stored tokens stand for it
        watcher.handle.save_pretrained(work / "adapters" / what.name, base_changed=True)
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


def train_step(watcher: Watcher, optimizer: torch.optim.Optimizer, tokens: Tensor, answer: Tensor) -> float:
    """One step on clips; the loss."""
    with arithmetic():
        loss = loss_of(watcher(tokens, answer), answer)
    return update(loss, optimizer)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, default=Path("real-encoder"), help="folder for clips, tokens and checkpoints"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the runs' JSON files")
    parser.add_argument("--encoder", default="pip", help='Hub id or folder of a DINOv2, or "pip"')
    parser.add_argument("--first", type=int, default=Settings.first, help="the block in play that comes first, from 0")
    parser.add_argument("--circling", action="store_true", help="(counter)clockwise in a circle, not turning in place")
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("prepare", help="write the clips and store tokens")
    first.add_argument("--objects", type=Path, help="folder of SVG or PNG files with transparency, instead of OpenMoji")
    first.add_argument("--photographs", type=Path, help="folder of pictures, instead of scikit-image's")
    one = commands.add_parser("run", help="one run")
    one.add_argument("arm", choices=ARMS)
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--lr", type=float, help="the adapter's [default: of its arm]")
    one.add_argument("--reader-lr", type=float, default=READER_LR)
    one.add_argument("--steps", type=int, default=Run.steps)
    one.add_argument("--share", type=float, default=1.0, help="of the clips trained on")
    one.add_argument("--order", choices=ORDERS, default=Run.order, help="what the reader knows of the frames' order")
    one.add_argument("--search", action="store_true", help="validation alone; the test's clips are not asked")
    given = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    settings = Settings(encoder=given.encoder, first=given.first, circling=given.circling)
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
        print(run(given.work, settings, what, given.results))


if __name__ == "__main__":
    main()
