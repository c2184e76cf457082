"""SFT in one process or several: `torchrun trl_sft.py BASE ROWS OUT [resume]`."""

import sys

from datasets import load_dataset
from transformers import set_seed
from trl import SFTConfig, SFTTrainer

from sta_adapter.data import FrameSettings
from sta_adapter.integrations.trl import prepare
from sta_adapter.loading import load_model, load_processor

base, rows, out, *resume = sys.argv[1:]
set_seed(0)  # STA and LoRA begin at random
run = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "use_cpu": True, "bf16": False}
sta = prepare(load_model(base, device="cpu"), load_processor(base), frames=FrameSettings(nframes=8))
trainer = SFTTrainer(
    **sta.arguments,
    train_dataset=load_dataset("json", data_files=rows, split="train"),
    args=SFTConfig(out, report_to="none", **run, **sta.config),
)
trainer.train(resume_from_checkpoint=bool(resume))
