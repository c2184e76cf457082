"""Batches of text alone, and data-parallel training: encoders that run more often in one process than in another.

DDP needs every process to reach every trained parameter once a step. FSDP and ZeRO gather an encoder's shards at each
of its runs, so there every process must run it equally often, whatever its batch holds: they agree, run by run. A process by
itself needs no run, but a loss that depends on something that trains.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import Tensor, nn

from sta_adapter.compatibility.calls import Arguments, given_arguments, iterate_tensors, parameter_names
from sta_adapter.compatibility.seams import active_ddp, put_first, uncompiled, uncompiled_where
from sta_adapter.distributed import Group, agree, is_fsdp1, is_parallel, is_sharded, shard_groups
from sta_adapter.errors import InjectionError
from sta_adapter.injection.backbone import DummyInputs
from sta_adapter.injection.hooks import Hook
from sta_adapter.injection.state import Injection
from sta_adapter.injection.target import innermost_around, trained_alone

EMBEDDINGS = ("get_input_embeddings", "get_output_embeddings")  # methods of transformers' models; text needs these too
ABLE, NO_DUMMY, NO_EMBEDDINGS, SHARDED_BETWEEN = range(4)
OBSTACLES = {
    NO_DUMMY: "backbone {backbone!r} has no dummy_inputs. Add them to the backbone",
    NO_EMBEDDINGS: "its language model was called without inputs_embeds, and has no get_input_embeddings whose output a "
    "run on a dummy clip could be added to. Embed the tokens first",
    SHARDED_BETWEEN: "layers between vision encoder and language model are sharded on their own and run with pictures "
    "and clips alone. Shard them with the whole model (no fully_shard of their own)",
}


class Groups(list[Group]):
    """The groups of processes that gather an encoder's shards; none in a copy, which is not sharded."""

    def __reduce__(self) -> tuple[type[Groups], tuple[()]]:
        return Groups, ()

    def agree(self, wants: bool, obstacle: int, backbone: str) -> bool:
        """Whether any process wants a run of the encoder.

        Raises:
            InjectionError: on all of them, when one wants it and one can't join in.
        """
        wanted, found = agree((int(wants), obstacle), self)
        if wanted and found:
            raise InjectionError(
                "the vision encoder runs more often in one process than in another, whose batch has fewer pictures or "
                f"clips, and which can't join in: {OBSTACLES[found].format(backbone=backbone)}, or give every process equally many."
            )
        return bool(wanted)


class Agreement:
    """What the hooks below share: encoder and language model, and the processes that gather shards together."""

    def __init__(self, model: nn.Module, encoder: nn.Module, language_model: nn.Module) -> None:
        self.model: Callable[[], nn.Module | None] = weakref.ref(model)  # a copy of a part must not copy the whole
        self.encoder = encoder
        self.language_model = language_model
        self.groups = Groups()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "model": _no_model}  # a weak reference is neither copied nor pickled

    def look(self, model: nn.Module) -> None:
        """Find the groups; what is gathered at the moment looks unsharded, so they stay once found.

        Raises:
            InjectionError: FSDP's first version wraps encoder or language model, and would gather before they agree.
        """
        if self.model() is None:
            self.model = weakref.ref(model)
        if self.groups or not is_parallel():
            return
        self.groups.extend(shard_groups([*self.encoder.modules(), *self.between()]))
        for module in model.modules() if self.groups else ():
            if is_fsdp1(module) and module.module in (self.encoder, self.language_model):
                raise InjectionError(
                    f"FullyShardedDataParallel wraps {type(module.module).__name__} itself, so that processes whose "
                    "batches have unequal numbers of clips would wait for ever. Wrap its blocks, or use fully_shard."
                )

    def embedding(self) -> nn.Module | None:
        """The module with which the language model embeds tokens by itself."""
        for module in (self.language_model, self.model()):
            try:
                found: object = module.get_input_embeddings()  # type: ignore[union-attr, operator]
            except (AttributeError, NotImplementedError):  # a method of transformers' models, not all of which have one
                continue
            if isinstance(found, nn.Module) and any(part is found for part in self.language_model.modules()):
                return found
        return None

    def called(self) -> nn.Module:
        """What runs the encoder as the model does: what checkpoints it as a whole, if there is such, or itself."""
        model = self.model()
        modules = () if model is None else model.modules()
        return next((m for m in modules if m._modules.get("_checkpoint_wrapped_module") is self.encoder), self.encoder)

    def between(self) -> list[nn.Module]:
        """The modules outside of encoder and language model that may run with pictures and clips alone."""
        model = self.model()
        if model is None:
            return []
        apart = [self.encoder, self.language_model]
        apart += [get() for name in EMBEDDINGS if callable(get := getattr(model, name, None))]
        known = {id(module) for part in apart if isinstance(part, nn.Module) for module in part.modules()}
        return [module for module in model.modules() if id(module) not in known]


