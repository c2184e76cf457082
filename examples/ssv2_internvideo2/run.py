"""Action recognition on Something-Something v2: the bare InternVideo2-1B encoder, STA in it, and a linear head.

    python examples/ssv2_internvideo2/run.py --tiny

README.md beside it has the command for the real data and encoder.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for what the examples share

import torch
import torch.nn.functional as F
from safetensors.torch import load_model, save_model
from ssv2_labels import TEN, Action, make_tiny_release, read_actions
from tiny_models import internvideo2_encoder
from torch import Tensor, nn
from torch.utils.data import DataLoader
from training import load_pixels, run_stage

from sta_adapter import STAConfig, inject_sta, load_sta
from sta_adapter.evaluation import Score
from sta_adapter.internvideo.v2_encoder_loading import load_encoder


class Recogniser(nn.Module):
    """An encoder, and a linear head on the mean of its patch tokens."""

    def __init__(self, encoder: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes))

    def forward(self, video: Tensor) -> Tensor:
        """Logits (B, classes) of clips (B, 3, T, H, W)."""
        tokens = self.encoder(video)
        tokens = tokens[0] if isinstance(tokens, tuple) else tokens  # some classes give pooled features as well
        return self.head(tokens[:, 1:].float().mean(1))


def encoder_of(args: argparse.Namespace) -> nn.Module:
    """The encoder with its published weights."""
    if args.tiny:
        return internvideo2_encoder()
    return load_encoder(args.weights, dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32)


def read_classes(file: Path) -> dict[str, int]:
    """Class numbers from the official labels.json, which spells templates without brackets."""
    return {name: int(number) for name, number in json.loads(file.read_text(encoding="utf-8")).items()}


def make_loader(actions: Any, classes: dict[str, int], args: argparse.Namespace, shuffle: bool) -> Any:
    """Batches of `video` (B, 3, T, H, W) and `label` (B,)."""
    frames, size = (4, 8) if args.tiny else (8, 224)

    def collate(batch: list[Action]) -> dict[str, Tensor]:
        clips = [load_pixels(str(args.videos / f"{action.id}{args.suffix}"), frames, size) for action in batch]
        labels = [classes[action.template.replace("[", "").replace("]", "")] for action in batch]
        return {"video": torch.stack(clips).transpose(1, 2), "label": torch.tensor(labels)}

    workers = 0 if args.tiny else 8
    return DataLoader(actions, args.batch_size, shuffle=shuffle, collate_fn=collate, num_workers=workers)


@torch.no_grad()
def measure(model: Recogniser, loader: Any) -> Score:
    """Top-1 accuracy of one view a clip."""
    model.eval()
    where = next(model.parameters())
    right = [model(b["video"].to(where.device)).argmax(-1).cpu() == b["label"] for b in loader]
    return Score(int(torch.cat(right).sum()), len(torch.cat(right)))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; `--tiny` makes its own data."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=Path, help="folder of the official train, validation and labels .json")
    parser.add_argument("--videos", type=Path, help="folder of the clips")
    parser.add_argument("--suffix", default=".webm", help="of the clips [%(default)s]")
    parser.add_argument("--weights", type=Path, help="checkpoint of the encoder")
    parser.add_argument("--out", type=Path, help="folder for the adapter and the head")
    parser.add_argument("--epochs", type=float, default=1, help="[%(default)s]")
    parser.add_argument(
        "--batch-size", type=int, default=4, help="clips at a time; 32 times as many a step [%(default)s]"
    )
    parser.add_argument("--tiny", action="store_true", help="a tiny encoder and made clips, in seconds on a CPU")
    args = parser.parse_args(argv)
    missing = [name for name in ("labels", "videos", "weights", "out") if getattr(args, name) is None]
    if missing and not args.tiny:
        parser.error(f"--{', --'.join(missing)} needed, or --tiny")
    if args.tiny:
        args.out = args.out or Path(tempfile.mkdtemp(prefix="sta-recipe-"))
        train, args.videos = make_tiny_release(args.out / "release", 10)
        args.labels, args.suffix = train.parent, ".mp4"
        (args.labels / "validation.json").write_text(train.read_text())
        names = [template.replace("[", "").replace("]", "") for template in TEN]
        (args.labels / "labels.json").write_text(json.dumps({name: str(i) for i, name in enumerate(names)}))
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Train STA and the head on a frozen encoder, save both, load them again, and measure."""
    args = parse(argv)
    classes = read_classes(args.labels / "labels.json")
    train, test = (
        make_loader(read_actions(args.labels / f"{name}.json"), classes, args, name == "train")
        for name in ("train", "validation")
    )
    encoder = encoder_of(args)
    # the one line; full head count and a tiny gamma, as published
    handle = inject_sta(encoder, STAConfig(init="normal"))
    handle.freeze_base()  # STA alone trains, and the head
    width = next(iter(handle.blocks.values())).to_out.out_features
    model = Recogniser(encoder, width, len(classes))
    rates = {"learning_rate": 1e-2 if args.tiny else 1e-4, "weight_decay": 0.01}
    run_stage(model, train, lambda b: F.cross_entropy(model(b["video"]), b["label"]), epochs=args.epochs, **rates)

    handle.save_pretrained(args.out)
    save_model(model.head, str(args.out / "head.safetensors"))

    again = Recogniser(encoder_of(args), width, len(classes))
    load_sta(again.encoder, args.out)
    load_model(again.head, str(args.out / "head.safetensors"))
    score = measure(again.to(next(model.parameters()).device), test)
    low, high = score.interval
    print(
        f"top-1 {100 * score.accuracy:.2f} % [{100 * low:.2f}, {100 * high:.2f}] of {score.total}; saved in {args.out}"
    )


if __name__ == "__main__":
    main()
