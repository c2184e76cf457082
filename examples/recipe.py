"""What the recipes share: their options, and `sta-adapter train` and `sta-adapter evaluate` called from Python."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from sta_adapter.cli import cli
from sta_adapter.demo import TINY_BASE

TINY_TRAINING = {
    **{"max_steps": 2, "epochs": 1, "batch_size": 2, "device_batch_size": 2, "num_workers": 0, "learning_rate": 1e-2},
    **{"lora_rank": 4, "lora_qkv_rank": 4, "frames.min_tokens": "null", "frames.max_tokens": "null"},
}


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every recipe has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default="Qwen/Qwen2-VL-2B-Instruct", help="on the Hub, or its folder [%(default)s]")
    made.add_argument("--out", type=Path, help="folder for data, adapter and results")
    made.add_argument("--seed", type=int, default=0, help="of all that is drawn at random [%(default)s]")
    made.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of training")
    made.add_argument(
        "--launcher", default="", metavar="WORDS", help="in front of training, such as 'accelerate launch ...'"
    )
    made.add_argument("--prepare-only", action="store_true", help="write the data and stop")
    made.add_argument("--tiny", action="store_true", help="a tiny model and made clips, in seconds on a CPU")
    return made


def parse(made: argparse.ArgumentParser, needed: Sequence[str], argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse; without `--tiny`, the options in `needed` must be given."""
    args = made.parse_args(argv)
    missing = [f"--{name}" for name in needed if getattr(args, name.replace("-", "_")) is None]
    if args.tiny:
        args.model = str(TINY_BASE)
        args.out = args.out or Path(tempfile.mkdtemp(prefix="sta-recipe-"))
    elif missing:
        made.error(f"{', '.join(missing)} needed, or --tiny")
    return args


def train(settings: Path, args: argparse.Namespace, data: Path, *more: str) -> Path:
    """`sta-adapter train` with a recipe's settings; gives the adapter's folder."""
    adapter = args.out / "adapter"
    tiny = [word for pair in TINY_TRAINING.items() for word in ("--set", "{}={}".format(*pair))] if args.tiny else []
    own = [word for pair in args.set for word in ("--set", pair)]
    words = ("train", "--config", settings, "--model", args.model, "--data", data, "--out", adapter, *tiny, *own, *more)
    if args.launcher:
        launched = [*shlex.split(args.launcher), "--no_python", "sta-adapter", *map(str, words)]
        subprocess.run(launched, check=True)
    else:
        _command(*words)
    return adapter


def evaluate(args: argparse.Namespace, adapter: Path, data: Path, *more: str) -> Path:
    """`sta-adapter evaluate`, also on frames out of order, with exact answers; gives the file of results."""
    tiny = ("--num-workers", "0", "--max-new-tokens", "4") if args.tiny else ()
    where = ("--model", args.model, "--adapter", adapter, "--data", data, "--out", args.out / "results")
    _command("evaluate", *where, "--frames", "all", *tiny, *more)
    return args.out / "results" / "results.json"


def _command(*words: str | Path) -> None:
    cli.main([str(word) for word in words], standalone_mode=False)
