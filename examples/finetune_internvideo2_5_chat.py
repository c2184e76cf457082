"""Fine-tune InternVideo2.5-Chat with STA: stage one trains STA alone, stage two LoRA beside it.

    python examples/finetune_internvideo2_5_chat.py --data clips.jsonl --out my-adapter
    python examples/finetune_internvideo2_5_chat.py --tiny

`sta-adapter train` does the same. This loop shows every step. A sample is one clip, one question and one answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from common import arguments
from peft import get_peft_model
from remote_chat import answer_loss, clip_question_answer, load_pixels, make_loader, padded_tokens, run_stage
from tiny_models import internvl_chat
from torch import Tensor

from sta_adapter import STAHandle, get_sta, inject_sta, load_sta
from sta_adapter.loading import load_model, load_processor


def load(args: Any) -> tuple[Any, Any]:
    """Model and tokenizer."""
    if args.tiny:
        return internvl_chat()
    return load_model(args.model, dtype="bf16"), load_processor(args.model).tokenizer


def main(argv: Sequence[str] | None = None) -> None:
    """Train both stages, save, and load again."""
    args = arguments(__doc__, "OpenGVLab/InternVideo2_5_Chat_8B", argv)
    frames, size = (4, 8) if args.tiny else (16, 448)  # the model merges tokens of four frames at a time
    model, tokenizer = load(args)
    model.img_context_token_id = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    picture = f"<img>{'<IMG_CONTEXT>' * model.num_image_token}</img>\n"

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def collate(samples: list[Any]) -> dict[str, Tensor]:
        """Frames of all clips as one batch of pictures, and the prompts that hold their places."""
        paths, questions, answers = zip(*map(clip_question_answer, samples), strict=True)
        shown = "".join(f"Frame{number + 1}: {picture}" for number in range(frames))
        prompts = [ids(f"<|im_start|>user\n{shown}{text}<|im_end|>\n<|im_start|>assistant\n") for text in questions]
        tokens = padded_tokens(prompts, [ids(f"{text}<|im_end|>") for text in answers], tokenizer.pad_token_id or 0)
        pixels = torch.cat([load_pixels(path, frames, size) for path in paths])
        return {**tokens, "pixel_values": pixels, "image_flags": torch.ones(len(pixels), 1, dtype=torch.long)}

    def loss(handle: STAHandle, batch: dict[str, Tensor]) -> Tensor:
        labels = batch.pop("labels")
        pixels = batch.pop("pixel_values").to(next(handle.encoder.parameters()).dtype)
        with handle.clips([frames] * len(labels)):  # where one clip ends and the next begins, the encoder can't see
            return answer_loss(handle.model(pixel_values=pixels, **batch).logits, labels)

    settings = {"epochs": args.epochs, "learning_rate": args.learning_rate}
    loader = make_loader(args.data, collate, workers=0 if args.tiny else 4)
    handle = inject_sta(model)  # the one line

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
