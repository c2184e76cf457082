"""What is compared: the reader alone, or with LoRA or STA in the encoder's last blocks."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from cache import start_from_stored
from peft import LoraConfig, get_peft_model
from reader import MOVEMENT, Reader
from torch import Tensor, nn
from transformers import Dinov2Model

from sta_adapter import STAConfig, STAHandle, inject_sta
from sta_adapter.errors import STAWarning


@dataclass(frozen=True)
class Arm:
    """One thing compared: STA's settings or None, LoRA's share of the parameters, and the adapter's learning rate."""

    name: str
    sta: dict[str, Any] | None = None
    lora: float = 0.0  # share of the parameters that STA as in the paper has
    lr: float = 1e-3  # STA's best in its grid, see docs/proof.md
    sta_first: float = 0.0  # share of the steps in which LoRA waits


ARMS: dict[str, Arm] = {
    "reader": Arm("reader alone"),
    "lora": Arm("LoRA", lora=1.0, lr=5e-4),
    "sta": Arm("STA as in the paper", sta={}),
    "sta_before": Arm("STA before the spatial attention", sta={"order": "before_spatial"}),
    "sta_lora": Arm("STA with half the heads, and LoRA", sta={"head_scale": 0.125}, lora=0.5),
    "sta_then_lora": Arm(
        "STA with half the heads, then LoRA with it", sta={"head_scale": 0.125}, lora=0.5, sta_first=0.5
    ),
    "sta_causal": Arm("STA, causal", sta={"causal": True}),
    "sta_no_rope": Arm("STA without rotary embedding", sta={"rope_theta": None}),
    "sta_normal": Arm('STA, init="normal"', sta={"init": "normal"}),
}

ORDERS = {
    "told": "each frame stands at a position of its own",
    "causal": "all frames stand at the same positions; the causal mask alone tells them apart",
    "learned": "as none, but tokens get a vector of their frame, which begins near zero and is learned from the clips",
    "none": "all frames stand at the same positions, and visual tokens see each other both ways, as PaliGemma's do",
}


class Watcher(nn.Module):
    """Encoder from block `first` on, and reader.

    Args:
        encoder: the whole one, which is copied.
        reader: is trained too.
        first: block in play that comes first; as many as there are when none is.
        arm: of `ARMS`.
        order: of `ORDERS`, what the reader knows of the frames' order.

    Attributes:
        frame_vectors: (T, 1, hidden), of each frame; trained with the reader where the order is learned, else None.
    """

    def __init__(self, encoder: Dinov2Model, reader: Reader, first: int, arm: Arm, order: str = "told") -> None:
        super().__init__()
        self.reader, self.order = reader, order
        encoder = copy.deepcopy(encoder)
        last = range(first, len(encoder.encoder.layer))
        self.handle: STAHandle | None = None
        wanted = sta_size(encoder, last) if arm.lora else 0
        if arm.sta is not None:
            self.handle = inject_sta(encoder, STAConfig(layers=tuple(last), attention="eager", **arm.sta))
            self.handle.freeze_base()
        self.encoder: nn.Module = encoder
        if arm.lora:
            self.encoder = add_lora(encoder, last, round(arm.lora * wanted))
        for name, parameter in self.encoder.named_parameters():
            parameter.requires_grad_("lora_" in name or ".sta." in name)
        self.frame_vectors: nn.Parameter | None = None
        if order == "learned":
            self.frame_vectors = nn.Parameter(0.02 * torch.randn(reader.frames, 1, reader.project.out_features))
        self.stored = start_from_stored(encoder, first)
        # only in front of STA, so `conclude` saves it all the same
        warnings.filterwarnings("ignore", "handle.save_pretrained can't save .* tensors are gone", STAWarning)
        self.patch = encoder.config.patch_size

    def adapter(self) -> Iterator[nn.Parameter]:
        """What the arm trains in the encoder."""
        return (p for p in self.encoder.parameters() if p.requires_grad)

    def train_lora(self, train: bool) -> None:
        """Whether LoRA, where there is any, is trained from here on."""
        for name, parameter in self.encoder.named_parameters():
            if "lora_" in name:
                parameter.requires_grad_(train)

    def reading(self) -> list[nn.Parameter]:
        """What every arm trains: the reader, and what it learns of the frames' order."""
        return [*self.reader.parameters(), *([] if self.frame_vectors is None else [self.frame_vectors])]

    def forward(self, tokens: Tensor, answer: Tensor, question: str = MOVEMENT) -> Tensor:
        """Logits (B, A, words) of the answer's words, from stored tokens (B, T, 1 + N, C)."""
        places = None if self.order == "told" else torch.zeros(tokens.shape[:2], dtype=torch.long)
        both_ways = self.order in ("learned", "none")
        features = self.features(tokens)
        return self.reader(features, question, answer, places, self.frame_vectors, both_ways=both_ways)

    def features(self, tokens: Tensor) -> Tensor:
        """The encoder's last hidden state, (B, T, 1 + N, C), from stored tokens of that shape."""
        batch, frames = tokens.shape[:2]
        self.stored.tokens = tokens.flatten(0, 1).float()
        side = self.reader.side * self.patch
        shape = tokens.new_zeros(1).expand(batch * frames, 3, side, side)  # pixels that nobody reads, for their shape
        if self.handle is None:
            hidden = self.encoder(shape).last_hidden_state
        else:
            with self.handle.clips([frames] * batch):
                hidden = self.encoder(shape).last_hidden_state
        return hidden.float().unflatten(0, (batch, frames))


def sta_size(encoder: Dinov2Model, blocks: range) -> int:
    """Parameters of STA as in the paper in these blocks."""
    handle = inject_sta(encoder, STAConfig(layers=tuple(blocks)))
    size = handle.num_parameters()
    handle.remove()
    return size


def add_lora(encoder: Dinov2Model, blocks: range, wanted: int) -> nn.Module:
    """LoRA on every matrix of the blocks, at the smallest rank that gives as many parameters."""
    names, a_rank = [], 0
    for index in blocks:
        for name, module in encoder.encoder.layer[index].named_modules():
            if isinstance(module, nn.Linear) and not name.startswith("sta."):
                names.append(f"encoder.layer.{index}.{name}")
                a_rank += module.in_features + module.out_features
    rank = -(-wanted // a_rank)
    return get_peft_model(encoder, LoraConfig(r=rank, lora_alpha=rank, target_modules=names))
