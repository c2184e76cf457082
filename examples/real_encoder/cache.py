"""What the frozen blocks below those in play make of each frame, computed once, and an encoder that starts from there."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Dinov2Model

from sta_adapter.video import read_clip

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
SHARD, AT_ONCE = 200, 10  # clips a file; clips a forward


class Stored(nn.Module):
    """Stands for the embeddings, and gives the tokens that were put here instead."""

    tokens: Tensor

    def forward(self, *_: Any, **__: Any) -> Tensor:
        return self.tokens


class Passed(nn.Module):
    """Stands for a block whose work is in the stored tokens."""

    def forward(self, tokens: Tensor, *_: Any, **__: Any) -> Tensor:
        return tokens


def arithmetic() -> torch.autocast:
    """Autocast to bfloat16; none on processors without AVX-512, which take several times as long for it as for float32.

    Some with AVX-512 take longer too; there `ATEN_CPU_CAPABILITY=avx2` in the environment chooses float32.
    """
    return torch.autocast("cpu", torch.bfloat16, enabled="AVX512" in torch.backends.cpu.get_cpu_capability())


def below(encoder: Dinov2Model, first: int) -> Dinov2Model:
    """The encoder as far as block `first`; its last hidden state is what that block gets."""
    part = copy.deepcopy(encoder)
    part.encoder.layer = part.encoder.layer[:first]
    part.layernorm = nn.Identity()
    return part


def start_from_stored(encoder: Dinov2Model, first: int) -> Stored:
    """Take out of the encoder what is in front of block `first`; what is returned takes the tokens of a call.

    The blocks in play keep their numbers, so an adapter trained so fits the whole encoder (`load_sta(..., base_model="any")`).
    """
    stored = Stored()
    encoder.embeddings = stored
    for index in range(first):
        encoder.encoder.layer[index] = Passed()
    return stored


def pixels(frames: np.ndarray) -> Tensor:
    """Frames (..., H, W, 3) uint8 as the encoder takes them: (..., 3, H, W), normalised."""
    return ((torch.from_numpy(np.array(frames)).float() / 255 - MEAN) / STD).movedim(-1, -3)


@torch.no_grad()
def store(part: Dinov2Model, depths: tuple[int, ...], file: Path, folder: Path, frames: int) -> None:
    """Read the clips of a JSON Lines file and write their tokens, (clips, T, tokens, C) bf16; what is there stays.

    Args:
        part: of `below`, as deep as the deepest of `depths`.
        depths: after how many blocks tokens are stored, each in a folder of its own.
        file: the clips.
        folder: gets a folder for each depth.
        frames: T.
    """
    lines = file.read_text(encoding="utf-8").splitlines()
    for start in range(0, len(lines), SHARD):
        targets = {depth: folder / str(depth) / f"{file.stem}-{start:05d}.safetensors" for depth in depths}
        if all(target.exists() for target in targets.values()):
            continue
        tokens: dict[int, list[Tensor]] = {depth: [] for depth in depths}
        end = min(start + SHARD, len(lines))
        for index in range(start, end, AT_ONCE):
            videos = [file.parent / json.loads(line)["video"] for line in lines[index : min(index + AT_ONCE, end)]]
            clips = np.stack([read_clip(video, num_frames=frames).frames for video in videos])
            with arithmetic():
                hidden = part(pixels(clips).flatten(0, 1), output_hidden_states=True).hidden_states
            for depth in depths:
                tokens[depth].append(hidden[depth].bfloat16().unflatten(0, clips.shape[:2]))
        for depth, target in targets.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            whole = target.with_suffix(".part")
            save_file({"tokens": torch.cat(tokens[depth])}, whole)
            whole.replace(target)


def stored_tokens(folder: Path, depth: int, split: str) -> Tensor:
    """All tokens of a split after so many blocks, (clips, T, tokens, C) bf16."""
    files = sorted((folder / str(depth)).glob(f"{split}-*.safetensors"))
    return torch.cat([load_file(path)["tokens"] for path in files])
