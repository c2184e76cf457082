"""WebVid-QA: instruction data from captions by a language model, then both stages of training.

python examples/webvid_qa/run.py --captions webvid-10M/data/train --videos webvid/data_mp4 --out webvid-qa
python examples/webvid_qa/run.py --tiny
"""

from __future__ import annotations

import csv
import random
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for what the examples share

import recipe
from make_qa import Caption, language_model, make_conversations, read_captions
from ssv2_labels import write_jsonl

from sta_adapter.demo.clips import LABELS, render
from sta_adapter.video import write_clip


def record(caption: Caption, pairs: Sequence[tuple[str, str]], clip: Path) -> dict[str, object]:
    """A conversation about a clip, of one turn or several."""
    messages: list[dict[str, object]] = []
    for number, (question, answer) in enumerate(pairs):
        shown = [] if number else [{"type": "video", "video": str(clip.resolve())}]
        messages.append({"role": "user", "content": [*shown, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": answer})
    return {"messages": messages, "videoid": caption.id}


def make_tiny_webvid(folder: Path) -> tuple[Path, Path]:
    """Six made clips with captions; gives the folders of captions and of clips."""
    captions, videos = folder / "captions", folder / "videos"
    captions.mkdir(parents=True, exist_ok=True)
    videos.mkdir(exist_ok=True)
    with (captions / "0.csv").open("w", newline="", encoding="utf-8") as lines:
        table = csv.writer(lines)
        table.writerow(["videoid", "contentUrl", "duration", "page_dir", "name"])
        for index, label in enumerate(LABELS[:6]):
            write_clip(videos / f"{index}.mp4", render(label, index, frames=8, size=32), fps=8)
            table.writerow([index, "", "PT00H00M01S", "", f"A thing moves: {label}"])
    return captions, videos


def ask_nobody(prompts: list[str]) -> list[str]:
    """What `--tiny` has for a language model: two questions with the description's last words for an answer."""
    reply = "Question: What happens?\nAnswer: {0}.\n\nQuestion: Are you sure?\nAnswer: Yes, {0}."
    return [reply.format(prompt.rsplit(": ", 1)[-1]) for prompt in prompts]


def main(argv: Sequence[str] | None = None) -> None:
    """Write `train.jsonl` and `held_out.jsonl` and train on the one."""
    parser = recipe.parser(__doc__)
    parser.add_argument("--captions", type=Path, help="folder of CSV files with the columns videoid and name")
    parser.add_argument("--videos", type=Path, help="folder of the clips, VIDEOID.mp4")
    parser.add_argument(
        "--writer", default="Qwen/Qwen2.5-7B-Instruct", help="the language model that asks [%(default)s]"
    )
    parser.add_argument("--most", type=int, default=1_000_000, help="captions, the longest [%(default)s]")
    parser.add_argument("--held-out", type=int, default=500, help="conversations for the evaluation loss [%(default)s]")
    args = recipe.parse(parser, ("captions", "videos", "out"), argv)
    ask = ask_nobody if args.tiny else language_model(args.writer)
    if args.tiny:
        args.captions, args.videos = make_tiny_webvid(args.out / "webvid")
        args.held_out = 2

    captions = [c for c in read_captions(args.captions, args.most) if (args.videos / f"{c.id}.mp4").exists()]
    made = [(c, pairs) for c, pairs in make_conversations(captions, ask, seed=args.seed) if pairs]
    records = [record(caption, pairs, args.videos / f"{caption.id}.mp4") for caption, pairs in made]
    random.Random(args.seed).shuffle(records)
    held_out = write_jsonl(args.out / "held_out.jsonl", records[: args.held_out])
    data = write_jsonl(args.out / "train.jsonl", records[args.held_out :])
    print(f"{len(records)} conversations of {len(captions)} captions whose clips are there, in {args.out}")
    if not args.prepare_only:
        recipe.train(Path(__file__).with_name("train.yaml"), args, data, "--eval-data", str(held_out))


if __name__ == "__main__":
    main()
