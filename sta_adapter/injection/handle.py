"""STAHandle: everything that can be done with the STA of one model."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from torch import nn

from sta_adapter._lazy import importing
from sta_adapter.adapter.lora_peft import forget_sta
from sta_adapter.adapter.push import Publication
from sta_adapter.attention.explain import KernelCall
from sta_adapter.attention.layout import checked_lengths
from sta_adapter.attention.module import CHILD, TemporalAttention
from sta_adapter.config import STAConfig
from sta_adapter.errors import ConfigError, InjectionError
from sta_adapter.injection.backbone import active_modules
from sta_adapter.injection.contents import push_adapter, save_adapter
from sta_adapter.injection.hooks import find_injections, remove_hooks
from sta_adapter.injection.methods import remove_methods
from sta_adapter.injection.state import Injection
from sta_adapter.injection.stream import Stream, check_streaming, entered
from sta_adapter.injection.target import sta_modules

if TYPE_CHECKING:
    from peft import LoraConfig


class STAHandle:
    """The STA of one injected model; made by `inject_sta`, `load_sta` and `get_sta`.

    Attributes:
        model: the model to go on with. After `peft.get_peft_model(handle.model, ...)`, `get_sta(peft_model)` gives a
            handle whose model is the PeftModel.
    """

    def __init__(self, model: nn.Module, encoder: nn.Module, injection: Injection) -> None:
        self.model = model
        self._encoder = encoder
        self._injection = injection

    @classmethod
    def of(cls, model: nn.Module, encoder: nn.Module, injection: Injection) -> STAHandle:
        """The living handle of an injection, or a new one; it goes on with `model` if that holds its model."""
        reference = injection.__dict__.get("_handle")
        handle = reference() if reference is not None else None
        if handle is None:
            handle = cls(model, encoder, injection)
            injection.__dict__["_handle"] = weakref.ref(handle)
        elif any(module is handle.model for module in model.modules()):
            handle.model = model
        return handle

    def __repr__(self) -> str:
        state = "removed" if self._removed else "on" if self._injection.is_enabled else "off"
        return f"STAHandle(backbone={self.backbone!r}, blocks={len(self.blocks)}, parameters={self.num_parameters():,}, {state})"

    @property
    def config(self) -> STAConfig:
        """The configuration in force, the backbone's defaults filled in."""
        return self._injection.config

    @property
    def backbone(self) -> str:
        """Name of the backbone."""
        return self._injection.spec.name

    @property
    def encoder(self) -> nn.Module:
        """The vision encoder that holds STA."""
        return self._encoder

    @property
    def blocks(self) -> dict[int, TemporalAttention]:
        """The STA module at work in each block, by the block's index; empty after `remove()`."""
        if self._removed:
            return {}
        return sta_modules(self._encoder, self._injection.spec)

    def parameters(self) -> Iterator[nn.Parameter]:
        """STA's parameters, those at work."""
        for module in self.blocks.values():
            yield from module.parameters()

    def num_parameters(self) -> int:
        """How many numbers STA adds."""
        return sum(p.numel() for p in self.parameters())

    def freeze_base(self) -> STAHandle:
        """Stage one: of all the model's parameters, only STA's require a gradient."""
        self._require_injected()
        self.model.requires_grad_(False)
        self._encoder.requires_grad_(False)
        for parameter in self.parameters():
            parameter.requires_grad_(True)
        return self

    def lora_config(self, **overrides: object) -> LoraConfig:
        """Stage two: a `peft.LoraConfig` with the published recipe, which leaves STA's layers alone and trains them.

        `get_peft_model(handle.model, handle.lora_config())` then trains LoRA on language model and vision encoder, and
        STA whole, through `modules_to_save`.

        Args:
            overrides: fields of `LoraConfig` in the place of the recipe's.

        Raises:
            MissingExtraError: peft is not installed.
            ConfigError: the backbone has no recipe and `target_modules` is not given, or an option is unknown, out of
                range, or one with which an adapter can't be saved and loaded again.
        """
        self._require_injected()
        with importing("stage two needs peft: pip install 'sta-adapter[train]'"):
            import peft  # noqa: F401

            from sta_adapter.injection.lora_recipe import recipe_config
        return recipe_config(self, overrides)

    def disable(self) -> None:
        """Switch STA off in all threads: the base model's outputs, bit for bit."""
        self._require_injected()
        self._injection.enabled = False

    def enable(self) -> None:
        """Switch STA on again."""
        self._require_injected()
        self._injection.enabled = True

    def disabled(self) -> contextlib.AbstractContextManager[None]:
        """Context in which STA is off, in this thread and, of coroutines, this task."""
        self._require_injected()
        return self._injection.disabled()

    def clips(self, lengths: Sequence[int] | None) -> contextlib.AbstractContextManager[None]:
        """Context that tells the frames of each clip, for encoders that get frames as a batch.

        Args:
            lengths: frames of each clip, in order; their sum must be the encoder's batch.

        Raises:
            LayoutError: when a length is not a whole number above 0.
        """
        self._require_injected()
        return self._injection.clips(None if lengths is None else checked_lengths(lengths))

    def stream(self, window: int | None = None, *, name: str = "stream") -> Stream:
        """A new stream: a video that comes piece by piece, each frame encoded once, with what earlier ones left.

        `with handle.stream(window=64) as stream: features = encoder(next_frames, ...)`, as often as frames come.

        Args:
            window: frames that a frame attends to, itself among them; None for that of the adapter's configuration.
            name: for messages, where there are several.

        Raises:
            ConfigError: the adapter is not causal, its encoder looks across frames by itself (InternVideo2), or the
                window doesn't fit.
        """
        self._require_injected()
        window = check_streaming(self.config, self._injection.spec, window)
        return Stream(self._injection, self._living_blocks, window, name)

    def streams(self, *streams: Stream) -> contextlib.AbstractContextManager[None]:
        """Context in which each call of the encoder brings the next frames of each of these streams, a clip each, in order.

        Raises:
            ConfigError: they are none, one stands there twice, or one is another model's.
        """
        self._require_injected()
        ours = all(isinstance(s, Stream) and s.injection is self._injection for s in streams)
        if not streams or not ours or len(set(streams)) < len(streams):
            raise ConfigError("streams takes one or more different streams, made by this handle's stream(...).")
        return entered(streams)

    def explain(self) -> list[KernelCall]:
        """Which attention kernel has computed STA so far, and why: an entry for each distinct shape of its calls.

        Example:
            `for call in handle.explain(): print(call)` prints lines such as `256 positions x 8 frames, 4 heads of 80,
            torch.float32 on cpu: sdpa (not xformers: its memory-efficient attention needs CUDA tensors, ...)`.
        """
        return list(self._injection.calls)

    def recompute(self, whole_branch: bool = True) -> None:
        """Keep less for the backward: of each branch only its input, and compute the rest again (False: as before).

        On its own, without checkpointing the encoder; it costs the branch's forward once more. What is cheap to
        compute again is never kept, with or without this.
        """
        self._require_injected()
        for module in self.blocks.values():
            module.recompute = whole_branch

    def remove(self) -> nn.Module:
        """Take STA out: no hook, no parameter, the state keys as before. Removing twice is fine.

        Returns:
            The model as it was before injection.
        """
        modules = {id(m): m for root in (self.model, self._encoder) for m in root.modules()}.values()
        injections = {self._injection, *(found for _, found in find_injections(modules))}  # PEFT may keep an original
        for module in modules:
            for injection in injections:
                remove_hooks(module, injection)
                remove_methods(module, injection)
            child = module._modules.get(CHILD)
            if child is not None and any(isinstance(inner, TemporalAttention) for inner in child.modules()):
                del module._modules[CHILD]
        forget_sta(self.model)
        return self.model

    def save_pretrained(self, folder: str | os.PathLike[str], *, base_changed: bool = False) -> None:
        """Save STA, and LoRA weights if the model has them, into a folder; see `sta_adapter.injection.load`.

        Args:
            folder: made when it does not exist; an adapter in it is replaced.
            base_changed: save it also where the base model is other than when STA went in, because more of it was
                trained or LoRA was merged into it; the adapter is then for the changed base alone.

        Raises:
            CheckpointError: the base model was changed, weights are not finite, LoRA has options that can't be loaded,
                or the folder can't be written; what was there stays.
        """
        self._require_injected()
        save_adapter(self, folder, base_changed)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
        license: str | None = None,
        base_model: str | None = None,
        base_changed: bool = False,
        **more: object,
    ) -> Publication | None:
        """Publish STA, and LoRA weights if the model has them, on the Hugging Face Hub, in one commit.

        The repository and the branch are made where they are missing. A README that is there is kept; otherwise the
        commit holds a model card. Nothing but the adapter's files and the card is uploaded.

        Args:
            repo_id: "user/name" or "organisation/name".
            private: of a new repository. True is an error where the repository is public.
            revision: branch to push to; by default the main one.
            commit_message: by default "Upload STA adapter".
            token: of the account; by default the one of the login, or HF_TOKEN.
            create_pr: open a pull request with the commit.
            license: for the card, such as "apache-2.0".
            base_model: the base model's Hub id, where it was loaded from a folder.
            base_changed: as for `save_pretrained`.
            more: for the card, `datasets` (Hub ids), `run_folder` (output of training, for the recipe) and `results`
                (`results.json` of an evaluation); `endpoint` instead of HF_ENDPOINT; `dry_run=True` to upload nothing.

        Returns:
            What was uploaded, and where it is now. Where weights are sharded all processes must call this, and the
            first one pushes: None on the others.

        Raises:
            CheckpointError: as `save_pretrained`, or the Hub refused; the repository is as before.
            ConfigError: an argument has another form.
        """
        self._require_injected()
        card = {"license": license, "base_model": base_model}
        options = {"private": private, "revision": revision, "commit_message": commit_message, "token": token}
        return push_adapter(self, repo_id, base_changed, create_pr=create_pr, **options, **card, **more)

    @property
    def _removed(self) -> bool:
        hooks = self._encoder._forward_pre_hooks.values()
        return not any(getattr(hook, "injection", None) is self._injection for hook in hooks)

    def _living_blocks(self) -> dict[int, TemporalAttention]:
        self._require_injected()
        return self.blocks

    def _require_injected(self) -> None:
        if self._removed:
            raise InjectionError("this handle's STA has been removed from the model; inject or load again.")


def get_sta(model: nn.Module) -> STAHandle | None:
    """The handle of an injected model (also a copied or unpickled one, or a wrapper around it), or None.

    Raises:
        InjectionError: when several encoders in the model have STA.
    """
    found = find_injections(active_modules(model))
    if not found:
        return None
    if len(found) > 1:
        raise InjectionError(f"the model holds {len(found)} encoders with STA; pass one of them, such as model.visual.")
    encoder, injection = found[0]
    return STAHandle.of(model, encoder, injection)
