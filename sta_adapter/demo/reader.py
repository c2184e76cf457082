"""What all methods begin with: the tiny base, whose language model has learned to read single frames of these clips.

So methods differ in what they add about time, not in how soon a language model says where a thing is.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_cosine_schedule_with_warmup

from sta_adapter.data import VideoDataset
from sta_adapter.data.chat_encoding import Loaded
from sta_adapter.demo.clips import QUESTION
from sta_adapter.demo.model import tiny_model
from sta_adapter.tiny_base import TINY_BASE

DESCRIBE = "What is where?"
BEFORE = "<|im_start|>user\n<|vision_start|>"
SIDE = 2  # tokens of a frame, along its height and along its width


@dataclass(frozen=True)
class ReaderSettings:
    """How long it learns."""

    steps: int = 600  # in which it describes frames
    word_steps: int = 200  # more of them, at half the rate, in which it also says what may happen
    batch_size: int = 64  # frames a step
    learning_rate: float = 1e-3  # the highest, then a cosine to zero

    @classmethod
    def quick(cls) -> ReaderSettings:
        """A run of seconds that shows every step and proves nothing."""
        return cls(steps=4, word_steps=4, batch_size=4)


def write_reader(
    folder: Path, settings: ReaderSettings, seed: int, data: VideoDataset, described: Sequence[list[str]]
) -> Path:
    """Teach a fresh tiny base and write its folder.

    It first describes frames, each at the place it has in its clip, as `described` has it of each frame of each clip; then, in
    fewer steps, it also says what may happen in the clip that a frame is from, as far as one frame tells: which words answer
    that, but not which of a pair. The vision encoder below the merger stays as it is. `seed` is of the order of frames.
    """
    model, tokenizer = tiny_model(), data.processor.tokenizer
    torch.manual_seed(seed)
    for name, weight in model.named_parameters():
        weight.requires_grad_("visual" not in name or "merger" in name)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    places = len(described[0])
    clips = [cast(Loaded, data[i])["pixel_values_videos"] for i in range(len(data))]
    pixels = torch.stack(clips).unflatten(1, (places, -1))
    happens = [str(sample.answer) for sample in data.samples]
    stages = ((settings.steps, 1.0, (DESCRIBE,)), (settings.word_steps, 0.5, (DESCRIBE, QUESTION)))
    for steps, share, questions in stages:
        optimizer = torch.optim.AdamW(weights, share * settings.learning_rate, weight_decay=0.01)
        schedule = get_cosine_schedule_with_warmup(optimizer, min(50, steps // 4), steps)
        for _ in range(steps):
            losses = []
            for question in questions:
                clip = torch.randint(len(pixels), (settings.batch_size // len(questions),))
                place = torch.randint(places, clip.shape)
                pairs = zip(clip.tolist(), place.tolist(), strict=True)
                answers = [described[i][t] if question == DESCRIBE else happens[i] for i, t in pairs]
                losses.append(model(**frame_batch(tokenizer, question, answers, pixels[clip, place], place)).loss)
            optimizer.zero_grad()
            torch.stack(losses).sum().backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
    shutil.copytree(TINY_BASE, folder, dirs_exist_ok=True)
    cast(PreTrainedModel, model).save_pretrained(folder)
    return folder


def frame_batch(
    tokenizer: PreTrainedTokenizerBase, question: str, answers: list[str], pixels: Tensor, place: Tensor
) -> dict[str, Tensor]:
    """The model's arguments for one frame a row, where it stands in its clip.

    One question for all, answers of equally many tokens, `pixels` (B, positions, values), and `place` (B,) among the clip's frames.
    """
    count = len(answers)
    prompt = f"{BEFORE}{'<|video_pad|>' * SIDE**2}<|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"
    ids = torch.tensor([tokenizer(f"{prompt}{answer}<|im_end|>").input_ids for answer in answers])
    labels = ids.clone()
    labels[:, : len(tokenizer(prompt).input_ids)] = -100
    start = len(tokenizer(BEFORE).input_ids)
    rows, columns = (axis.flatten() for axis in torch.meshgrid(2 * [torch.arange(SIDE)], indexing="ij"))
    frame = torch.stack(
        [x + start for x in (place[:, None].expand(-1, SIDE**2), rows.expand(count, -1), columns.expand(count, -1))]
    )
    before = torch.arange(start).expand(3, count, -1)
    after = (torch.arange(ids.shape[1] - start - SIDE**2) + start + SIDE).expand(3, count, -1)
    return {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.cat([before, frame, after], 2),  # text goes on after rows and columns, as the base has it
        "pixel_values_videos": pixels.flatten(0, 1),
        "video_grid_thw": torch.tensor([[1, 2 * SIDE, 2 * SIDE]] * count),
    }
