"""What a trainer's optimizer does with STA beside its steps: weights that it shows, and those that it leaves as they are."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sta_adapter.errors import ConfigError

__all__ = ["ShowAverage", "require_steps", "show_average"]

logger = logging.getLogger(__name__)


def show_average(optimizer: Optimizer | None) -> None:
    """Have a schedule-free optimizer put the average that it makes in the place of the weights that it trains.

    The average is what such a training gives. The trainer's next step puts the others back, which of itself it would save.
    """
    show = getattr(optimizer, "eval", None)
    if callable(show):
        show()


class ShowAverage(TrainerCallback):
    """Has checkpoints made of the average, the model's own files and ours; the optimizer's state tells which of both they hold."""

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Optimizer | None = None,
        model: nn.Module | None = None,
        **kwargs: object,
    ) -> None:
        """Show it before a checkpoint is made."""
        if control.should_save:
            show_average(optimizer)
            if not control.should_evaluate:  # which comes before the checkpoint
                self.before_checkpoint(args, state, model)
        self.on_step_begin(args, state, control, model=model)

    on_epoch_end = on_step_end

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: object,
    ) -> None:
        """A trainer may have made a checkpoint by itself, since it is about to be killed."""
        if control.should_training_stop and getattr(args, "enable_jit_checkpoint", False):
            self.after_unannounced(args, state, model)

    on_pre_optimizer_step = on_step_begin

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        metrics: Mapping[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """A checkpoint may be made now, maybe because the measure is the best, of the average, which the trainer has shown itself."""
        if control.should_save or (args.save_strategy == "best" and is_best(args, state, metrics or {})):
            self.before_checkpoint(args, state, model)

    def before_checkpoint(self, args: TrainingArguments, state: TrainerState, model: nn.Module | None) -> None:
        """What else there is to do, on all processes."""

    def after_unannounced(self, args: TrainingArguments, state: TrainerState, model: nn.Module | None) -> None:
        """What there is to do when there may be a checkpoint that `on_save` doesn't tell of."""


def is_best(args: TrainingArguments, state: TrainerState, metrics: Mapping[str, float]) -> bool:
    """Whether the trainer will find these measures better than those of all evaluations before."""
    found = metrics.get(f"eval_{str(args.metric_for_best_model).removeprefix('eval_')}")
    if found is None or state.best_metric is None:
        return found is not None
    return found > state.best_metric if args.greater_is_better else found < state.best_metric


def require_steps(
    model: nn.Module, trained: Sequence[nn.Parameter], optimizer: Optimizer | None, args: TrainingArguments
) -> None:
    """Look for what gets gradients and no steps, and tell of it.

    Raises:
        ConfigError: the optimizer has parameters of the model, and none of STA's.
    """
    held = {id(p) for group in getattr(optimizer, "param_groups", ()) for p in group["params"]}
    missing = [p for p in trained if id(p) not in held] if any(id(p) in held for p in model.parameters()) else []
    if 0 < len(missing) < len(trained):
        logger.warning(
            "the optimizer has not all of STA's parameters: %d of %d stay as they are", len(missing), len(trained)
        )
    elif missing:
        raise ConfigError(
            "the optimizer has none of STA's parameters that require a gradient, so it would not train them. Was it made before LoRA was "
            "added, when PEFT copies STA's modules? Make it of those of get_sta(model).parameters(), model being the one that is trained."
        )
    optim = getattr(args, "optim", "")
    name = str(getattr(optim, "value", optim))
    if name.startswith("apollo"):
        logger.warning(
            "optim is %s, which bounds each step by the one before: where the first gradient is zero nothing moves for some thousand steps. "
            "So it is with fresh STA's q, k and v, in front of weights of zero, and with LoRA's A. Take another optim.",
            name,
        )