def _no_model() -> None:
    """In the place of the model in a copy, until that is called."""


class ModelHook(Hook):
    """A hook that knows the whole agreement."""

    def __init__(self, injection: Injection, agreement: Agreement) -> None:
        super().__init__(injection)
        self.agreement = agreement


class FirstInLine(ModelHook):
    """Forward pre-hook of the module around encoder and language model: processes agree before FSDP's own hooks gather shards.

    `fully_shard` puts its hooks in front of those that it finds.
    """

    @uncompiled_where(lambda *call: is_parallel() or torch.is_grad_enabled())
    def __call__(self, model: nn.Module, args: tuple[object, ...]) -> None:
        """Change the order of hooks where it has to be, and gather the encoder's outputs from now on."""
        thread = self.injection.thread
        thread.model_with_grad = torch.is_grad_enabled()
        thread.outputs = [] if is_parallel() else None
        thread.ran = False  # what ran before was of a forward that failed, or of a backward that runs the encoder again
        self.agreement.look(model)
        if self.agreement.groups:
            for module in (self.agreement.encoder, self.agreement.language_model):
                put_first(module, self._agrees)

    def _agrees(self, hook: object) -> bool:
        return isinstance(hook, (EncoderAgree, LanguageModelBegin)) and hook.injection is self.injection


class LastInLine(Hook):
    """Forward hook of the same module, called also after an exception: keeps no output any longer."""

    @uncompiled_where(lambda *call: is_parallel() or torch.is_grad_enabled())
    def __call__(self, model: nn.Module, args: tuple[object, ...], output: object) -> None:
        """End what `FirstInLine` began.

        Raises:
            InjectionError: nothing that comes out depends on the dummy clips, so that the backward would wait for ever.
        """
        thread = self.injection.thread
        thread.outputs, thread.model_with_grad = None, False
        left, thread.to_embed = thread.to_embed, None
        if left is None:
            return
        left.handle.remove()
        if output is not None and is_parallel():  # no exception is on its way, and others wait
            raise InjectionError(
                "the language model was called without inputs_embeds and did not embed tokens by itself, so this process "
                "can't join in the run of the vision encoder in the others. Embed the tokens first, or give every process "
                "pictures or clips."
            )


class EncoderAgree(Hook):
    """Forward pre-hook of an encoder: where it is sharded, the other processes are told that it runs here.

    It knows the groups alone: a copied or pickled encoder must not take the language model along.
    """

    def __init__(self, injection: Injection, groups: Groups) -> None:
        super().__init__(injection)
        self.groups = groups

    @uncompiled
    def __call__(self, encoder: nn.Module, args: tuple[object, ...]) -> None:
        """Wait for the others; a run on a dummy clip has been agreed upon already."""
        if self.groups and not self.injection.thread.in_dummy:
            self.groups.agree(True, ABLE, self.injection.spec.name)


class EncoderOutput(Hook):
    """Forward hook of an encoder: keeps all outputs for `LanguageModelBegin`, also those that the model doesn't take."""

    @uncompiled
    def __call__(self, encoder: nn.Module, args: tuple[object, ...], output: object) -> None:
        """Change nothing."""
        if self.injection.thread.outputs is not None:
            self.injection.thread.outputs += [t for t in iterate_tensors(output) if t.requires_grad]


