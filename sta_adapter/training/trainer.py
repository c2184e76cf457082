"""The Hugging Face trainer, taught what an adapter needs.

Checkpoints hold the trained parameters (exactly) and the adapter, never the frozen base, and count only when complete; STA
has its own learning rate, and vectors (norms, biases, gamma) no weight decay. The loss is that of `TokenTrainer`.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils.memory import clear_device_cache
from safetensors.torch import save
from torch import distributed, nn
from torch.utils.data import DataLoader, Dataset
from transformers import TrainerState

from sta_adapter.adapter.save import replace_files
from sta_adapter.compatibility.releases import transformers_release
from sta_adapter.data.collator import Collator
from sta_adapter.data.stream import StreamDataset, StreamPosition, stream_loader
from sta_adapter.distributed import is_parallel, of_rank_zero, on_rank_zero
from sta_adapter.errors import CheckpointError, STAError
from sta_adapter.evaluation.eval_mode import eval_mode
from sta_adapter.training.arguments import refuse_flattening
from sta_adapter.training.checkpoints import (
    SAMPLES_FILE,
    TRAINED_FILE,
    load_trained,
    mark_complete,
    numpy_allowed,
    rotate,
    trained_state,
)
from sta_adapter.training.config import TrainingConfig
from sta_adapter.training.contexts import kept_random_state
from sta_adapter.training.epoch_shares import Fillable, fill_up
from sta_adapter.training.sample_counts import SampleCounts
from sta_adapter.training.token_loss import TokenTrainer
from sta_adapter.training.watch import stopped_early


class AdapterTrainer(TokenTrainer):
    """A trainer that trains, saves and loads only what requires a gradient.

    `sta_parameters` is asked when the optimizer is made, `adapter_files` (contents by name) on all processes; `eval_fn`
    gives what `evaluate` measures instead of the loss.
    """

    def __init__(
        self,
        *,
        config: TrainingConfig,
        sta_parameters: Callable[[], Iterator[nn.Parameter]],
        adapter_files: Callable[[], dict[str, bytes]],
        eval_fn: Callable[[nn.Module], dict[str, float]] | None = None,
        **kwargs: Any,
    ) -> None:
        files = ("train_dataset", "eval_dataset")
        filled = {
            n: Fillable(d) for n in files if (d := kwargs.get(n)) is not None and not isinstance(d, StreamDataset)
        }
        super().__init__(**{**kwargs, **filled})
        refuse_flattening(getattr(self.accelerator.state, "fsdp_plugin", None))
        self.config = config
        self.folder = Path(str(self.args.output_dir))
        self.sta_parameters = sta_parameters
        self.adapter_files = adapter_files
        self.eval_fn = eval_fn
        self.position = StreamPosition(  # in a stream
            rank=self.args.process_index,
            world_size=self.args.world_size,
            workers=self.args.dataloader_num_workers,
            batch_size=self.args.per_device_train_batch_size,
            seed=self.train_dataset.position.seed if isinstance(self.train_dataset, StreamDataset) else 0,
        )

    @property
    def _train_batch_size(self) -> int:
        """Clips on a device at a time, as this run has it: the base class would take a checkpoint's, and with it another batch."""
        return int(self.args.train_batch_size)

    @_train_batch_size.setter
    def _train_batch_size(self, size: int) -> None:
        pass

    def get_train_dataloader(self) -> DataLoader[object]:
        """As the base class, but no sample comes twice; streams are shared out by themselves, before anything is decoded."""
        if not isinstance(self.train_dataset, StreamDataset):
            loader, parts = super().get_train_dataloader(), self.args.gradient_accumulation_steps
            # before transformers 4.52 an epoch's last step, if it has fewer parts than others, is lost or goes into the next
            whole_steps = parts if transformers_release() < (4, 52) else 1
            return fill_up(loader, lambda: self.state.global_step // math.ceil(len(loader) / parts), whole_steps)
        return stream_loader(
            self.train_dataset,
            self.position,
            cast(Collator, self.data_collator),
            pin_memory=self.args.dataloader_pin_memory,
        )

    def get_eval_dataloader(self, eval_dataset: str | Dataset[object] | None = None) -> DataLoader[object]:
        """As the base class, but no sample comes twice."""
        return fill_up(super().get_eval_dataloader(eval_dataset))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over `parameter_groups`."""
        if self.optimizer is None:
            groups = parameter_groups(model or self._net, set(map(id, self.sta_parameters())), self.config)
            self.optimizer = torch.optim.AdamW(groups, lr=self.config.learning_rate)
        return self.optimizer

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """What `eval_fn` gives, logged as `eval_...`, or else the loss on the evaluation data."""
        if self.eval_fn is None:
            with kept_random_state():  # from which a loader draws a seed
                return super().evaluate(*args, **kwargs)
        net = self._net
        with eval_mode(net), self.compute_loss_context_manager(), kept_random_state():
            values = of_rank_zero({name: float(value) for name, value in self.eval_fn(net).items()})
        metrics = {"eval_score": next(iter(values.values()), 0.0), **{f"eval_{name}": v for name, v in values.items()}}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the trained parameters and the adapter, all or nothing: all processes gather, process 0 writes."""
        counts = json.dumps(
            {**self.counts.of_all(), "place": self.position.saved(), "length": self.config.length}
        ).encode()
        files = {TRAINED_FILE: save(trained_state(self._net)), SAMPLES_FILE: counts, **self.adapter_files()}
        on_rank_zero(lambda: replace_files(output_dir or self.folder, files))

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """As the base class; the checkpoint counts, and older ones go, only when all processes have written theirs."""
        folder = self.folder / f"checkpoint-{self.state.global_step}"
        on_rank_zero(lambda: shutil.rmtree(folder, ignore_errors=True))
        try:
            super()._save_checkpoint(*args, **kwargs)
            if is_parallel():
                distributed.barrier()
            on_rank_zero(lambda: mark_complete(folder))
        except (STAError, OSError, RuntimeError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise CheckpointError(
                f"can't save {folder} ({error}). Earlier checkpoints are complete. Once the cause is fixed (a full disk, for "
                "example), the same command goes on from them."
            ) from error
        on_rank_zero(lambda: rotate(self.folder, self.config.keep_checkpoints, self.state.best_model_checkpoint))

    def keep_for_smaller_parts(self) -> None:
        """After a step that the memory was not enough for: drop what it left, and save what the steps before it made."""
        self._net.zero_grad(set_to_none=True)
        clear_device_cache(garbage_collection=True)
        step = self.state.global_step
        if step and not (self.folder / f"checkpoint-{step}").is_dir():
            self._save_checkpoint(self.model, None)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        load_trained(model or self._net, folder)
        counts = json.loads((folder / SAMPLES_FILE).read_text(encoding="utf-8"))
        self.counts = SampleCounts(counts["batches_used"], counts["bad_samples"])

    def take_up(self, checkpoint: Path, steps: int) -> bool:
        """Go on after a checkpoint; whether it is of the last step. Then it is loaded: the base class would train a step too many."""
        saved = json.loads((checkpoint / SAMPLES_FILE).read_text(encoding="utf-8"))
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if isinstance(self.train_dataset, StreamDataset):
            parts = self.args.gradient_accumulation_steps
            self.position = self.position.resumed(saved["place"], state.global_step, parts)
        early = stopped_early(state, self.args, self.config.early_stopping)
        last = state.max_steps if saved["length"] == self.config.length else steps
        if state.global_step < last and not early:
            return False
        self.state = state
        self._load_from_checkpoint(str(checkpoint))
        if self.args.load_best_model_at_end and state.best_model_checkpoint:
            self._load_best_model()
        return True

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint)).name  # the run's folder may have moved
        load_trained(self._net, self.folder / best)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with numpy_allowed():
            super()._load_rng_state(checkpoint)


def parameter_groups(model: nn.Module, sta: set[int], config: TrainingConfig) -> list[dict[str, object]]:
    """Optimizer groups: STA or not, with or without weight decay (matrices have it, vectors never)."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups.setdefault((id(parameter) in sta, parameter.dim() > 1), []).append(parameter)
    sta_rate = config.learning_rate if config.sta_learning_rate is None else config.sta_learning_rate
    rates = {False: config.learning_rate, True: sta_rate}
    decays = {False: 0.0, True: config.weight_decay}
    return [
        {"params": found, "lr": rates[is_sta], "weight_decay": decays[matrix]}
        for (is_sta, matrix), found in groups.items()
    ]
