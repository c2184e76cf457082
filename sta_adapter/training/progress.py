"""What training shows: what a stage is about to do, then a bar in a terminal, or plain lines elsewhere."""

from __future__ import annotations

import shlex
import sys
import time
from collections import deque
from collections.abc import Callable, Sized
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import TrainerCallback, TrainerState

from sta_adapter.data.stream import StreamDataset
from sta_adapter.distributed import full_shape
from sta_adapter.requirements import reporters
from sta_adapter.training.arguments import join_processes, precision_of
from sta_adapter.training.watch import Watch

if TYPE_CHECKING:
    from tqdm.std import tqdm

    from sta_adapter.training.stage import Stage

HIDDEN = ("_runtime", "_score", "_per_second", "_time")
BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
RECENT = 20  # steps over which speed is measured
WHAT = {"1": "STA", "2": "STA and LoRA"}


class Progress(TrainerCallback):
    """Step, loss of training, learning rate, clips a second, memory, time left, and what the latest evaluation measured."""

    def __init__(
        self,
        label: str,
        watch: Watch,
        clips: int,
        measured: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.label, self.watch, self.clips, self.measured, self.clock = label, watch, clips, measured, clock
        self.bar: tqdm[NoReturn] | None = None
        self.inner: tqdm[NoReturn] | None = None
        self.measuring = False
        self.in_terminal = sys.stderr.isatty() or "ipykernel" in sys.modules
        self.evaluated: dict[str, float] = {}
        self._ends: deque[float] = deque(maxlen=RECENT + 1)
        self._rate = 0.0
        self._shows = False

    def on_train_begin(self, args: object, state: TrainerState, control: object, **_: object) -> None:
        """Open the bar."""
        self._shows = state.is_world_process_zero
        self._ends.append(self.clock())
        if self._shows and self.in_terminal:
            self.bar = _bar(state.max_steps, state.global_step, self.label, BAR)

    def on_step_end(
        self, args: object, state: TrainerState, control: object, lr_scheduler: LRScheduler | None = None, **_: object
    ) -> None:
        """One step on."""
        self._ends.append(self.clock())
        if lr_scheduler is not None:
            self._rate = float(lr_scheduler.get_last_lr()[0])
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)
            self.bar.set_postfix_str(" ".join([*self._now(), *self._found()]))

    def on_log(
        self, args: object, state: TrainerState, control: object, logs: dict[str, float] | None = None, **_: object
    ) -> None:
        """Show what was measured; without a terminal, a line."""
        found = {key: value for key, value in (logs or {}).items() if key.startswith("eval_")}
        self.evaluated |= {k: v for k, v in found.items() if isinstance(v, float) and not k.endswith(HIDDEN)}
        if self.bar is not None:
            self.bar.set_postfix_str(" ".join([*self._now(), *self._found()]))
        elif self._shows and (found or "loss" in (logs or {})):
            shown = self._found() if found else [*self._now(), f"left {self._left(state)}"]
            self.say(f"{self.label}: step {state.global_step}/{state.max_steps}, {', '.join(shown)}")

    def on_prediction_step(self, *_: object, eval_dataloader: Sized = (), **kwargs: object) -> None:
        """One batch of an evaluation on."""
        if self._shows and not self.measuring:
            self.measuring, total, text = True, len(eval_dataloader), f"{self.label}: measuring {self.measured}"
            if self.in_terminal:
                self.inner = _bar(total, 0, text, None, leave=False)
            else:
                self.say(f"{text}, {total} batches")
        if self.inner is not None:
            self.inner.update()

    def on_evaluate(self, *_: object, **kwargs: object) -> None:
        """The evaluation is over."""
        self._close_inner()

    def close(self) -> None:
        """Close the bars, so that what is said next stands on a line of its own."""
        self._close_inner()
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _close_inner(self) -> None:
        if self.inner is not None:
            self.inner.close()
        self.inner, self.measuring = None, False

    def _now(self) -> list[str]:
        shown = [] if self.watch.loss is None else [f"loss {self.watch.loss:.3g}"]
        speed = self._speed()
        shown += [f"lr {self._rate:.2g}"] + ([] if speed is None else [f"{speed * self.clips:.3g} clips/s"])
        return [*shown, f"{memory() / 1e9:.1f} GB"]

    def _found(self) -> list[str]:
        return [f"{name} {value:.3g}" for name, value in self.evaluated.items()]

    def _speed(self) -> float | None:
        """Steps a second, lately."""
        taken = self._ends[-1] - self._ends[0] if self._ends else 0.0
        return (len(self._ends) - 1) / taken if taken > 0 else None

    def _left(self, state: TrainerState) -> str:
        speed = self._speed()
        left = None if speed is None else timedelta(seconds=round((state.max_steps - state.global_step) / speed))
        return "unknown" if left is None else str(left)

    def say(self, line: str) -> None:
        """A line where the bar is shown."""
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


