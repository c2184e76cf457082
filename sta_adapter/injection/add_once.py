"""AddOnce: a hook that adds a scalar to the tokens that a language model embeds by itself, for one run of one thread."""

from __future__ import annotations

from torch import Tensor, nn

from sta_adapter.compatibility.uncompiled import uncompiled
from sta_adapter.injection.hooks import Hook
from sta_adapter.injection.state import Injection


class AddOnce(Hook):
    """Forward hook of the embedding of tokens, for one run in one thread: adds a scalar to what comes out.

    Args:
        injection: whose thread it is.
        embedding: gets the hook.
        scalar: zero, with the graph of what must be reached.
    """

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
