"""SSv2-T10: ten classes of Something-Something v2 that differ in time. Select, train, score.

python examples/ssv2_t10/run.py --labels labels/train.json --videos 20bn-something-something-v2 --out t10
python examples/ssv2_t10/run.py --tiny
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for what the examples share

import recipe
from ssv2_labels import TEN, Action, make_tiny_release, read_actions, split, write_jsonl

QUESTION = "Which action does this video show?"


def record(action: Action, videos: Path, suffix: str) -> dict[str, object]:
    """A conversation whose answer is the class's exact name."""
    clip = {"type": "video", "video": str((videos / f"{action.id}{suffix}").resolve())}
    user = {"role": "user", "content": [clip, {"type": "text", "text": QUESTION}]}
    return {"messages": [user, {"role": "assistant", "content": action.template}], "category": action.template}


def main(argv: Sequence[str] | None = None) -> None:
    """Write `train.jsonl` and `test.jsonl`, train on the one and score the other."""
    parser = recipe.parser(__doc__)
    parser.add_argument("--labels", type=Path, help="the official train.json")
    parser.add_argument("--videos", type=Path, help="folder of the clips")
    parser.add_argument("--suffix", default=".webm", help="of the clips [%(default)s]")
    parser.add_argument("--test-share", type=float, default=0.2, help="of the clips, as published [%(default)s]")
    args = recipe.parse(parser, ("labels", "videos", "out"), argv)
    if args.tiny:
        args.labels, args.videos = make_tiny_release(args.out / "release", 10)
        args.suffix = ".mp4"

    parts = split(read_actions(args.labels, TEN), args.test_share, args.seed)
    files = [
        write_jsonl(args.out / f"{name}.jsonl", [record(action, args.videos, args.suffix) for action in part])
        for name, part in zip(("train", "test"), parts, strict=True)
    ]
    print(f"{len(parts[0])} clips to train on, {len(parts[1])} to test on, in {args.out}")
    if not args.prepare_only:
        adapter = recipe.train(Path(__file__).with_name("train.yaml"), args, files[0])
        recipe.evaluate(args, adapter, files[1])


if __name__ == "__main__":
    main()
