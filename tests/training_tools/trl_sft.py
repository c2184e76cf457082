"""SFT in several processes: `torchrun trl_sft.py BASE ROWS OUT`."""

import sys

from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

from sta_adapter.data import FrameSettings
from sta_adapter.integrations.trl import prepare
from sta_adapter.loading import load_model, load_processor

base, rows, out = sys.argv[1:]
sta = prepare(load_model(base, device="cpu"), load_processor(base), frames=FrameSettings(nframes=8))
trainer = SFTTrainer(
    **sta.arguments,
    train_dataset=load_dataset("json", data_files=rows, split="train"),
    args=SFTConfig(
        out,
        max_steps=2,
        save_steps=2,
        per_device_train_batch_size=2,
        use_cpu=True,
        bf16=False,
        report_to="none",
        **sta.config,
    ),
)
trainer.train()
