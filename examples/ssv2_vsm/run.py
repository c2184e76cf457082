"""SSv2-VSM: which of two example clips shows the same action as a third, or none. Make, train, score.

python examples/ssv2_vsm/run.py --labels labels/train.json --videos 20bn-something-something-v2 --out vsm
python examples/ssv2_vsm/run.py --tiny
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for what the examples share

import recipe
from ssv2_labels import TEN, Action, make_tiny_release, read_actions, split, write_jsonl

NONE = "No related action"
Triple = tuple[Action, Action, Action, str]  # two examples, the query, the answer


def make_triples(actions: Sequence[Action], positive_share: float, seed: int) -> list[Triple]:
    """One sample for each clip as the query; in `positive_share` of them, within each class, an example is of its class.

    A class of a single clip has no other clip to match, so that all its samples are negative.
    """
    rng = random.Random(seed)
    classes: dict[str, list[Action]] = {}
    for action in actions:
        classes.setdefault(action.template, []).append(action)
    triples = []
    for template, members in classes.items():
        others = [action for action in actions if action.template != template]
        positives = round(len(members) * positive_share) if len(members) > 1 else 0
        for index, query in enumerate(members):
            if index < positives:
                same = rng.choice([action for action in members if action is not query])
                examples = [same, rng.choice(others)]
                rng.shuffle(examples)
                answer = f"Example {examples.index(same) + 1}"
            else:
                examples, answer = rng.sample(others, 2), NONE
            triples.append((examples[0], examples[1], query, answer))
    rng.shuffle(triples)
    return triples


def record(triple: Triple, videos: Path, suffix: str) -> dict[str, object]:
    """A conversation of three clips."""
    first, second, query, answer = triple

    def clip(action: Action) -> dict[str, str]:
        return {"type": "video", "video": str((videos / f"{action.id}{suffix}").resolve())}

    def text(words: str) -> dict[str, str]:
        return {"type": "text", "text": words}

    ask = f"Which example shows the same action as the last video? Answer with its name, or with '{NONE}'."
    content = [text("Example 1:"), clip(first), text("Example 2:"), clip(second), text("Last video:"), clip(query)]
    messages = [{"role": "user", "content": [*content, text(ask)]}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "category": "negative" if answer == NONE else "positive"}


def main(argv: Sequence[str] | None = None) -> None:
    """Write `train.jsonl` and `test.jsonl`, of different clips, train on the one and score the other."""
    parser = recipe.parser(__doc__)
    parser.add_argument("--labels", type=Path, help="the official train.json")
    parser.add_argument("--videos", type=Path, help="folder of the clips")
    parser.add_argument("--suffix", default=".webm", help="of the clips [%(default)s]")
    parser.add_argument("--test-share", type=float, default=0.2, help="of the clips [%(default)s]")
    parser.add_argument("--positive-share", type=float, default=0.8, help="of the samples, as published [%(default)s]")
    args = recipe.parse(parser, ("labels", "videos", "out"), argv)
    if args.tiny:
        args.labels, args.videos = make_tiny_release(args.out / "release", 20)
        args.suffix = ".mp4"

    files = []
    for name, part in zip(
        ("train", "test"), split(read_actions(args.labels, TEN), args.test_share, args.seed), strict=True
    ):
        triples = make_triples(part, args.positive_share, args.seed)
        files.append(write_jsonl(args.out / f"{name}.jsonl", [record(t, args.videos, args.suffix) for t in triples]))
        negative = sum(answer == NONE for *_, answer in triples)
        print(f"{name}: {len(triples)} samples, {negative} of them negative, in {files[-1]}")
    if not args.prepare_only:
        adapter = recipe.train(Path(__file__).with_name("train.yaml"), args, files[0])
        recipe.evaluate(args, adapter, files[1])


if __name__ == "__main__":
    main()
