"""Make the tiny Qwen2-VL that ships in sta_adapter/demo/tiny_qwen2_vl: train it on single frames, write its folder.

It learns shape, colour and place, from still pictures and clips in which nothing moves: nothing that needs more than
one frame. Deterministic, on the CPU, in minutes; needs transformers 5. Run from the repository root:

    python scripts/make_tiny_base.py
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tiny_base_folder as files
import tiny_base_lessons as lessons
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AutoProcessor, Qwen2VLConfig, Qwen2VLForConditionalGeneration

FOLDER = Path(__file__).parent.parent / "sta_adapter" / "demo" / "tiny_qwen2_vl"
README = """---
library_name: transformers
license: apache-2.0
---

# A tiny Qwen2-VL for demos and tests

The real `Qwen2VLForConditionalGeneration` with {parameters:,} parameters, trained from random ones on made pictures of
one shape each (32 x 32 pixels) and on clips of {frames} frames in which nothing moves. It tells row, column, colour and
shape; it has never seen a movement. Made by `scripts/make_tiny_base.py`.

Of {count} pictures and {count} still clips that it was not trained on, it told right:

| | pictures | still clips |
| --- | --- | --- |
{rows}
Chance: shape and colour 1 in 8, place 1 in 9.
"""


def frames_at_once(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: None, *, cu_seq_lens_q: Tensor, **kwargs: object
) -> tuple[Tensor, None]:
    """Attention within frames of one size, (1, heads, frames*N, D), without the model's loop over them."""
    frames = len(cu_seq_lens_q) - 1
    q, k, v = (x[0].unflatten(1, (frames, -1)).transpose(0, 1) for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)[None], None


def new_model(folder: Path) -> Qwen2VLForConditionalGeneration:
    """A fresh model. Widths are small, so the usual standard deviation of 0.02 would leave it asleep."""
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig.from_pretrained(folder))
    AttentionInterface.register("flash_frames_at_once", frames_at_once)
    model.model.visual.config._attn_implementation = "flash_frames_at_once"
    for name, weight in model.named_parameters():
        if weight.ndim >= 2:
            nn.init.normal_(weight, std=0.3 if "embed_tokens" in name else 0.6 * weight[0].numel() ** -0.5)
    return model


def train(name: str, weights: list[nn.Parameter], losses: Iterator[Tensor], steps: int, rate: float) -> None:
    """AdamW with warm-up and a cosine, one loss a step."""
    optimizer = torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.95), weight_decay=0.02)
    start, warm_up, recent = time.time(), 100, []
    for step in range(steps):
        factor = min(1.0, (step + 1) / warm_up) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))
        optimizer.param_groups[0]["lr"] = rate * factor
        loss = next(losses)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        recent.append(loss.item())
        if (step + 1) % 200 == 0:
            logging.info("%s step %d: loss %.3f, %.0f s", name, step + 1, np.mean(recent), time.time() - start)
            recent.clear()


@torch.no_grad()
def measure(model: nn.Module, tokenizer: Any, frames: int, count: int) -> dict[str, float]:
    """Shares of pictures or still clips never seen of which shape, colour and place are told right."""
    rng, right = np.random.default_rng(10_000 + frames), []
    for _ in range(count // 32):
        inputs = lessons.look(tokenizer, rng, 32, frames, varied=False)
        said = model(**inputs).logits[:, :-1].argmax(-1)
        right.append((said == inputs["labels"][:, 1:])[:, -5:-1])
    row, column, colour, shape = torch.cat(right).unbind(1)
    hits = {"shape": shape, "colour": colour, "place": row & column}
    return {name: hit.float().mean().item() for name, hit in hits.items()}


def write_weights(model: nn.Module, folder: Path) -> None:
    """Save under the names of the published checkpoints, which every transformers version reads."""
    names = {"model.visual.": "visual.", "model.language_model.": "model."}
    weights = {}
    for name, weight in model.state_dict().items():
        for new, published in names.items():
            name = published + name.removeprefix(new) if name.startswith(new) else name
        weights[name] = weight.contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def write_readme(model: nn.Module, tokenizer: Any, folder: Path, count: int) -> None:
    """Measure the model and say what came out."""
    told = [measure(model, tokenizer, frames, count) for frames in (1, lessons.FRAMES)]
    rows = "".join(f"| {name} | {told[0][name]:.1%} | {told[1][name]:.1%} |\n" for name in told[0])
    parameters = sum(weight.numel() for weight in model.parameters())
    text = README.format(parameters=parameters, frames=lessons.FRAMES, count=count, rows=rows)
    (folder / "README.md").write_text(text, encoding="utf-8")
    logging.info(rows)


def main() -> None:
    """Train and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--vision-steps", type=int, default=4000)
    parser.add_argument("--language-steps", type=int, default=1500)
    parser.add_argument("--pictures", type=int, default=512, help="pictures, and still clips, that it is measured on")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    files.write_files(options.out, lessons.sentences())
    tokenizer = AutoProcessor.from_pretrained(options.out).tokenizer
    model = new_model(options.out)
    visual, probe = model.model.visual, nn.Linear(64 * 4, 20)
    seen = [*visual.parameters(), *probe.parameters()]
    train("encoder", seen, lessons.vision_losses(visual, probe, rng, 48), options.vision_steps, 2e-3)
    everything = list(model.parameters())
    train("all", everything, lessons.language_losses(model, tokenizer, rng, 48), options.language_steps, 2e-3)
    write_weights(model, options.out)
    write_readme(model, tokenizer, options.out, options.pictures)


if __name__ == "__main__":
    main()
