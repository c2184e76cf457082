"""A training run for a process of its own: `python interrupted_run.py FOLDER OUT [STAGE STEP]` kills itself at that step."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))


def run(folder: Path, out: Path, kill_at: tuple[str, int] | None = None):
    from tiny_qwen import make_model, make_processor
    from transformers import TrainerCallback

    from sta_adapter.data import FrameSettings
    from sta_adapter.training import TrainingConfig, train

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if kill_at == (Path(args.output_dir).name.removeprefix("stage"), state.global_step):
                os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    processor = make_processor(folder / "tokenizer")
    config = TrainingConfig(
        batch_size=2,
        device_batch_size=1,
        epochs=1.5,
        learning_rate=1e-2,
        lora_dropout=0.2,
        save_steps=2,
        stage1={"max_steps": 2},
        logging_steps=1,
        num_workers=0,
        frames=FrameSettings(min_tokens=None, max_tokens=None),
    )
    return train(
        make_model(processor.tokenizer),
        folder / "data.jsonl",
        processor=processor,
        output_dir=out,
        config=config,
        callbacks=[Kill()],
        progress=False,
    )


if __name__ == "__main__":
    kill = (sys.argv[3], int(sys.argv[4])) if len(sys.argv) > 3 else None
    run(Path(sys.argv[1]), Path(sys.argv[2]), kill)
