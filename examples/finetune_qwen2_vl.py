"""Fine-tune Qwen2-VL with STA: stage one trains STA alone, stage two LoRA beside it.

    python examples/finetune_qwen2_vl.py --data clips.jsonl --out my-adapter
    python examples/finetune_qwen2_vl.py --tiny

The data is a JSON Lines file of conversations, such as
    {"messages": [{"role": "user", "content": "<video>What happens?"}, {"role": "assistant", "content": "It falls."}],
     "videos": ["clips/1.mp4"]}
"""

from __future__ import annotations

from collections.abc import Sequence

from common import TINY, arguments

from sta_adapter import STAConfig, inject_sta, load_sta
from sta_adapter.demo import TINY_BASE
from sta_adapter.evaluation import evaluate
from sta_adapter.loading import load_model, load_processor
from sta_adapter.training import TrainingConfig, train


def main(argv: Sequence[str] | None = None) -> None:
    """Train, save, load again, and measure on the training clips."""
    args = arguments(__doc__, "Qwen/Qwen2-VL-2B-Instruct", argv)
    name = str(TINY_BASE) if args.tiny else args.model
    processor = load_processor(name)
    model = load_model(name)

    handle = inject_sta(model, STAConfig(head_scale=0.25))  # the one line: outputs are still the base model's

    # Stage one freezes all but STA; stage two adds LoRA on language model and vision encoder and goes on with STA.
    # The defaults are the published recipe. Given again after a crash, the command goes on from the last checkpoint.
    config = TINY if args.tiny else TrainingConfig(epochs=args.epochs, learning_rate=args.learning_rate)
    train(handle, args.data, processor=processor, output_dir=args.out, stage="both", config=config)

    # args.out now holds STA and LoRA weights as safetensors, a few per cent of the model's size.
    fresh = load_sta(load_model(name), args.out)
    result = evaluate(
        fresh.model, args.data, processor=processor, frame_settings=config.frames, max_new_tokens=4 if args.tiny else 32
    )
    print(f"{fresh}\nright on {result.overall.correct} of {result.overall.total} training clips; adapter in {args.out}")


if __name__ == "__main__":
    main()
