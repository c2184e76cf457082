"""What the fine-tuning scripts share: their options, and what `--tiny` puts in the place of real data."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from sta_adapter.data import FrameSettings
from sta_adapter.demo.clips import write_dataset
from sta_adapter.training import TrainingConfig

TINY = TrainingConfig(
    learning_rate=1e-2,
    batch_size=4,
    max_steps=2,
    num_workers=0,
    lora_rank=4,
    lora_qkv_rank=4,
    frames=FrameSettings(min_tokens=None, max_tokens=None),
)
"""Two steps a stage: they show that everything runs, not that anything is learnt."""


def arguments(description: str | None, model: str, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of a fine-tuning script; with `--tiny`, data and output folder are made.

    Args:
        description: the script's docstring.
        model: default of `--model`.
        argv: the words of the command line; None takes the process's own.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", default=model, help="model on the Hub, or its folder [%(default)s]")
    parser.add_argument("--data", type=Path, help="JSON Lines file of conversations to train on")
    parser.add_argument("--out", type=Path, help="folder for the adapter")
    parser.add_argument("--epochs", type=float, default=1, help="of each stage [%(default)s]")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="at its highest [%(default)s]")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and made clips, in seconds on a CPU")
    args = parser.parse_args(argv)
    if args.tiny:
        args.learning_rate = TINY.learning_rate
        args.out = args.out or Path(tempfile.mkdtemp(prefix="sta-example-"))
        args.data = args.data or write_dataset(args.out / "clips", "train", range(4), frames=8, size=32)
    elif args.data is None or args.out is None:
        parser.error("--data and --out are needed, or --tiny")
    return args
