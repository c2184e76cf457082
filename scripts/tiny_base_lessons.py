"""What the tiny base is taught: pictures of one shape, clips in which nothing moves, and words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import tiny_base_folder as files
import torch
from torch import Tensor, nn
from torch.nn import functional

from sta_adapter.demo import clips

SIZE, FRAMES, NOISE = 32, 8, 5.0
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
QUESTION = "What is here?"
COLOURS = list(clips.COLOURS)
PROMPT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"

Batch = dict[str, Tensor]


def sentences() -> list[str]:
    """Every sentence of the demo, often enough that each word becomes one token."""
    words = [*clips.SHAPES, *COLOURS, *clips.LABELS, *ROWS, *COLUMNS, "user", "assistant", "system"]
    texts = [clips.QUESTION, QUESTION, "It ", *words, *(f" {word}" for word in words)]
    return [text for text in texts for _ in range(20)]


def picture(rng: np.random.Generator, frames: int, varied: bool = True) -> tuple[np.ndarray, clips.Scene]:
    """A shape at rest, of more contrasts and sizes if `varied`. The frames (T, H, W, 3) differ by noise alone."""
    scene = clips.still(rng, clips.LOOKS["all"], frames, SIZE)
    if varied:
        scene.contrast[:] = rng.uniform(0.3, 1)
        scene.radius *= rng.uniform(0.75, 1.25)
    return clips.draw(scene, SIZE, NOISE, rng), scene


def colour_of(scene: clips.Scene) -> int:
    """The index of the scene's colour."""
    return list(clips.COLOURS.values()).index(scene.colour)


def answer(scene: clips.Scene) -> str:
    """What the base says of a scene: row, column, colour, shape."""
    row, column = (min(int(place[0] / SIZE * 3), 2) for place in (scene.y, scene.x))
    return f"{ROWS[row]} {COLUMNS[column]} {COLOURS[colour_of(scene)]} {scene.shape}"


def patches(drawn: np.ndarray) -> tuple[Tensor, Tensor]:
    """What the processor makes of clips (B, T, H, W, 3), quicker: pixels (B*T*N, 3*8*8) and grid (B, 3)."""
    count, frames = drawn.shape[:2]
    size, half = files.PATCH, SIZE // files.PATCH // 2
    pixels = torch.from_numpy(drawn).float() / 127.5 - 1
    pixels = pixels.view(count, frames, half, 2, size, half, 2, size, 3).permute(0, 1, 2, 5, 3, 6, 8, 4, 7)
    return pixels.reshape(-1, 3 * size * size), torch.tensor([[frames, 2 * half, 2 * half]] * count)


def vision_losses(visual: nn.Module, probe: nn.Linear, rng: np.random.Generator, batch: int) -> Iterator[Tensor]:
    """First the encoder alone: shape, colour, place, size and contrast through a linear probe that is thrown away."""
    while True:
        drawn = [picture(rng, 1) for _ in range(batch)]
        tokens = visual(*patches(np.stack([frames for frames, _ in drawn]))).pooler_output
        said = probe(tokens.view(batch, -1))
        shape = torch.tensor([clips.SHAPES.index(scene.shape) for _, scene in drawn])
        colour = torch.tensor([colour_of(scene) for _, scene in drawn])
        rest = np.array([[s.x[0] / 16 - 1, s.y[0] / 16 - 1, s.radius[0] / 4 - 1.6, s.contrast[0]] for _, s in drawn])
        loss = functional.cross_entropy(said[:, :8], shape) + functional.cross_entropy(said[:, 8:16], colour)
        yield loss + 3 * functional.mse_loss(said[:, 16:], torch.from_numpy(rest).float())


def encode(tokenizer: Any, prompts: list[str], answers: list[str]) -> Batch:
    """Token ids (B, L) and labels (B, L) of prompts and answers of equal length."""
    asked = [tokenizer(PROMPT.format(prompt))["input_ids"] for prompt in prompts]
    said = [tokenizer(f"{words}<|im_end|>")["input_ids"] for words in answers]
    ids = torch.tensor([a + b for a, b in zip(asked, said, strict=True)])
    labels = ids.clone()
    labels[:, : len(asked[0])] = -100
    kinds = (ids == files.TOKEN_IDS["<|image_pad|>"]).int() + 2 * (ids == files.TOKEN_IDS["<|video_pad|>"]).int()
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": kinds}


def look(
    tokenizer: Any, rng: np.random.Generator, batch: int, frames: int, told: bool = False, varied: bool = True
) -> Batch:
    """Pictures (frames = 1) or clips in which nothing moves, and what is in them.

    With `told`, the question tells an event, which is to be repeated instead: so the words of events mean something.
    """
    drawn = [picture(rng, frames, varied) for _ in range(batch)]
    pixels, grid = patches(np.stack([clip for clip, _ in drawn]))
    kind = "image" if frames == 1 else "video"
    seen = "<|vision_start|>" + f"<|{kind}_pad|>" * int(grid[0].prod() // 4) + "<|vision_end|>"
    events = [clips.LABELS[i] for i in rng.integers(len(clips.LABELS), size=batch)]
    prompts = [f"{seen}It {event}. {clips.QUESTION}" if told else seen + QUESTION for event in events]
    out = encode(tokenizer, prompts, events if told else [answer(scene) for _, scene in drawn])
    out["pixel_values" if frames == 1 else "pixel_values_videos"] = pixels
    out[f"{kind}_grid_thw"] = grid
    return out


def original_positions(batch: Batch) -> Tensor:
    """Positions (3, B, L) in Qwen2-VL's original way: text goes on after as many places as the clip has frames.

    transformers 5 lets it go on after the clip's rows or columns; the base learns to read either.
    """
    frames, height, width = (int(n) for n in batch["video_grid_thw"][0])
    rows, columns = height // 2, width // 2
    start, length = int((batch["mm_token_type_ids"][0] == 2).int().argmax()), batch["input_ids"].shape[1]
    clip = torch.stack(torch.meshgrid(*map(torch.arange, (frames, rows, columns)), indexing="ij")).flatten(1) + start
    before = torch.arange(start).expand(3, -1)
    after = torch.arange(length - start - clip.shape[1]).expand(3, -1) + start + max(frames, rows, columns)
    return torch.cat([before, clip, after], 1)[:, None].expand(-1, len(batch["input_ids"]), -1)


def language_losses(model: nn.Module, tokenizer: Any, rng: np.random.Generator, batch: int) -> Iterator[Tensor]:
    """Then the whole model, in turns of ten steps: six of pictures, two of still clips, two where an event is told."""
    few = batch // 4
    while True:
        for _ in range(3):
            yield model(**look(tokenizer, rng, batch, 1)).loss
        yield model(**look(tokenizer, rng, few, FRAMES)).loss
        yield model(**look(tokenizer, rng, batch, 1, told=True)).loss
        for _ in range(3):
            yield model(**look(tokenizer, rng, batch, 1)).loss
        told = look(tokenizer, rng, few, FRAMES, told=True)
        yield model(**told).loss
        still = look(tokenizer, rng, few, FRAMES)
        yield model(**still, position_ids=original_positions(still)).loss
