"""Callbacks for any trainer that takes those of transformers."""

from __future__ import annotations

import contextlib
import logging
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerState, TrainingArguments

from sta_adapter.adapter.format import CONFIG
from sta_adapter.compatibility.releases import version
from sta_adapter.compatibility.seams import peft_parts
from sta_adapter.distributed import FLATTENS, is_fsdp1, is_rank_zero, is_sharded, of_all_ranks, on_rank_zero
from sta_adapter.errors import ConfigError, DataError, InjectionError
from sta_adapter.injection.contents import require_savable
from sta_adapter.injection.handle import STAHandle, get_sta
from sta_adapter.injection.target import widen
from sta_adapter.integrations.optimizers import ShowAverage, require_steps, show_average
from sta_adapter.integrations.settings import Settings

__all__ = ["ReportBadClips", "RequireGradient", "SaveAdapter", "sta_callbacks"]

logger = logging.getLogger(__name__)
SAVED: weakref.WeakSet[STAHandle] = weakref.WeakSet()  # those whose adapter a callback saves
COPIES_NOTHING = {"none", "tensorboard", "codecarbon"}  # of the trainer's reporters


def sta_callbacks(settings: Settings | None = None) -> list[TrainerCallback]:
    """What every tool's run with STA needs: the adapter saved, and an error where STA doesn't train."""
    return [SaveAdapter(), RequireGradient((settings or Settings()).patience)]


class SaveAdapter(ShowAverage):
    """Makes every checkpoint, and the output folder, an adapter that `load_sta`, `evaluate` and `push` take as it is.

    Every process calls it, as sharded weights are gathered by all; process 0 writes.
    """

    _written: Path | None = None  # a checkpoint's folder that has the adapter before the checkpoint is made

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: object, model: nn.Module | None = None, **_: object
    ) -> None:
        """Refuse what could not be saved, before anything is trained."""
        net, handle = _trained(model)
        if any(map(is_fsdp1, net.modules())):
            raise ConfigError(FLATTENS)
        with _without_word_of_references():
            require_savable(handle)
        notes = getattr(state, "stateful_callbacks", None)
        if notes is not None:  # in each checkpoint's trainer_state.json, which has come from where the run goes on
            name = SaveAdapter.__name__
            if before := notes.get(name):
                Settings(config=handle.config).require_branch(
                    before["attributes"]["branch"],
                    f"the checkpoint that the run goes on from (step {state.global_step})",
                )
            notes[name] = {"args": {}, "attributes": {"branch": handle.config.to_dict()}}
        self._handle, self._written = handle, None
        SAVED.add(handle)

    def before_checkpoint(self, args: TrainingArguments, state: TrainerState, model: nn.Module | None) -> None:
        """Write the adapter where it is copied from before `on_save` comes here: to the Hub, or by W&B, MLflow and the like."""
        pushed = args.push_to_hub and args.hub_strategy != "end"
        if pushed:
            _save(model, Path(str(args.output_dir)))
        whole = pushed and args.hub_strategy != "every_save"
        if (whole or set(args.report_to or ()) - COPIES_NOTHING) and not state.is_hyper_param_search:
            self._written = _checkpoint(args, state)
            _save(model, self._written)

    def after_unannounced(self, args: TrainingArguments, state: TrainerState, model: nn.Module | None) -> None:
        """Write the adapter into the checkpoint that `enable_jit_checkpoint` has made at a SIGTERM, of which no `on_save` tells."""
        folder = _checkpoint(args, state)
        if (folder / "trainer_state.json").is_file() and not (folder / CONFIG).exists():
            _, handle = _trained(model)
            if is_rank_zero() or is_sharded(handle.model.parameters()):  # the others may not stop at this step
                handle.save_pretrained(folder)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: object, model: nn.Module | None = None, **_: object
    ) -> None:
        """Write the adapter into the checkpoint that was just made, unless it is there and on its way to the Hub."""
        if (folder := _checkpoint(args, state)) != self._written:
            _save(model, folder)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: object,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        **kwargs: object,
    ) -> None:
        """Write the adapter into the output folder."""
        if not (args.load_best_model_at_end and state.best_model_checkpoint):  # else the weights are that one's
            show_average(optimizer)
        _save(model, Path(str(args.output_dir)))


