"""The Hugging Face trainer, with losses in which each token that is learned counts once, and bad samples count as such."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import distributed, nn
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from sta_adapter.compatibility.position_seams import forget_earlier_batches
from sta_adapter.compatibility.releases import transformers_release
from sta_adapter.data.chat_encoding import IGNORE
from sta_adapter.distributed import average, is_parallel
from sta_adapter.errors import DataError
from sta_adapter.injection.handle import get_sta
from sta_adapter.training.sample_counts import SampleCounts
from sta_adapter.training.watch import Watch

Batch = dict[str, Any]
"""Tensors by name, and `bad_samples`."""


class TokenTrainer(Trainer):
    """A `Trainer` of batches from a `Collator`; `watch` is told the loss of each part of a step."""

    def __init__(self, *, watch: Watch, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # whatever the model takes, a step's tokens are counted, for `compute_loss`
        self.model_accepts_loss_kwargs = True
        if (5, 2) <= transformers_release() <= (5, 4):  # there it divides gradients again
            self.accelerator.gradient_accumulation_steps = 1
        self.watch = watch
        self.counts = SampleCounts()
        self.measured = (0.0, 0.0)  # the loss of all tokens that an evaluation has come to, and their number

    @property
    def _net(self) -> nn.Module:
        return cast(nn.Module, self.model)

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
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """As the base class, on the usable samples; the others are counted as in training."""
        self.counts.add_bad(inputs.pop("bad_samples", []))
        usable = "input_ids" in inputs
        if not usable and not is_parallel():
            return None, None, None
        inputs = inputs if usable else placeholder(self.args.device)  # with a loss of zero
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if loss is not None and (learned := int((inputs["labels"] != IGNORE).sum())):
            self.measured = (self.measured[0] + float(loss) * learned, self.measured[1] + learned)
        return loss, logits, labels

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As the base class, where each batch counts once; here each token does in the loss, as in training, and must be there."""
        self.measured = (0.0, 0.0)
        outcome = super().evaluation_loop(*args, **kwargs)
        loss, tokens = average(self.measured, self.args.device)
        if not tokens:
            bad = self.counts.of_all()["bad_samples"]
            raise DataError(f"there is nothing to evaluate: all samples are bad, the latest {bad[-1:]}")
        cast("dict[str, float]", outcome.metrics)[f"{kwargs.get('metric_key_prefix', 'eval')}_loss"] = loss / tokens
        return outcome


def placeholder(device: torch.device) -> dict[str, torch.Tensor]:
    """A batch of two tokens with nothing to learn from."""
    ones = torch.ones((1, 2), dtype=torch.long, device=device)
    return {"input_ids": ones, "attention_mask": ones, "labels": IGNORE * ones}