class LanguageModelBegin(ModelHook):
    """Forward pre-hook of the language model: the encoder runs on dummy clips, as often as it ran elsewhere, at least once.

    The dummies run where the encoder would have run, just before the language model, so that all processes gather their
    shards in one order. All that the encoder gave, here and for real clips, counts with weight zero, and so does what
    trains between it and the language model: each process's backward then reaches the same parameters. Otherwise DDP
    reports parameters without a gradient, and FSDP waits forever for a process to join in. A language model that is
    given tokens, as some are for text alone, gets it where it embeds them.
    """

    @uncompiled_where(lambda hook, module, args, kwargs: is_parallel() or _trains_nothing(module, args, kwargs))
    def __call__(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> Arguments:
        """Add zero times the encoder's outputs to `inputs_embeds`, or to what the model's own embedding gives."""
        injection, groups = self.injection, self.agreement.groups
        differentiates, parallel = torch.is_grad_enabled() and injection.is_enabled, is_parallel()  # no mode says that
        wants = not injection.pop_ran() and differentiates
        args, kwargs = _by_name(module, args, kwargs) if wants or parallel or groups else (args, kwargs)
        embeddings = cast("Tensor | None", kwargs.get("inputs_embeds"))
        dummies = 0
        if groups:
            obstacle = self._obstacle(embeddings)
            while groups.agree(wants and not obstacle, obstacle, injection.spec.name):
                self._run_dummy()
                wants, dummies = False, dummies + 1
        elif parallel and differentiates and self._joins_ddp(wants, embeddings):
            self._run_dummy()
            dummies = 1
        elif wants and not parallel and (embeddings is not None or self.agreement.embedding() is not None):
            found = trained_alone(self.agreement.model(), self.agreement.encoder, injection.spec)
            injection.thread.outputs, dummies = found, len(found)
        outputs, injection.thread.outputs = injection.thread.outputs, None
        if outputs and (embeddings is not None or dummies):
            device = outputs[0].device if embeddings is None else embeddings.device
            trained = (p for p in self._parameters_between() if p.requires_grad and not is_sharded([p]))
            zero = torch.stack([(t * 0).sum().float().to(device) for t in (*outputs, *trained)]).sum()
            if embeddings is not None:
                kwargs = {**kwargs, "inputs_embeds": embeddings + zero.to(embeddings.dtype)}
            else:
                injection.thread.to_embed = AddOnce(injection, cast(nn.Module, self.agreement.embedding()), zero)
        return args, kwargs

    def _joins_ddp(self, wants: bool, embeddings: Tensor | None) -> bool:
        """Whether to run a dummy in an unsharded model; where that can't be, all processes hear of it."""
        obstacle = self._obstacle(embeddings) if wants else ABLE
        # asked of what all processes have in common, for all must take part or none
        if self.injection.spec.dummy_inputs is None or self.agreement.embedding() is None:
            ddp = active_ddp()
            if ddp is not None and not ddp.find_unused_parameters:
                Groups([Group(ddp.process_group, ddp.device)]).agree(not wants, obstacle, self.injection.spec.name)
        return wants and not obstacle

    def _obstacle(self, embeddings: Tensor | None) -> int:
        """Why this process can't run the encoder on a dummy clip."""
        if self.injection.spec.dummy_inputs is None:
            return NO_DUMMY
        if embeddings is None and self.agreement.embedding() is None:
            return NO_EMBEDDINGS
        return SHARDED_BETWEEN if is_sharded(self._parameters_between()) else ABLE

    def _run_dummy(self) -> None:
        """Run the encoder on its backbone's dummy clip; `EncoderOutput` keeps what comes out."""
        dummy_inputs = cast("DummyInputs", self.injection.spec.dummy_inputs)
        encoder = self.agreement.encoder
        args, kwargs = dummy_inputs(encoder)
        self.injection.thread.outputs = (
            self.injection.thread.outputs or []
        )  # None where a call went past all hooks of the model
        with self.injection.dummy():
            self.agreement.called()(*args, **kwargs)

    def _parameters_between(self) -> Iterator[nn.Parameter]:
        for module in self.agreement.between():
            yield from module.parameters(recurse=False)


class AddOnce(Hook):
    """Forward hook of an embedding, for one run in one thread: adds a zero with the graph of what must be reached."""

    def __init__(self, injection: Injection, embedding: nn.Module, scalar: Tensor) -> None:
        super().__init__(injection)
        self.scalar = scalar
        self.handle = embedding.register_forward_hook(self)

    @uncompiled
    def __call__(self, embedding: nn.Module, args: tuple[object, ...], output: Tensor) -> Tensor:
        """Add it, unless this is another thread's run."""
        if self.injection.thread.to_embed is not self:
            return output
        self.injection.thread.to_embed = None
        self.handle.remove()
        return output + self.scalar.to(output.device, output.dtype)


def _trains_nothing(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> bool:
    """Whether a forward with gradients begins, and none reaches what it has: a batch of text in stage one, for a compiler to see."""
    given = (*args, *kwargs.values(), *module.parameters())
    return torch.is_grad_enabled() and not any(isinstance(value, Tensor) and value.requires_grad for value in given)


def _by_name(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> Arguments:
    """Arguments of a language model's call, by name where `inputs_embeds` may be among those by position."""
    if not args:
        return args, kwargs
    what = f"the forward of {type(module).__name__}"
    if "inputs_embeds" not in parameter_names(module.forward, what):
        return args, kwargs
    return (), given_arguments(module.forward, what, args, kwargs)


def attach_agreement(model: nn.Module, encoder: nn.Module, language_model: nn.Module, injection: Injection) -> None:
    """Put the hooks into a model that has a language model behind its encoder."""
    agreement = Agreement(model, encoder, language_model)
    encoder.register_forward_pre_hook(EncoderAgree(injection, agreement.groups))
    encoder.register_forward_hook(EncoderOutput(injection))
    language_model.register_forward_pre_hook(LanguageModelBegin(injection, agreement), with_kwargs=True)
    around = innermost_around(model, encoder, language_model)
    around.register_forward_pre_hook(FirstInLine(injection, agreement))
    around.register_forward_hook(LastInLine(injection), always_call=True)