class RequireGradient(TrainerCallback):
    """Says so when a run doesn't train STA: at the start what is frozen or wrapped, after the first step a gradient of zero.

    A first step without a gradient is a warning, since a batch may have no clip, and `patience` of them without any
    other are an error. Steps in which nothing at all has a gradient (equal rewards, for one) say nothing, and don't
    count.

    Args:
        patience: that many steps.
    """

    def __init__(self, patience: int = 10) -> None:
        self.patience = patience
        self.steps = 0
        self.found = False
        self._hooks: list[RemovableHandle] = []

    def on_init_end(self, *_: object, model: nn.Module | None = None, **kwargs: object) -> None:
        """Put what trains of STA into float32 again: TRL's trainers put all that trains on a base in 4 or 8 bits into bfloat16."""
        if model is not None and (handle := get_sta(model)) is not None:
            widen(parameter for parameter in handle.parameters() if parameter.requires_grad)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: object,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        **kwargs: object,
    ) -> None:
        """Look at what requires a gradient, and begin to watch it."""
        net, handle = _trained(model)
        warn_of_lora_on_sta(handle)
        trained = [parameter for parameter in handle.parameters() if parameter.requires_grad]
        if not trained:
            raise ConfigError(
                "STA is in the model, but no parameter of it requires a gradient, so it would not be trained. Build LoRA "
                'from handle.lora_config(), or name "sta" in its modules_to_save; without LoRA call handle.freeze_base().'
            )
        require_steps(net, trained, optimizer, args)
        self._end()  # of a start before: `auto_find_batch_size` begins anew where memory is short
        self.steps, self.found = 0, False
        self._hooks = [parameter.register_hook(self._look) for parameter in trained]  # also sees what ZeRO takes away

    def _look(self, gradient: Tensor) -> None:
        self.found = self.found or bool(gradient.any())

    def on_pre_optimizer_step(self, *_: object, model: nn.Module | None = None, **kwargs: object) -> None:
        """Count the steps in which STA has no gradient, until one has."""
        if not self._hooks:
            return
        net, handle = _trained(model)
        if any(of_all_ranks(self.found or any(map(_differs_from_zero, handle.parameters())))):
            self._end()
            self._note_single_frames(handle)
            return
        if all(of_all_ranks(_is_idle(net, handle))):
            return
        self.steps += 1
        reason = _reason(handle)
        if self.steps >= self.patience:
            self._end()
            raise DataError(
                f"STA got no gradient in the first {self.steps} steps, so nothing of it was trained: {reason} If the data "
                f"begins with that many steps without a clip, set patience above {self.patience}."
            )
        if self.steps == 1:
            logger.warning("STA got no gradient in the first step: %s", reason)

    def on_train_end(self, *_: object, model: nn.Module | None = None, **kwargs: object) -> None:
        """A run shorter than the patience must not end in silence either."""
        if self._hooks and self.steps:
            logger.warning(
                "the run ends after %d steps in which STA got no gradient: %s",
                self.steps,
                _reason(_trained(model)[1]),
            )
        self._end()

    def _end(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @staticmethod
    def _note_single_frames(handle: STAHandle) -> None:
        calls = handle.explain()
        if calls and all(call.frames == 1 for call in calls):
            logger.warning(
                "every clip of the first steps had a single frame, over which STA has nothing to attend: were frames given "
                "as images? Give them as one video."
            )


class ReportBadClips(TrainerCallback):
    """Says how many samples were left out since their clips can't be read (`count`: bad, good), and ends a run of no other."""

    def __init__(self, count: Callable[[], tuple[int, int]]) -> None:
        self.count = count
        self.told = 0

    def on_log(self, *_: object, **kwargs: object) -> None:
        """Tell when there are more than before."""
        bad, good = self.count()
        if bad > self.told:
            self.told = bad
            logger.warning("left out %d bad samples so far, beside %d good ones", bad, good)

    def on_train_end(self, *_: object, **kwargs: object) -> None:
        """Tell the final number."""
        self.on_log()


def warn_of_lora_on_sta(handle: STAHandle) -> None:
    """Tell of a model in which LoRA lies on STA's own layers, so that STA itself stays as it is."""
    if version("peft") == "not installed":
        return
    layer, _ = peft_parts()
    names = [
        f"blocks.{index}.sta.{name}"
        for index, block in handle.blocks.items()
        for name, module in block.named_modules()
        if isinstance(module, layer)
    ]
    if names:
        logger.warning(
            'LoRA lies on %d of STA\'s own layers, first %s, so that STA is trained in few ranks alone. Name "sta" in '
            "LoRA's modules_to_save (LLaMA-Factory: additional_target: sta) to train it whole.",
            len(names),
            names[0],
        )


def _trained(model: nn.Module | None) -> tuple[nn.Module, STAHandle]:
    handle = None if model is None else get_sta(model)
    if model is None or handle is None:
        raise InjectionError(
            "the model that is trained has no STA: inject_sta before the trainer is made, or sta_adapter.integrations.peft."
            "install() before LoRA is added."
        )
    return model, handle


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """The checkpoint of this step, which of a search over hyperparameters lies in a folder of its trial: the one written last."""
    folder, name = Path(str(args.output_dir)), f"checkpoint-{state.global_step}"
    trials = folder.glob(f"*/{name}") if state.is_hyper_param_search else ()
    return max(trials, key=lambda path: path.stat().st_mtime_ns, default=folder / name)


@contextlib.contextmanager
def _without_word_of_references() -> Iterator[None]:
    """Of several PEFT adapters the others are a reference, as DPO's."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"of \d+ PEFT adapters")
        yield


def _save(model: nn.Module | None, folder: Path) -> None:
    _, handle = _trained(model)
    with _without_word_of_references():
        if is_sharded(handle.model.parameters()):
            handle.save_pretrained(folder)
        else:
            on_rank_zero(lambda: handle.save_pretrained(folder))


def _differs_from_zero(parameter: nn.Parameter) -> bool:
    gradient = parameter.grad
    return gradient is not None and bool(getattr(gradient, "_local_tensor", gradient).any())


def _is_idle(model: nn.Module, handle: STAHandle) -> bool:
    """Whether what else trains has gradients, of zero alone: then there was nothing to learn in this step."""
    sta = {id(parameter) for parameter in handle.parameters()}
    others = [p for p in model.parameters() if p.grad is not None and id(p) not in sta]
    return bool(others) and not any(map(_differs_from_zero, others))


def _reason(handle: STAHandle) -> str:
    calls = handle.explain()
    if not calls:
        return (
            "no clip reached the vision encoder. The trainer leaves the pixels out (in TRL: rows with a 'videos' column, or "
            "without an 'images' column), or the samples have no clip."
        )
    if not any(call.frames > 1 for call in calls):
        return "only clips of a single frame reached the encoder; give frames as one video, not as images."
    return (
        "clips reached the encoder, but not the forward that the loss is made from (as in TRL's GRPO with video, where "
        "generation alone sees the pixels)."
    )
