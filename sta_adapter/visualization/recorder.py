"""Hooks that see what STA does with one clip while a model runs. Public: `Watch`, `Seen`.

They see the calls of their own thread alone, so that others may go on using the model meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from einops import rearrange
from torch import Tensor, nn

from sta_adapter.attention.layout import ClipLayout
from sta_adapter.attention.module import TemporalAttention, rotate
from sta_adapter.attention.weights import attention_weights
from sta_adapter.errors import StreamError
from sta_adapter.injection.backbone import Backbone, EncoderCall
from sta_adapter.injection.handle import STAHandle
from sta_adapter.injection.hooks import iterate_tensors, take_clip_lengths


@dataclass
class Seen:
    """What STA did with the clip, by block; tensors are on the CPU.

    Attributes:
        clip: (frames, positions).
        attention: what `Watch.reduce` made of the weights (heads, positions, T, T).
        branch: (T, N), length of the branch relative to the stream that it is added to.
        positions: (rows, columns), index of the position that stands there on the picture; None if not known.
        no_picture: why there are no positions, else "".
    """

    clip: tuple[int, int] = (0, 0)
    attention: dict[int, Any] = field(default_factory=dict)
    branch: dict[int, Tensor] = field(default_factory=dict)
    positions: Tensor | None = None
    no_picture: str = ""


class Watch:
    """Context in which the forwards of a model are watched; `again()` in front of a second one, with STA off.

    Args:
        handle: of the injected model.
        clip: which clip, counted over all calls of the encoder within one forward of the model.
        reduce: from attention weights (heads, positions, T, T), on their device, to what is kept of them.

    Attributes:
        seen: what was seen with STA on.
        clips: how many clips the encoder got.
        after: (T * N, C), the clip's tokens behind the last block, with STA on.
        before: the same with STA off.
    """

    def __init__(self, handle: STAHandle, clip: int, reduce: Callable[[Tensor], Any]) -> None:
        self.handle = handle
        self.clip = clip
        self.reduce = reduce
        self.seen = Seen()
        self.clips = 0
        self.after: Tensor | None = None
        self.before: Tensor | None = None
        self._thread = threading.get_ident()
        self._layouts: list[ClipLayout] = []  # of the encoder's calls with STA on; with STA off nobody tells them
        self._call = -1
        self._first = True
        self._hooks: list[Any] = []

    def again(self) -> None:
        """The next forward of the model is the one with STA off."""
        self._first, self._call = False, -1

    def __enter__(self) -> Watch:
        if self.handle._injection.streams:
            raise StreamError(
                "a stream's frames can't be watched: look at a whole clip, outside of the stream's `with` block."
            )
        encoder = self.handle.encoder
        self._on(encoder, "register_forward_pre_hook", self._begin, prepend=True, with_kwargs=True)
        for index, module in self.handle.blocks.items():
            self._on(module.to_qkv, "register_forward_hook", self._projected, index, module)
            self._on(module, "register_forward_hook", self._added, index)
        blocks: Any = encoder.get_submodule(self.handle._injection.spec.blocks)
        self._on(list(blocks)[-1], "register_forward_hook", self._ended)
        return self

    def __exit__(self, *error: object) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def _on(self, module: nn.Module, kind: str, function: Callable[..., None], *given: Any, **options: Any) -> None:
        def hook(_: nn.Module, *args: Any) -> None:
            if threading.get_ident() == self._thread:
                function(*given, *args)

        self._hooks.append(getattr(module, kind)(hook, **options))

    @property
    def _place(self) -> tuple[ClipLayout, int] | None:
        """The layout of the encoder's call and the clip's index in it; None where the clip isn't in this call."""
        if not 0 <= self._call < len(self._layouts):
            return None
        layout = self._layouts[self._call]
        index = self.clip - sum(len(earlier.clips) for earlier in self._layouts[: self._call])
        return (layout, index) if 0 <= index < len(layout.clips) else None

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The encoder is called."""
        self._call += 1
        injection = self.handle._injection
        if not self._first or not injection.is_enabled:
            return
        kwargs, told = take_clip_lengths(self.handle.encoder, kwargs)
        call = EncoderCall.bind(self.handle.encoder, args, kwargs, told or injection.clip_lengths)
        layout = injection.spec.layout(call)
        self._layouts.append(layout)
        self.clips += len(layout.clips)
        if self._place is not None:
            index = self._place[1]
            self.seen.clip = layout.clips[index]
            self.seen.positions, self.seen.no_picture = _positions(injection.spec, call, layout, index)

    def _projected(self, index: int, module: TemporalAttention, args: tuple[Any, ...], qkv: Tensor) -> None:
        """A block's q, k and v (..., 3 * heads * head_dim) of all tokens."""
        if self._place is not None:
            layout, clip = self._place
            part = qkv.reshape(layout.num_tokens, -1)[_span(layout, clip)]
            self.seen.attention[index] = self.reduce(_weights(module, part.float(), layout, clip))

    def _added(self, index: int, args: tuple[Tensor, ClipLayout], branch: Tensor) -> None:
        """A block's stream (..., C) and the branch that will be added to it; looked at before that happens."""
        if self._place is not None:
            layout, clip = self._place
            span, shape = _span(layout, clip), layout.clips[clip]
            stream, added = (x.reshape(layout.num_tokens, -1)[span].float().norm(dim=-1) for x in (args[0], branch))
            self.seen.branch[index] = (added / stream.clamp_min(1e-12)).view(shape).cpu()

    def _ended(self, args: tuple[Any, ...], output: Any) -> None:
        """The last block's output: tokens, or two summands of them, as fused norms hand them on."""
        if self._place is None:
            return
        layout, clip = self._place
        tensors = [t for t in iterate_tensors(output) if t.is_floating_point()]
        tokens = sum((t for t in tensors[1:] if t.shape == tensors[0].shape), tensors[0])
        kept = layout.patches(tokens).reshape(layout.num_tokens, -1)[_span(layout, clip)].float().clone()
        if self._first:
            self.after = kept
        else:
            self.before = kept


