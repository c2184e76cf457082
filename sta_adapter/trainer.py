"""The Hugging Face trainer, taught what an adapter needs.

Public: `AdapterTrainer`, `ProgressBar`, `last_checkpoint`. Checkpoints hold the trained parameters (exactly) and the adapter, never the
frozen base; bad samples are counted; STA has its own learning rate, and vectors (norms, biases, gamma) no weight decay.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainerCallback

from sta_adapter.errors import CheckpointError, DataError
from sta_adapter.training_config import TrainingConfig

logger = logging.getLogger(__name__)

TRAINED_FILE = "trained.safetensors"
SAMPLES_FILE = "samples.json"
BAD_BATCHES = 20  # so many batches of bad samples alone, from the start, end the run


class AdapterTrainer(Trainer):
    """A `Trainer` that trains, saves and loads only what requires a gradient.

    Args:
        config: learning rates and weight decay.
        sta_parameters: which parameters are STA's, asked when the optimizer is made.
        save_adapter: writes the adapter's files into a folder.
        measure: what `evaluate` gives instead of the loss, from the model to names and values.
        kwargs: of `Trainer`.
    """

    def __init__(
        self,
        *,
        config: TrainingConfig,
        sta_parameters: Callable[[], Iterator[nn.Parameter]],
        save_adapter: Callable[[Path], None],
        measure: Callable[[nn.Module], dict[str, float]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.config = config
        self.sta_parameters = sta_parameters
        self.save_adapter = save_adapter
        self.measure = measure
        self.bad_samples: dict[str, None] = {}
        self.batches_used = 0

    @property
    def _net(self) -> nn.Module:
        return cast(nn.Module, self.model)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over `parameter_groups`."""
        if self.optimizer is None:
            groups = parameter_groups(model or self._net, set(map(id, self.sta_parameters())), self.config)
            self.optimizer = torch.optim.AdamW(groups, lr=self.config.learning_rate, betas=(0.9, 0.999), eps=1e-8)
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """A step on the usable samples of the batch; without any there is nothing to learn from."""
        self._count(inputs.pop("bad_samples", []))
        if "input_ids" not in inputs:
            if not self.batches_used and len(self.bad_samples) >= BAD_BATCHES:
                raise DataError(
                    f"the first {len(self.bad_samples)} samples are all bad, first {next(iter(self.bad_samples))}"
                )
            return torch.zeros((), device=self.args.device)
        self.batches_used += 1
        return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As the base class; a batch that nothing trained takes part in (text alone, in stage one) has zero gradients."""
        outcome = super().compute_loss(model, inputs, *args, **kwargs)
        loss, *rest = outcome if isinstance(outcome, tuple) else (outcome,)
        if torch.is_grad_enabled() and not loss.requires_grad:
            loss = loss + 0 * sum(p.sum() for p in self._net.parameters() if p.requires_grad)
        return (loss, *rest) if rest else loss

    def require_used(self) -> None:
        """Refuse to call a run finished that had nothing to learn from."""
        if not self.batches_used and self.bad_samples:
            raise DataError(f"all {len(self.bad_samples)} samples are bad, first {next(iter(self.bad_samples))}")

    def _count(self, bad: list[str]) -> None:
        for message in bad:
            if message not in self.bad_samples:
                self.bad_samples[message] = None
                logger.warning("skipped a bad sample (%d so far): %s", len(self.bad_samples), message)

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As the base class, on the usable samples."""
        inputs.pop("bad_samples", None)
        if "input_ids" not in inputs:
            return None, None, None
        return super().prediction_step(model, inputs, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The measure, logged as `eval_...`, or else the loss on the evaluation data."""
        if self.measure is None:
            return super().evaluate(*args, **kwargs)
        net = self._net
        was_training = net.training
        net.eval()
        with torch.no_grad(), self.compute_loss_context_manager(), _kept_random_state():
            values = {name: float(value) for name, value in self.measure(net).items()}
        metrics = {"eval_score": next(iter(values.values()), 0.0), **{f"eval_{name}": v for name, v in values.items()}}
        net.train(was_training)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_file(trained_state(self._net, state_dict), folder / TRAINED_FILE)
        counts = {"batches_used": self.batches_used, "bad_samples": list(self.bad_samples)}
        (folder / SAMPLES_FILE).write_text(json.dumps(counts), encoding="utf-8")
        self.save_adapter(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        load_trained(model or self._net, folder)
        counts = json.loads((folder / SAMPLES_FILE).read_text(encoding="utf-8"))
        self.batches_used, self.bad_samples = counts["batches_used"], dict.fromkeys(counts["bad_samples"])

    def _load_best_model(self) -> None:
        load_trained(self._net, Path(str(self.state.best_model_checkpoint)))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with torch.serialization.safe_globals(_numpy_globals()):
            super()._load_rng_state(checkpoint)


def parameter_groups(model: nn.Module, sta: set[int], config: TrainingConfig) -> list[dict[str, Any]]:
    """Optimizer groups: STA or not, with or without weight decay (matrices have it, vectors never).

    Args:
        model: its parameters that require a gradient are grouped.
        sta: ids of STA's parameters.
        config: the rates.
    """
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            key = (id(parameter) in sta, parameter.dim() > 1)
            sta_rate = config.sta_learning_rate
            rate = config.learning_rate if sta_rate is None or not key[0] else sta_rate
            decay = config.weight_decay if key[1] else 0.0
            groups.setdefault(key, {"params": [], "lr": rate, "weight_decay": decay})["params"].append(parameter)
    return list(groups.values())


def trained_state(model: nn.Module, full: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """Copies of the parameters that require a gradient, by name; values from `full` where it has them (gathered shards)."""
    values = full or {}
    return {
        name: values.get(name, parameter).detach().cpu().clone().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def load_trained(model: nn.Module, folder: Path) -> None:
    """Put what `trained_state` gave back into the model.

    Raises:
        CheckpointError: the file is missing or damaged, or names other parameters than the model trains; nothing is changed.
    """
    file = folder / TRAINED_FILE
    try:
        saved = load_file(file)
    except Exception as error:
        raise CheckpointError(
            f"can't read {str(file)!r} ({error}); remove the folder to go on from an earlier checkpoint."
        ) from error
    target = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    wrong = sorted(
        name
        for name in saved.keys() | target.keys()
        if name not in saved or name not in target or saved[name].shape != target[name].shape
    )
    if wrong:
        raise CheckpointError(
            f"{str(file)!r} is of another run: {len(wrong)} parameters are missing, unexpected or of another shape, "
            f"such as {', '.join(wrong[:4])}. Use the model and settings that it was made with, or another output folder."
        )
    with torch.no_grad():
        for name, parameter in target.items():
            parameter.copy_(saved[name])


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint; one that was being written when the run was killed doesn't count."""

    def step(path: Path) -> int:
        number = path.name.removeprefix("checkpoint-")
        return int(number) if number.isdigit() else -1

    for path in sorted(folder.glob("checkpoint-*"), key=step, reverse=True):
        with contextlib.suppress(OSError, ValueError):
            state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            if state.get("global_step") == step(path):
                return path
    return None


class ProgressBar(TrainerCallback):
    """One bar for a stage, with the latest loss and evaluation beside it."""

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
            values = {
                k.removeprefix("eval_"): v for k, v in (logs or {}).items() if k == "loss" or k.startswith("eval_")
            }
            self.shown |= {k: f"{v:.3f}" for k, v in values.items() if isinstance(v, float) and "per_second" not in k}
            for hidden in ("runtime", "score"):
                self.shown.pop(hidden, None)
            self.bar.set_postfix(self.shown)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()


@contextlib.contextmanager
def _kept_random_state() -> Iterator[None]:
    """An evaluation must not change what the training draws next."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield


def _numpy_globals() -> list[Any]:
    """What older transformers' random state files hold, for torch versions that load weights only."""
    core = np.core if np.__version__.startswith("1.") else np._core  # type: ignore[attr-defined]
    return [core.multiarray._reconstruct, np.ndarray, np.dtype, type(np.dtype(np.uint32)), type(np.dtype(np.float64))]
