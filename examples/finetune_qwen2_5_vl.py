"""Fine-tune Qwen2.5-VL with STA: stage one trains STA alone, stage two LoRA beside it.

    python examples/finetune_qwen2_5_vl.py --data clips.jsonl --out my-adapter
    python examples/finetune_qwen2_5_vl.py --tiny

Needs transformers 4.49 or newer. The windows of this model's vision encoder don't concern STA: a position meets the same
position of the other frames, wherever its window is.
"""

from __future__ import annotations

from collections.abc import Sequence

from common import TINY, arguments
from tiny_models import write_qwen2_5_vl

from sta_adapter import inject_sta, load_sta
from sta_adapter.evaluation import evaluate
from sta_adapter.loading import load_model, load_processor
from sta_adapter.training import TrainingConfig, train


def main(argv: Sequence[str] | None = None) -> None:
    """Train, save, load again, and measure on the training clips."""
    args = arguments(__doc__, "Qwen/Qwen2.5-VL-7B-Instruct", argv)
    name = str(write_qwen2_5_vl(args.out / "base")) if args.tiny else args.model
    processor = load_processor(name)
    model = load_model(name)

    handle = inject_sta(model)  # the one line: outputs are still the base model's

    # The stages may differ in any setting. Gradient checkpointing, which covers STA as well, makes 7B fit on fewer GPUs.
    settings = {"epochs": args.epochs, "learning_rate": args.learning_rate}
    config = TINY if args.tiny else TrainingConfig(**settings, device_batch_size=1, gradient_checkpointing=True)
    result = train(handle, args.data, processor=processor, output_dir=args.out / "stage1", stage="1", config=config)
    train(result.model, args.data, processor=processor, output_dir=args.out / "adapter", stage="2", config=config)

    fresh = load_sta(load_model(name), args.out / "adapter")  # STA and LoRA
    measured = evaluate(
        fresh.model, args.data, processor=processor, frame_settings=config.frames, max_new_tokens=4 if args.tiny else 32
    )
    print(f"{fresh}\nright on {measured.overall.correct} of {measured.overall.total} training clips")


if __name__ == "__main__":
    main()
