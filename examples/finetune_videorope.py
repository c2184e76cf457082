"""Fine-tune VideoRoPE with STA: stage one trains STA alone, stage two LoRA beside it.

    python examples/finetune_videorope.py --data clips.jsonl --out my-adapter
    python examples/finetune_videorope.py --tiny

VideoRoPE changes the positions in Qwen2-VL's language model, STA its vision encoder: they go together. Needs transformers
4.52 or newer, where `apply_videorope` makes the published checkpoints run; with their authors' own model file on 4.45.2,
leave that line out.
"""

from __future__ import annotations

from collections.abc import Sequence

from common import TINY, arguments
from torch import nn

from sta_adapter import inject_sta, load_sta
from sta_adapter.backbones.videorope import apply_videorope
from sta_adapter.demo import TINY_BASE
from sta_adapter.evaluation import evaluate
from sta_adapter.loading import load_model, load_processor
from sta_adapter.training import TrainingConfig, train

PROCESSOR = "Qwen/Qwen2-VL-7B-Instruct"  # the checkpoint's base


def load(name: str) -> nn.Module:
    """A VideoRoPE checkpoint on current transformers."""
    return apply_videorope(load_model(name), scale_factor=2.0)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, save, load again, and measure on the training clips."""
    args = arguments(__doc__, "Wiselnn/Qwen2-VL-videorope-128frames-8k-context-330k-llava-video", argv)
    name = str(TINY_BASE) if args.tiny else args.model
    processor = load_processor(name if args.tiny else PROCESSOR)

    handle = inject_sta(load(name))  # the one line; handle.backbone says "videorope"

    settings = {"epochs": args.epochs, "learning_rate": args.learning_rate}
    config = TINY if args.tiny else TrainingConfig(**settings, device_batch_size=1, gradient_checkpointing=True)
    train(handle, args.data, processor=processor, output_dir=args.out, stage="both", config=config)

    fresh = load_sta(load(name), args.out)  # VideoRoPE first, then the adapter
    result = evaluate(
        fresh.model, args.data, processor=processor, frame_settings=config.frames, max_new_tokens=4 if args.tiny else 32
    )
    print(f"{fresh}\nright on {result.overall.correct} of {result.overall.total} training clips; adapter in {args.out}")


if __name__ == "__main__":
    main()