def _positions(spec: Backbone, call: EncoderCall, layout: ClipLayout, clip: int) -> tuple[Tensor | None, str]:
    """The clip's positions on the picture, or why they can't be known."""
    if spec.positions is None:
        return None, f"backbone {spec.name!r} does not declare where its positions stand on the picture."
    found = spec.positions(call, layout)[clip]
    if found is None:
        return None, (
            "where the clip's positions stand on the picture can't be known: some were masked out, a frame was cut into "
            "several tiles, or the order was passed by the caller."
        )
    if found.numel() > layout.clips[clip][1] or len(found.unique()) < found.numel():
        return (
            None,
            f"the {tuple(found.shape)} patches that backbone {spec.name!r} declares don't fit {layout.clips[clip][1]} positions.",
        )
    return found, ""


def _span(layout: ClipLayout, clip: int) -> slice:
    """Where the clip's tokens are among all."""
    start = sum(t * n for t, n in layout.clips[:clip])
    frames, positions = layout.clips[clip]
    return slice(start, start + frames * positions)


def _weights(module: TemporalAttention, part: Tensor, layout: ClipLayout, clip: int) -> Tensor:
    """(heads, positions, T, T) from a clip's q, k and v (T * N, 3 * heads * head_dim), in float32."""
    frames = layout.clips[clip][0]
    q, k, _ = rearrange(part, "(t n) (k h d) -> k n t h d", t=frames, k=3, h=module.num_heads)
    if module.config.rope_theta is not None:
        cos, sin = (x[:frames] for x in layout.rotary_tables(module.head_dim, module.config.rope_theta, q))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    config = module.config
    return attention_weights(q, k, causal=config.causal, window=config.window).transpose(0, 1)
