"""The bar that training shows."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

__all__ = ["ProgressBar"]

HIDDEN = ("_runtime", "_score", "_per_second")


class ProgressBar(TrainerCallback):
    """One bar for a stage, with the latest loss of training beside it, and what the latest evaluation measured as `eval_...`."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.bar: Any = None
        self.shown: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar."""
        from tqdm.auto import tqdm

        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.label, dynamic_ncols=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One step on."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Show the loss and what was measured."""
        if self.bar is not None:
            values = {k: v for k, v in (logs or {}).items() if k == "loss" or k.startswith("eval_")}
            self.shown |= {k: f"{v:.3f}" for k, v in values.items() if isinstance(v, float) and not k.endswith(HIDDEN)}
            self.bar.set_postfix(self.shown)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()
