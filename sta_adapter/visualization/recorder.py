"""Hooks that record what STA does with one clip while a model runs.

They record the calls of their own thread alone, so that others may go on using the model meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from einops import rearrange
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sta_adapter.attention.layout import ClipLayout
from sta_adapter.attention.module import TemporalAttention
from sta_adapter.attention.rotary import apply_rotary
from sta_adapter.attention.weights import attention_weights
from sta_adapter.compatibility.calls import iterate_tensors
from sta_adapter.errors import StreamError
from sta_adapter.injection.backbone import Backbone, EncoderCall
from sta_adapter.injection.handle import STAHandle
from sta_adapter.injection.told import take_clip_lengths

Kept = TypeVar("Kept")


@dataclass
class Recording(Generic[Kept]):
    """What STA did with the clip, by block; tensors are on the CPU."""

    clip: tuple[int, int] = (0, 0)  # (frames, positions)
    # what `AttentionRecorder.reduce` made of the weights (heads, positions, T, T)
    attention: dict[int, Kept] = field(default_factory=dict)
    # (T, N), length of the branch relative to the stream that it is added to
    branch: dict[int, Tensor] = field(default_factory=dict)
    # (rows, columns), index of the position that stands there on the picture; None if not known
    positions: Tensor | None = None
    no_picture: str = ""  # why there are no positions, else ""


class AttentionRecorder(Generic[Kept]):
    """Context in which the forwards of a model are recorded; `rewind()` in front of a second one, with STA off.

    `clip` is counted over all calls of the encoder within one forward of the model. `reduce` makes of attention weights
    (heads, positions, T, T), on their device, what is kept of them.

    Attributes:
        recording: what STA did.
        clips: how many clips the encoder got.
        after: (T * N, C), the clip's tokens behind the last block, with STA on.
        before: the same with STA off.
    """

    def __init__(self, handle: STAHandle, clip: int, reduce: Callable[[Tensor], Kept]) -> None:
        self.handle = handle
        self.clip = clip
        self.reduce = reduce
        self.recording: Recording[Kept] = Recording()
        self.clips = 0
        self.after: Tensor | None = None
        self.before: Tensor | None = None
        self._thread = threading.get_ident()
        self._layouts: list[ClipLayout] = []  # of the encoder's calls with STA on, which with STA off have none
        self._call = -1
        self._arguments: EncoderCall | None = None  # of the call of the encoder that is under way, with STA on
        self._hooks: list[RemovableHandle] = []

    def rewind(self) -> None:
        """The next forward of the model is the one with STA off."""
        self._call = -1

    def __enter__(self) -> AttentionRecorder[Kept]:
        if self.handle._injection.held_streams.value:
            raise StreamError(
                "a stream's frames can't be recorded: look at a whole clip, outside of the stream's `with` block."
            )
        encoder = self.handle.encoder
        self._on(encoder, "register_forward_pre_hook", self._encoder_starts, prepend=True, with_kwargs=True)
        for index, module in self.handle.blocks.items():
            self._on(module, "register_forward_pre_hook", self._branch_starts)
            self._on(module.to_qkv, "register_forward_hook", self._record_attention, index, module)
            self._on(module, "register_forward_hook", self._record_branch, index)
        blocks = encoder.get_submodule(self.handle._injection.spec.blocks)
        self._on(list(blocks.children())[-1], "register_forward_hook", self._record_output)
        return self

    def __exit__(self, *error: object) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def _on(
        self, module: nn.Module, kind: str, function: Callable[..., None], *given: object, **options: object
    ) -> None:
        def hook(_: nn.Module, *args: object) -> None:
            if threading.get_ident() == self._thread:
                function(*given, *args)

        self._hooks.append(getattr(module, kind)(hook, **options))

    @property
    def _clip_here(self) -> tuple[ClipLayout, int] | None:
        """The layout of the encoder's call and the clip's index in it; None where the clip isn't in this call."""
        if not 0 <= self._call < len(self._layouts):
            return None
        layout = self._layouts[self._call]
        index = self.clip - sum(len(earlier.clips) for earlier in self._layouts[: self._call])
        return (layout, index) if 0 <= index < len(layout.clips) else None

    def _encoder_starts(self, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        injection = self.handle._injection
        if injection.thread.in_check:
            return
        self._call += 1
        self._arguments = None
        if injection.is_enabled:
            kwargs, told = take_clip_lengths(self.handle.encoder, kwargs)
            self._arguments = EncoderCall.bind(self.handle.encoder, args, kwargs, told or injection.clip_lengths)

    def _branch_starts(self, args: tuple[Tensor, ClipLayout]) -> None:
        """The first of the blocks tells the layout of the encoder's call."""
        if self._arguments is None or len(self._layouts) > self._call:
            return
        layout = args[1]
        self._layouts.append(layout)
        self.clips += len(layout.clips)
        if self._clip_here is not None:
            spec, (_, clip) = self.handle._injection.spec, self._clip_here
            self.recording.clip = layout.clips[clip]
            self.recording.positions, self.recording.no_picture = _positions(spec, self._arguments, layout, clip)

    def _record_attention(self, index: int, module: TemporalAttention, args: tuple[object, ...], qkv: Tensor) -> None:
        """From a block's q, k and v (..., 3 * heads * head_dim) of all tokens."""
        if self._clip_here is not None:
            layout, clip = self._clip_here
            part = qkv.reshape(layout.num_tokens, -1)[_span(layout, clip)]
            self.recording.attention[index] = self.reduce(_weights(module, part.float(), layout, clip))

    def _record_branch(self, index: int, args: tuple[Tensor, ClipLayout], branch: Tensor) -> None:
        """From a block's stream (..., C) and the branch that will be added to it; looked at before that happens."""
        if self._clip_here is not None:
            layout, clip = self._clip_here
            span, shape = _span(layout, clip), layout.clips[clip]
            stream, added = (x.reshape(layout.num_tokens, -1)[span].float().norm(dim=-1) for x in (args[0], branch))
            self.recording.branch[index] = (added / stream.clamp_min(1e-12)).view(shape).cpu()

    def _record_output(self, args: tuple[object, ...], output: object) -> None:
        """Of the last block: tokens, or two summands of them, as fused norms hand them on."""
        if self._clip_here is None:
            return
        layout, clip = self._clip_here
        tensors = [t for t in iterate_tensors(output) if t.is_floating_point()]
        tokens = sum((t for t in tensors[1:] if t.shape == tensors[0].shape), tensors[0])
        kept = layout.patches(tokens).reshape(layout.num_tokens, -1)[_span(layout, clip)].float().clone()
        if self._arguments is None:
            self.before = kept
        else:
            self.after = kept


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
        cos, sin = (x[:frames, None] for x in layout.rotary_tables(module.head_dim, module.config.rope_theta, q))
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
    config = module.config
    return attention_weights(q, k, causal=config.causal, window=config.window).transpose(0, 1)
