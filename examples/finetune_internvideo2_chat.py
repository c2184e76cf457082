"""Fine-tune InternVideo2-Chat with STA: stage one trains STA alone, stage two LoRA beside it.

    python examples/finetune_internvideo2_chat.py --data clips.jsonl --out my-adapter --trust-remote-code
    python examples/finetune_internvideo2_chat.py --tiny

The model's own code needs transformers below 4.50, its weights HF_TOKEN. A sample is a clip, a question and an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from common import arguments
from peft import get_peft_model
from remote_chat import answer_loss, clip_question_answer, load_pixels, make_loader, padded_tokens, run_stage
from tiny_models import internvideo2_chat
from torch import Tensor
from transformers import AutoTokenizer

from sta_adapter import STAConfig, STAHandle, get_sta, inject_sta, load_sta
from sta_adapter.loading import load_model

VIDEO_TOKENS = 96  # that the model's Q-Former makes of a clip
CLIP = -1  # stands for each of them until the batch is made


def load(args: Any) -> tuple[Any, Any]:
    """Model and tokenizer. The model's code is only run where the user says so."""
    if args.tiny:
        return internvideo2_chat()
    options = {"trust_remote_code": args.trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(args.model, use_fast=False, **options)
    return load_model(args.model, dtype="bf16", **options), tokenizer


def main(argv: Sequence[str] | None = None) -> None:
    """Train both stages, save, and load again."""
    args = arguments(__doc__, "OpenGVLab/InternVideo2-Chat-8B", argv)
    frames, size = (4, 8) if args.tiny else (8, 224)
    model, tokenizer = load(args)

    def ids(text: str) -> list[int]:
        return tokenizer(text)["input_ids"]

    def collate(samples: list[Any]) -> dict[str, Tensor]:
        """Clips (B, T, channels, H, W), and the model's prompts with the places of their tokens."""
        paths, questions, answers = zip(*map(clip_question_answer, samples), strict=True)
        before, after = "[INST] <Video>", "</Video>[/INST] [INST] {} [/INST]"
        prompts = [[*ids(before), *[CLIP] * VIDEO_TOKENS, *ids(after.format(text))] for text in questions]
        ends = [tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for text in answers]
        batch = padded_tokens(prompts, ends, tokenizer.pad_token_id or 0)
        batch["video_idx"] = batch["input_ids"] == CLIP
        batch["input_ids"] = batch["input_ids"].clamp(min=0)
        return {**batch, "video": torch.stack([load_pixels(path, frames, size) for path in paths])}

    def loss(handle: STAHandle, batch: dict[str, Tensor]) -> Tensor:  # each clip is a row: STA knows where it ends
        labels = batch.pop("labels")
        return answer_loss(handle.model(**batch).logits, labels)

    settings = {"epochs": args.epochs, "learning_rate": args.learning_rate}
    loader = make_loader(args.data, collate, workers=0 if args.tiny else 4)
    handle = inject_sta(model, STAConfig(init="normal"))  # the one line; with the published, tiny gamma

    handle.freeze_base()  # stage one: STA alone
    first = run_stage(handle.model, loader, partial(loss, handle), **settings)

    peft_model = get_peft_model(handle.model, handle.lora_config())  # stage two: LoRA beside it
    tuned = get_sta(peft_model) or handle
    second = run_stage(peft_model, loader, partial(loss, tuned), **settings)

    tuned.save_pretrained(args.out)
    again = load_sta(load(args)[0], args.out)
    print(f"{again}\nloss of the first and the last step: {first[0]:.3f}, {second[-1]:.3f}; adapter in {args.out}")


if __name__ == "__main__":
    main()
