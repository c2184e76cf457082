"""The Hugging Face trainer, taught what an adapter needs.

Checkpoints hold the trained parameters (exactly) and the adapter, never the frozen base, and count only when complete;
bad samples are counted; STA has its own learning rate, and vectors (norms, biases, gamma) no weight decay.
"""

from __future__ import annotations

import gc
import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save
from torch import distributed, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerState
from transformers.trainer_utils import EvalLoopOutput

from sta_adapter.adapter.save import replace_files
from sta_adapter.compatibility.position_seams import forget_earlier_batches
from sta_adapter.compatibility.releases import transformers_release
from sta_adapter.data.chat_encoding import IGNORE
from sta_adapter.data.collator import Collator
from sta_adapter.data.stream import StreamDataset, StreamPosition, stream_loader
from sta_adapter.distributed import average, is_parallel, of_rank_zero, on_rank_zero
from sta_adapter.errors import CheckpointError, DataError, STAError
from sta_adapter.evaluation.eval_mode import eval_mode
from sta_adapter.injection.handle import get_sta
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
from sta_adapter.training.optimizer import parameter_groups
from sta_adapter.training.sample_counts import SampleCounts
from sta_adapter.training.watch import Watch, stopped_early

__all__ = ["AdapterTrainer"]


Batch = dict[str, Any]
"""Tensors by name, and `bad_samples`."""


