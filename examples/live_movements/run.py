"""Causal STA on the demo's ten movements: as good as STA that looks both ways, and how soon is its answer right?

`python run.py` trains both on three seeds (`--quick`: seconds, proves nothing), and writes results.json. `python figure.py`
makes of it the table and the picture of docs/live.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sta_adapter import STAHandle
from sta_adapter.data import Collator, VideoDataset
from sta_adapter.demo.clips import FRAMES, LABELS, QUESTION, category, render
from sta_adapter.demo.methods import FRAME_SETTINGS, DemoSettings, train_method
from sta_adapter.demo.model import two_threads
from sta_adapter.demo.run import make_clips, versions
from sta_adapter.demo.scores import measure
from sta_adapter.live.memory import joined
from sta_adapter.video import write_clip

HERE = Path(__file__).resolve().parent
REST = FRAMES  # frames at rest in front of a movement, and behind it
SEEN = FRAMES  # frames that the language model sees, as in training; the tiny base takes them one by one
BATCH = 50
SETTINGS, QUICK = DemoSettings().from_tiny_base(), DemoSettings.quick().from_tiny_base()


@two_threads()
def main(argv: list[str] | None = None) -> None:
    """Train and measure; what is in the results file already is not trained again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, default=Path("live-movements"), help="folder for clips and runs [%(default)s]"
    )
    parser.add_argument("--results", type=Path, default=HERE / "results.json", help="[%(default)s]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="a few clips and steps")
    args = parser.parse_args(argv)
    settings = QUICK if args.quick else SETTINGS
    found = json.loads(args.results.read_text(encoding="utf-8")) if args.results.exists() else {"runs": []}
    if found["runs"] and found["settings"] != json.loads(json.dumps(dataclasses.asdict(settings))):
        parser.error(f"{args.results} holds runs of other settings; name another file with --results")
    found |= {"settings": dataclasses.asdict(settings), "versions": versions()}
    for seed in args.seeds:
        done = [run["causal"] for run in found["runs"] if run["seed"] == seed]
        if len(done) == 2:
            continue
        data, test, curve = make_clips(args.work, settings, seed)
        for causal in {True, False}.difference(done):
            print(f"seed {seed}, {'causal' if causal else 'both ways'}")
            chosen = dataclasses.replace(settings, causal=causal)
            trained = train_method("sta", chosen, seed, data, curve, args.work / "runs" / f"{causal}-{seed}")
            moments = right_by_moment(trained.model, trained.handle, test, args.work / "long", seed)
            found["runs"].append({"seed": seed, "causal": causal, **measure(trained, test), "moments": moments})
            args.results.write_text(json.dumps(found) + "\n", encoding="utf-8")


@torch.no_grad()
def right_by_moment(
    model: nn.Module, handle: STAHandle, test: VideoDataset, folder: Path, seed: int
) -> dict[str, list[list[int]]]:
    """Whether the answer is right, clip by clip, at each moment of videos that rest, move and rest.

    After each frame the model is asked about the last `SEEN` ones: encoded anew each time ("again"), and, with
    causal STA, each encoded once in a stream ("stream").
    """
    model.eval()
    videos = long_videos(test, folder, seed)
    right: dict[str, list[list[int]]] = {"again": []}
    for first in range(0, len(videos.samples), BATCH):
        indices = range(first, min(first + BATCH, len(videos.samples)))
        prompts = Collator.of(test.processor, side="left")([test.as_prompts("ordered", 0)[i] for i in indices])
        batch = {name: x for name, x in prompts.items() if isinstance(x, Tensor) and name != "labels"}
        items = [videos[i] for i in indices]
        size = items[0]["video_grid_thw"][0, 1:]
        pixels = torch.stack([item["pixel_values_videos"].unflatten(0, (-1, int(size.prod()))) for item in items])
        wanted = torch.tensor([first_token(item) for item in items])
        ways: dict[str, Any] = {"again": asked_again(model, batch, pixels)}
        if handle.config.causal:
            ways["stream"] = asked_in_a_stream(model, handle, batch, pixels, size)
        for way, answers in ways.items():
            right.setdefault(way, []).extend(
                torch.stack([logits.argmax(-1) == wanted for logits in answers], dim=1).int().tolist()
            )
    return right


def long_videos(test: VideoDataset, folder: Path, seed: int) -> VideoDataset:
    """As many videos as the test has clips, in its looks, each with one movement between two rests."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = []
    for index in range(len(test.samples)):
        label, path = LABELS[index % len(LABELS)], folder / f"{seed}-{index:04d}.mp4"
        write_clip(path, render(label, (seed + 31) * 10**7 + index, "held_out", rest=REST), 8.0)
        content = [
            {"type": "video", "video": str(path), "nframes": FRAMES + 2 * REST},
            {"type": "text", "text": QUESTION},
        ]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": label}]
        samples.append({"messages": messages, "category": category(label)})
    return VideoDataset(samples, test.processor, frames=FRAME_SETTINGS, on_bad_sample="error", decode_timeout=None)


def first_token(item: dict[str, Tensor]) -> int:
    """Of a sample's answer."""
    return int(item["input_ids"][(item["labels"] != -100).nonzero()[0, 0]])


def moments(pixels: Tensor) -> Iterator[range]:
    """The frames that are seen at each moment; pixels are (clips, frames, patches, values)."""
    return (range(last + 1 - SEEN, last + 1) for last in range(SEEN - 1, pixels.shape[1]))


def asked_again(model: nn.Module, batch: dict[str, Tensor], pixels: Tensor) -> Iterator[Tensor]:
    """Logits (clips, vocabulary) of the answers' first token at each moment, from frames that are encoded again for each."""
    for frames in moments(pixels):
        seen = pixels[:, frames.start : frames.stop].flatten(0, 2)
        yield model(**{**batch, "pixel_values_videos": seen}).logits[:, -1]


def asked_in_a_stream(
    model: Any, handle: STAHandle, batch: dict[str, Tensor], pixels: Tensor, size: Tensor
) -> Iterator[Tensor]:
    """The same from frames that were encoded once, one after the other, each clip in a stream of its own."""
    streams = [handle.stream(window=SEEN, name=str(index)) for index in range(len(pixels))]
    grid = torch.cat([torch.ones(1, dtype=size.dtype), size]).expand(len(pixels), 3)
    with handle.streams(*streams):
        encoded = [handle.encoder(pixels[:, frame].flatten(0, 1), grid_thw=grid) for frame in range(pixels.shape[1])]
    for frames in moments(pixels):
        seen = by_clip(joined([encoded[frame] for frame in frames]), len(frames), len(pixels))
        hook = handle.encoder.register_forward_hook(lambda module, args, output, seen=seen: seen)
        try:
            with handle.disabled():
                yield model(**{**batch, "pixel_values_videos": pixels[:, :SEEN].flatten(0, 2)}).logits[:, -1]
        finally:
            hook.remove()


def by_clip(output: Any, frames: int, clips: int) -> Any:
    """An encoder's output in the order of clips, of one in the order of frames."""
    if isinstance(output, Tensor):
        return output.unflatten(0, (frames, clips, -1)).transpose(0, 1).flatten(0, 2)
    return type(output)(**{name: by_clip(value, frames, clips) for name, value in output.items()})


if __name__ == "__main__":
    main()
