"""Fine-tune InternVideo2-Chat with STA: stage one trains STA alone, stage two LoRA beside it.

    python examples/finetune_internvideo2_chat.py --data clips.jsonl --out my-adapter
    python examples/finetune_internvideo2_chat.py --tiny

The data is a JSON Lines file of conversations, as for Qwen2-VL. Its code is sta-adapter's own, put
together from parts of transformers: see docs/internvideo.md. The weights need HF_TOKEN.
"""

from __future__ import annotations

from collections.abc import Sequence

from common import TINY, arguments
from tiny_models import write_internvideo2_chat

from sta_adapter import STAConfig, inject_sta, load_sta
from sta_adapter.evaluation import evaluate
from sta_adapter.loading import load_model, load_processor
from sta_adapter.training import TrainingConfig, train


def main(argv: Sequence[str] | None = None) -> None:
    """Train, save, load again, and measure on the training clips."""
    args = arguments(__doc__, "OpenGVLab/InternVideo2-Chat-8B", argv)
    name = str(write_internvideo2_chat(args.out / "base")) if args.tiny else args.model
    processor = load_processor(name)
    model = load_model(name, dtype="fp32" if args.tiny else "bf16")

    handle = inject_sta(model, STAConfig(init="normal"))  # the one line; with the published, tiny gamma

    # The defaults are the published recipe. Given again after a crash, the command goes on from the last checkpoint.
    config = TINY if args.tiny else TrainingConfig(epochs=args.epochs, learning_rate=args.learning_rate)
    train(handle, args.data, processor=processor, output_dir=args.out / "adapter", stage="both", config=config)

    fresh = load_sta(load_model(name), args.out / "adapter")  # STA and LoRA
    measured = evaluate(
        fresh.model, args.data, processor=processor, frame_settings=config.frames, max_new_tokens=4 if args.tiny else 32
    )
    print(f"{fresh}\nright on {measured.overall.correct} of {measured.overall.total} training clips")


if __name__ == "__main__":
    main()