class AdapterTrainer(Trainer):
    """A `Trainer` that trains, saves and loads only what requires a gradient.

    `sta_parameters` is asked when the optimizer is made, `adapter_files` (contents by name) on all processes; `eval_fn`
    gives what `evaluate` measures instead of the loss. All else is of `Trainer`.
    """

    def __init__(
        self,
        *,
        config: TrainingConfig,
        sta_parameters: Callable[[], Iterator[nn.Parameter]],
        adapter_files: Callable[[], dict[str, bytes]],
        watch: Watch,
        eval_fn: Callable[[nn.Module], dict[str, float]] | None = None,
        **kwargs: Any,
    ) -> None:
        files = ("train_dataset", "eval_dataset")
        filled = {
            n: Fillable(d) for n in files if (d := kwargs.get(n)) is not None and not isinstance(d, StreamDataset)
        }
        super().__init__(**{**kwargs, **filled})
        refuse_flattening(getattr(self.accelerator.state, "fsdp_plugin", None))
        # whatever the model takes, a step's tokens are counted, for `compute_loss`
        self.model_accepts_loss_kwargs = True
        if (5, 2) <= transformers_release() <= (5, 4):  # there it divides gradients again
            self.accelerator.gradient_accumulation_steps = 1
        self.watch = watch
        self.config = config
        self.sta_parameters = sta_parameters
        self.adapter_files = adapter_files
        self.eval_fn = eval_fn
        self.counts = SampleCounts()
        self.measured = (0.0, 0.0)  # the loss of all tokens that an evaluation has come to, and their number
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

    @property
    def _net(self) -> nn.Module:
        return cast(nn.Module, self.model)

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

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader[object]:
        """As the base class, but no sample comes twice."""
        return fill_up(super().get_eval_dataloader(*args, **kwargs))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over `parameter_groups`."""
        if self.optimizer is None:
            groups = parameter_groups(model or self._net, set(map(id, self.sta_parameters())), self.config)
            self.optimizer = torch.optim.AdamW(groups, lr=self.config.learning_rate, betas=(0.9, 0.999), eps=1e-8)
        return self.optimizer

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, *_: object
    ) -> tuple[list[Batch], torch.Tensor]:
        """The batches of a step, and how many tokens all processes together learn in it, which older releases count otherwise."""
        batches = list(itertools.islice(epoch_iterator, num_batches))
        learned = torch.zeros((), dtype=torch.long, device=self.args.device)
        for batch in batches:
            learned += (batch["labels"] != IGNORE).sum()
        if is_parallel():
            distributed.all_reduce(learned)
        return batches, learned

    def training_step(self, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> torch.Tensor:
        """A step on the usable samples of the batch; without any there is nothing to learn from.

        One of several processes must take part in the others' exchange all the same: it runs on two tokens with zero
        weight.
        """
        self.counts.add_bad(inputs.pop("bad_samples", []))
        usable = "input_ids" in inputs
        self.counts.batches_used += usable
        if not usable:
            self.counts.require_good_start()
        if usable or is_parallel():
            inputs = inputs if usable else placeholder(self.args.device)
            loss = super().training_step(model, inputs, *args, **kwargs)
        else:
            loss = torch.zeros((), device=self.args.device)
        self.watch.add(loss, usable)
        return loss

    def _prepare_inputs(self, inputs: Batch) -> Batch:
        """As the base class; only a model with STA takes `clip_lengths`."""
        if get_sta(self._net) is None:
            inputs.pop("clip_lengths", None)
        forget_earlier_batches(self._net, inputs)
        return super()._prepare_inputs(inputs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, object]:
        """As the base class, but each token of a step counts once whatever the model makes of `num_items_in_batch`.

        Many (Qwen2.5-VL, Qwen3-VL, GLM) give the mean over the batch that they see, of which a step may have several. A
        batch that nothing trained takes part in (text alone, in stage one) has zero gradients.
        """
        learned = (inputs["labels"] != IGNORE).sum()
        if is_parallel() and not learned:
            outputs = model(**{key: value for key, value in inputs.items() if key != "labels"})
            loss = outputs["logits"].sum() * 0  # a mean over no token would not be a number
            return (loss, outputs) if return_outputs else loss
        outcome = super().compute_loss(model, inputs, return_outputs)
        loss, *rest = outcome if isinstance(outcome, tuple) else (outcome,)
        if num_items_in_batch is not None and torch.is_grad_enabled():  # of all processes, whose gradients are averaged
            loss = loss * (learned * self.args.world_size / num_items_in_batch)
        if torch.is_grad_enabled() and not loss.requires_grad:
            loss = loss + 0 * sum(p.sum() for p in self._net.parameters() if p.requires_grad)
        return (loss, *rest) if rest else loss

    def prediction_step(
        self, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """As the base class, on the usable samples; the others are counted as in training."""
        self.counts.add_bad(inputs.pop("bad_samples", []))
        usable = "input_ids" in inputs
        if not usable and not is_parallel():
            return None, None, None
        inputs = inputs if usable else placeholder(self.args.device)  # with a loss of zero
        loss, logits, labels = super().prediction_step(model, inputs, *args, **kwargs)
        if loss is not None and (learned := int((inputs["labels"] != IGNORE).sum())):
            self.measured = (self.measured[0] + float(loss) * learned, self.measured[1] + learned)
        return loss, logits, labels

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As the base class, where each batch counts once; here each token does in the loss, as in training, and must be there."""
        self.measured = (0.0, 0.0)
        outcome = super().evaluation_loop(*args, **kwargs)
        loss, tokens = average(self.measured, self.args.device) if is_parallel() else self.measured
        if not tokens:
            bad = self.counts.of_all()["bad_samples"]
            raise DataError(f"there is nothing to measure the loss on: all samples are bad, the latest {bad[-1:]}")
        cast("dict[str, float]", outcome.metrics)[f"{kwargs.get('metric_key_prefix', 'eval')}_loss"] = loss / tokens
        return outcome

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
        on_rank_zero(lambda: replace_files(output_dir or str(self.args.output_dir), files))

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """As the base class; the checkpoint counts, and older ones go, only when all processes have written theirs."""
        parent = Path(str(self.args.output_dir))
        folder = parent / f"checkpoint-{self.state.global_step}"
        on_rank_zero(lambda: shutil.rmtree(folder, ignore_errors=True))
        try:
            super()._save_checkpoint(*args, **kwargs)
            if is_parallel():
                distributed.barrier()
            on_rank_zero(lambda: mark_complete(folder))
        except (STAError, OSError, RuntimeError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise CheckpointError(
                f"can't save {folder} ({error}). The checkpoints before it are whole. When the cause is gone (a full disk, for "
                "example), the same command goes on from them."
            ) from error
        on_rank_zero(lambda: rotate(parent, self.config.keep_checkpoints, self.state.best_model_checkpoint))

    def keep_for_smaller_parts(self) -> None:
        """After a step that the memory was not enough for: drop what it left, and save what the steps before it made."""
        self._net.zero_grad(set_to_none=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        step = self.state.global_step
        if step and not (Path(str(self.args.output_dir)) / f"checkpoint-{step}").is_dir():
            self._save_checkpoint(self.model, None)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        load_trained(model or self._net, folder)
        counts = json.loads((folder / SAMPLES_FILE).read_text(encoding="utf-8"))
        self.counts = SampleCounts(counts["batches_used"], counts["bad_samples"])

    def go_on_after(self, checkpoint: Path) -> None:
        """Find the position in a stream again that a checkpoint was made at."""
        if isinstance(self.train_dataset, StreamDataset):
            step = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")).global_step
            saved = json.loads((checkpoint / SAMPLES_FILE).read_text(encoding="utf-8"))["place"]
            self.position = self.position.resumed(saved, step, self.args.gradient_accumulation_steps)

    def ended_in(self, checkpoint: Path, steps: int) -> bool:
        """Whether a checkpoint is of the last step; then it is loaded, as the base class would train a step too many."""
        saved = json.loads((checkpoint / SAMPLES_FILE).read_text(encoding="utf-8"))
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        patience, args = self.config.early_stopping, self.args
        early = patience is not None and stopped_early(
            state.log_history, str(args.metric_for_best_model), bool(args.greater_is_better), patience
        )
        last = state.max_steps if saved.get("length", self.config.length) == self.config.length else steps
        if state.global_step < last and not early:
            return False
        self.state = state
        self._load_from_checkpoint(str(checkpoint))
        if self.args.load_best_model_at_end and state.best_model_checkpoint:
            self._load_best_model()
        return True

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint)).name  # the run's folder may have moved
        load_trained(self._net, Path(str(self.args.output_dir)) / best)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with numpy_allowed():
            super()._load_rng_state(checkpoint)


def placeholder(device: torch.device) -> dict[str, torch.Tensor]:
    """A batch of two tokens with nothing to learn from."""
    ones = torch.ones((1, 2), dtype=torch.long, device=device)
    return {"input_ids": ones, "attention_mask": ones, "labels": IGNORE * ones}
