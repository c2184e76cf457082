"""The check of `validate` for backbones without `dummy_inputs`: with what the first real call of the encoder brings."""

from __future__ import annotations

import threading
import warnings

from torch import nn

from sta_adapter.compatibility.uncompiled import uncompiled
from sta_adapter.distributed import is_sharded
from sta_adapter.errors import STAWarning
from sta_adapter.injection.hooks import Hook
from sta_adapter.injection.state import Injection
from sta_adapter.injection.target import resolve_target
from sta_adapter.injection.validate import validate_call

_LOCK = threading.RLock()  # another thread's first forward waits for the verdict


class FirstCallPreHook(Hook):
    """Forward pre-hook of the encoder: before its first forward the blocks are checked, once.

    The encoder runs as far as its first block, and the first and last block by themselves, without STA and without
    gradients; modes and random states stay as they are.
    """

    def __init__(self, injection: Injection) -> None:
        super().__init__(injection)
        self.done = False

    @uncompiled
    def __call__(self, encoder: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        """Change nothing.

        Raises:
            InjectionError: the blocks are not as the backbone declares; at every call, until STA is removed.

        Warns:
            STAWarning: the encoder is sharded, so that its blocks can't be run by themselves.
        """
        if self.done or not self.injection.is_enabled:
            return
        with _LOCK:
            if self.done:
                return
            if is_sharded(encoder.parameters()):
                warnings.warn(
                    f"backbone {self.injection.backbone!r} has no dummy_inputs and the encoder is sharded, so whether its norm "
                    "is the one in front of the MLP is unverified. Add dummy_inputs, or run the encoder once before sharding.",
                    STAWarning,
                    stacklevel=2,
                )
                self.done = True
                return
            self.done = self._check(encoder, args, kwargs)

    def _check(self, encoder: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> bool:
        self.injection.thread.in_check = True
        try:
            with self.injection.disabled():
                return validate_call(resolve_target(self.injection.spec, encoder), args, kwargs)
        finally:
            self.injection.thread.in_check = False