def memory() -> int:
    """Bytes in use: the most that was reserved on the GPU, or those of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    import psutil

    found: int = psutil.Process().memory_info().rss
    return found


def _bar(total: int, initial: int, text: str, form: str | None, leave: bool = True) -> tqdm[NoReturn]:
    from tqdm.auto import tqdm

    return tqdm(total=total, initial=initial, desc=text, bar_format=form, dynamic_ncols=True, leave=leave)


def describe(stage: Stage, model: nn.Module, checkpoint: Path | None) -> list[str]:
    """Lines for a terminal about a stage, with what trains marked, and the checkpoint that it goes on from."""
    config, processes = stage.config, join_processes().num_processes
    counts = [(torch.Size(full_shape(p)).numel(), p.requires_grad) for p in model.parameters()]
    trained, whole = sum(count for count, trains in counts if trains), sum(count for count, _ in counts)
    device_batch, times = config.device_batches(processes)
    steps, data = stage.steps(), stage.dataset
    amount = f"{len(data.shards)} shards" if isinstance(data, StreamDataset) else f"{len(data):,} samples"
    shared = f" and {processes - 1} more processes" if processes > 1 else ""
    what = WHAT[stage.name] if config.sta else "LoRA"
    batch = f"{device_batch} on a device at a time" + (f", {times} times" if times > 1 else "")
    saved = [f"{config.save_steps} steps"] if stage.saves_by_steps() else ["evaluation"]
    saved += [f"{config.save_minutes:g} minutes"] if config.save_minutes is not None else []
    lines = {
        "trains": f"{what}: {_millions(trained)} of {_millions(whole)} parameters",
        "data": f"{amount}, {steps} steps of {config.batch_size} clips ({batch})",
        "rate": f"{config.learning_rate:g}, {config.schedule}, rising for {config.warmup:.0%} of the steps",
        "computes": f"in {precision_of(config.precision)} on {_device()}{shared}, gradient checkpointing "
        f"{'on' if config.gradient_checkpointing else 'off'}",
        "saves": f"into {shlex.quote(str(stage.folder))}, every {' or '.join(saved)}",
    }
    if stage.evaluates():
        often = f"every {config.eval_steps} steps" if config.eval_steps else "each epoch"
        lines["measures"] = f"{stage.measured()} {often}"
    if "tensorboard" in reporters(config.report_to):
        lines["shows"] = f"tensorboard --logdir {shlex.quote(str(stage.folder))}"
    if checkpoint is not None:
        lines["goes on"] = f"from {checkpoint.name}"
    return [f"stage {stage.name}", *(f"  {name:<9} {text}" for name, text in lines.items())]


def _millions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count:,}"


def _device() -> str:
    if not torch.cuda.is_available():
        return "the CPU"
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return f"{found.name} ({found.total_memory / 1e9:.0f} GB)"
