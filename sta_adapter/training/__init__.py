"""Training of STA in one stage or two, and of LoRA baselines without it."""

from sta_adapter.training.config import TrainingConfig
from sta_adapter.training.two_stage import TrainingResult, open_data, train

__all__ = ["TrainingConfig", "TrainingResult", "open_data", "train"]
