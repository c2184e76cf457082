"""What stands for the language model: a projector and a small causal language model that answers in words.

As in a Video-LLM the visual tokens of all frames come first, then a question. It first learns to read single frames: is
the object there, where, how large, which way up, wherever among a clip's frames the frame stands; only then does it see
clips.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

DIGITS = tuple("0123456789")
FRAME, DESCRIBE, MOVEMENT = "<frame>", "describe", "movement"
IGNORED = -100


def seen_by(length: int, prefix: int) -> Tensor:
    """What is added to scores, (length, length): causal, and within the first `prefix` tokens nothing is hidden.

    Given in full, because transformers takes a gap in the positions for the end of a document that the next can't see.
    """
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    hidden[:prefix, :prefix] = False
    return torch.zeros(length, length).masked_fill(hidden, torch.finfo(torch.float32).min)


class Reader(nn.Module):
    """Projector and language model.

    Args:
        width: C of the encoder's tokens.
        side: patches along a frame's side, an even number.
        frames: of a clip, T.
        words: that answers of movements are made of.
        hidden: width of the language model.
    """

    def __init__(self, width: int, side: int, frames: int, words: tuple[str, ...], hidden: int = 128) -> None:
        super().__init__()
        self.side, self.frames = side, frames
        self.words = (FRAME, DESCRIBE, MOVEMENT, "yes", "no", *DIGITS, *words)
        self.norm, self.project = nn.LayerNorm(4 * width), nn.Linear(4 * width, hidden)
        self.model = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=len(self.words),
                hidden_size=hidden,
                intermediate_size=3 * hidden,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=4,
                max_position_embeddings=1024,
                initializer_range=hidden
                ** -0.5,  # transformers' 0.02 is for wider ones: attention would begin all but even
                attn_implementation="eager",
                use_cache=False,
            )
        )

    def number(self, word: str) -> int:
        """A word's token."""
        return self.words.index(word)

    def forward(
        self,
        tokens: Tensor,
        question: str,
        answer: Tensor,
        places: Tensor | None = None,
        vectors: Tensor | None = None,
        *,
        both_ways: bool = False,
    ) -> Tensor:
        """Logits (B, A, words) of each word of the answer, given those before it.

        Args:
            tokens: (B, T, 1 + side * side, C), the class token first.
            question: DESCRIBE or MOVEMENT.
            answer: (B, A) token numbers; IGNORED ones are not read.
            places: (B, T) at which frame of a clip each stands; a whole clip's, when left out.
            vectors: (T, 1, hidden), added to the projected tokens of each frame.
            both_ways: whether visual tokens see later ones too.
        """
        batch, frames = tokens.shape[:2]
        half = self.side // 2
        # b t (h 2) (w 2) c -> b t (h w) (2 2 c): four neighbours are one token, as in Qwen2-VL
        grid = tokens[:, :, 1:].view(batch, frames, half, 2, half, 2, -1).permute(0, 1, 2, 4, 3, 5, 6)
        seen = self.project(self.norm(grid.reshape(batch, frames, half * half, -1)))
        if vectors is not None:
            seen = seen + vectors
        mark = self._embed(FRAME).expand(batch, frames, 1, -1)
        said = self.model.get_input_embeddings()(answer[:, :-1].clamp(min=0))
        asked = self._embed(question).expand(batch, 1, -1)
        inputs = torch.cat([torch.cat([mark, seen], 2).flatten(1, 2), asked, said], 1)
        if places is None:
            places = torch.arange(self.frames).expand(batch, -1)
        a_frame, after = 1 + half * half, inputs.shape[1] - frames * (1 + half * half)
        within = a_frame * places[..., None] + torch.arange(a_frame)
        last = (a_frame * self.frames + torch.arange(after)).expand(
            batch, -1
        )  # the question is where it is after a clip
        output = self.model(
            inputs_embeds=inputs,
            position_ids=torch.cat([within.flatten(1), last], 1),
            attention_mask=seen_by(inputs.shape[1], inputs.shape[1] - after if both_ways else 0).expand(
                batch, 1, -1, -1
            ),
            logits_to_keep=answer.shape[1],
        )
        return output.logits

    def _embed(self, word: str) -> Tensor:
        return self.model.get_input_embeddings().weight[self.number(word)]

    def descriptions(self, states: list[dict[str, Any]]) -> Tensor:
        """Answers to DESCRIBE, (B, 5): there or not; column, row and size in tenths of the frame; eighths of a turn."""
        rows = []
        for state in states:
            if not state["visible"]:
                rows.append([self.number("no")] + 4 * [IGNORED])
                continue
            tenths = [min(9, max(0, int(10 * state[key]))) for key in ("x", "y", "size")]
            eighth = round(state["angle"] / 45) % 8
            rows.append([self.number(word) for word in ("yes", *map(str, tenths), str(eighth))])
        return torch.tensor(rows)
