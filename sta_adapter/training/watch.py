"""What is looked at after each step: a loss that leaves, a signal that came, a checkpoint that is due.

All processes of a run agree on each of them, or one would wait for the others.
"""

from __future__ import annotations

import math
import shlex
import signal
import statistics
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch
from torch.optim.lr_scheduler import LRScheduler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sta_adapter.data.worker_signals import in_main_thread
from sta_adapter.distributed import Group, agree, average, is_parallel
from sta_adapter.errors import DivergenceError
from sta_adapter.training.checkpoints import last_checkpoint
from sta_adapter.training.config import TrainingConfig

GROWTH = 100.0  # so many times its lowest value, a loss has diverged
RECENT = 5  # steps whose median is the loss, as single batches may be odd
NOISE = 0.01  # a loss below this is as good as any other


Handler = Callable[[int, FrameType | None], object] | int | None
"""Of a signal, as `signal.signal` takes it and gives the one before."""


class Signals:
    """Ctrl-C and SIGTERM are noted, for the run to end after its step; a second Ctrl-C interrupts at once."""

    def __init__(self, tell: Callable[[str], None] = lambda text: None) -> None:
        self.received = 0  # the number of the first
        self._tell = tell
        self._previous: dict[int, Handler] = {}

    def __enter__(self) -> Signals:
        """Take the signals; in another thread than the main one they stay as they are."""
        if in_main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        """Give them back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.received:
            self.received = number
            self._tell(
                f"{signal.Signals(number).name}: the run ends after this step and saves a checkpoint (Ctrl-C again: at once)."
            )


class Watch(TrainerCallback):
    """Ends a stage whose loss diverges or gets no better, or after a signal; saves checkpoints by time, `clock`'s in seconds."""

    def __init__(
        self,
        label: str,
        config: TrainingConfig,
        folder: Path,
        signals: Signals | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.label, self.config, self.folder = label, config, folder
        self.signals = signals or Signals()
        self.clock = clock
        self.loss: float | None = None  # of the latest step, the mean over processes
        self.stopped = False  # by a signal
        self._parts: list[torch.Tensor] = []
        self._whole = True
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._lowest = math.inf
        self._saved = clock()

    def add(self, loss: torch.Tensor, usable: bool = True) -> None:
        """A part of the step's loss; `usable` is False where it has no clip, and says nothing."""
        self._parts.append(loss.detach())
        self._whole = self._whole and usable

    def on_train_begin(self, *_: object, **kwargs: object) -> None:
        """Time runs from here."""
        self._saved = self.clock()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Look at the step's loss, at signals and at the clock; measure after the last step, as transformers does since 5.4."""
        found = self._judge(args)
        minutes = self.config.save_minutes
        due = minutes is not None and self.clock() - self._saved >= 60 * minutes
        numbers = [int(found is not None), self.signals.received, int(due)]
        if is_parallel():
            numbers = agree(numbers, [Group(None, args.device)])
        if numbers[0]:
            raise DivergenceError(self._advice(found or "on another process is no finite number", state.global_step))
        if numbers[1] and state.global_step < state.max_steps:
            self.signals.received = numbers[1]
            self.stopped = control.should_training_stop = True
        if self.stopped or numbers[2]:
            control.should_save = True
        if state.global_step >= state.max_steps and args.eval_strategy == "steps":
            control.should_evaluate = True

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """End a stage that gets no better; the log, from which that is counted, is in its checkpoints."""
        if stopped_early(state, args, self.config.early_stopping):
            control.should_training_stop = True

    def on_epoch_end(self, args: object, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """A stage that was stopped in the middle of an epoch is not at its end, where it would evaluate."""
        if self.stopped and not float(state.epoch or 0).is_integer():
            control.should_log = control.should_evaluate = control.should_save = False

    def on_save(self, *_: object, **kwargs: object) -> None:
        """The next one is due so many minutes later."""
        self._saved = self.clock()

    def _judge(self, args: TrainingArguments) -> str | None:
        """What is wrong with the loss of the step that ends, which is the mean over processes; None if nothing is."""
        if not self._parts:
            return None
        loss = float(torch.stack([part.float() for part in self._parts]).sum())
        # a process without a clip has a share of zero in the mean; with none of them it says nothing
        loss, whole = average([loss, float(self._whole)], args.device)
        self._parts, self._whole = [], True
        if not math.isfinite(loss):
            return f"is not finite ({loss:g})"
        if not whole:
            return None
        self.loss = loss
        self._recent.append(loss)
        usual = statistics.median_low(self._recent)
        self._lowest = max(min(self._lowest, usual), NOISE)
        if usual > GROWTH * self._lowest:
            return f"has grown to {usual:.3g}, more than a hundred times its lowest ({self._lowest:.3g})"
        return None

    def _advice(self, found: str, step: int) -> str:
        rate = self.config.learning_rate
        cause = (
            f"The learning rate ({rate:g}) is probably too high: try --learning-rate {rate / 3:.0e}."
            if self.loss is not None
            else f"It is the first loss, so the learning rate is not the cause: look at the base's weights and at precision "
            f"({self.config.precision}; bf16 and fp32 have a wider range than fp16)."
        )
        last = last_checkpoint(self.folder)
        kept = (
            "No checkpoint had been saved yet; --overwrite begins the run anew."
            if last is None
            else f"The last good checkpoint is kept; to start from it: --adapter {shlex.quote(str(last))} and another --out. "
            "--overwrite begins the run anew."
        )
        return f"{self.label}: the loss {found} at step {step}, so the run ends. {cause} {kept}"


class Resumption(TrainerCallback):
    """Mends what transformers makes of a checkpoint: when it logs and saves, and the rate of the next step."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: object, lr_scheduler: object = None, **_: object
    ) -> None:
        """The settings hold; those of the run before came with the checkpoint, as did the rate of its schedule."""
        state.logging_steps, state.save_steps = int(args.logging_steps), int(args.save_steps)
        if isinstance(lr_scheduler, LRScheduler) and lr_scheduler.last_epoch > 0:
            lr_scheduler.last_epoch -= 1
            lr_scheduler.step()


def stopped_early(state: TrainerState, args: TrainingArguments, patience: int | None) -> bool:
    """Whether the latest `patience` evaluations, as logged, were no better than the best before them; None has any patience."""
    metric = str(args.metric_for_best_model)
    found = [entry[metric] for entry in state.log_history if metric in entry]
    values = found if args.greater_is_better else [-value for value in found]
    return patience is not None and bool(values) and len(values) - 1 - values.index(max(values)) >= patience
