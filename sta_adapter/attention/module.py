"""TemporalAttention: the STA branch of one block, a plain module that knows no backbone."""

from __future__ import annotations

from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from sta_adapter.attention.explain import KernelCall, calls_of
from sta_adapter.attention.kernels import attend
from sta_adapter.attention.layout import ClipLayout
from sta_adapter.attention.recompute import project_normed, recomputed
from sta_adapter.config import STAConfig
from sta_adapter.errors import ConfigError

CHILD = "sta"  # the name of the STA module in its block


class TemporalAttention(nn.Module):
    """gamma * proj(Attention over frames(qkv(norm(y)))), section 3 of arXiv 2510.26027.

    Children: `norm`, `to_qkv` (C -> 3 * heads * head_dim, in the order q, k, v), `to_out` (heads * head_dim -> C) and,
    when the configuration asks for it, the parameter `gamma` (C,).

    Args:
        width: channels C of the encoder's tokens.
        num_heads: heads of the branch.
        head_dim: size of a head, as in the encoder.
        config: settings in force.
        norm: "layernorm" or "rmsnorm".
        norm_eps: epsilon of the norm.
        qkv_bias: whether `to_qkv` has a bias.

    Attributes:
        recompute: keep only the branch's input for the backward, and compute the rest again; see `sta_adapter.attention.recompute`.

    Raises:
        ConfigError: when RoPE is asked for and the head size is odd.
    """

    gamma: nn.Parameter | None

    def __init__(
        self,
        width: int,
        num_heads: int,
        head_dim: int,
        config: STAConfig,
        *,
        norm: str = "layernorm",
        norm_eps: float = 1e-6,
        qkv_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if config.rope_theta is not None and head_dim % 2:
            raise ConfigError(f"RoPE needs an even head size, this encoder's is {head_dim}; set rope_theta=None.")
        at: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.config = config
        self.recompute = False
        self.norm = (nn.RMSNorm if norm == "rmsnorm" else nn.LayerNorm)(width, eps=norm_eps, **at)
        self.to_qkv = nn.Linear(width, 3 * num_heads * head_dim, bias=qkv_bias, **at)
        self.to_out = nn.Linear(num_heads * head_dim, width, **at)
        self.gamma = None if config.gamma_init is None else nn.Parameter(torch.empty(width, **at))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise all parameters as `config.init` and `config.gamma_init` say."""
        self.norm.reset_parameters()
        nn.init.normal_(self.to_qkv.weight, std=0.02)
        if self.to_qkv.bias is not None:
            nn.init.zeros_(self.to_qkv.bias)
        if self.config.init == "zero":
            nn.init.zeros_(self.to_out.weight)
        else:
            nn.init.normal_(self.to_out.weight, std=0.02)
        nn.init.zeros_(self.to_out.bias)
        if self.gamma is not None and self.config.gamma_init is not None:
            nn.init.constant_(self.gamma, self.config.gamma_init)

    def forward(self, tokens: Tensor, layout: ClipLayout) -> Tensor:
        """The branch, without the residual.

        Args:
            tokens: (..., C), the encoder's tokens without class tokens: `layout.patches(...)`.
            layout: where each token stands.

        Returns:
            (..., C), shaped as `tokens`, in the module's dtype (or autocast's).
        """
        return recomputed(self._branch, tokens, layout) if self.recompute else self._branch(tokens, layout)

    def _branch(self, tokens: Tensor, layout: ClipLayout) -> Tensor:
        qkv = project_normed(self.norm, self.to_qkv, tokens).reshape(layout.num_tokens, -1)
        heads = self.mix_frames(qkv, layout) if self.recompute else recomputed(self.mix_frames, qkv, layout)
        branch = self.to_out(heads)
        if self.gamma is not None:
            branch = branch * self.gamma
        if not self.config.single_frames and layout.past is None and any(t == 1 for t, _ in layout.clips):
            branch = branch.masked_fill(layout.single_frame_mask(branch.device), 0)
        return cast("Tensor", branch.view(tokens.shape))

    def prepare(self, layout: ClipLayout) -> tuple[KernelCall, ...]:
        """Make the tables and the choices that `forward` needs ahead of it, where `torch.compile` does not look.

        Returns:
            The calls of the attention kernel that `forward` will make, one for each number of frames.

        Raises:
            BackendError: the attention kernel asked for by name can't be used.
        """
        weight = self.to_qkv.weight
        device = weight.device
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else weight.dtype
        like = weight.new_empty((1, 1, self.num_heads, self.head_dim), dtype=dtype)
        if layout.past is not None:
            return layout.past.prepare(self, like)
        if not layout.is_uniform:
            layout.scatter_index(device)
            layout.gather_index(device)
        if self.config.token_order == "published":
            layout.published_index(device)
        if not self.config.single_frames:
            layout.single_frame_mask(device)
        if self.config.rope_theta is not None:
            layout.rotary_tables(self.head_dim, self.config.rope_theta, like)
        return calls_of(layout, like, self.config.attention)

    def mix_frames(self, qkv: Tensor, layout: ClipLayout) -> Tensor:
        """Attention over the frames of each position: (tokens, 3 * heads * head_dim) -> (tokens, heads * head_dim)."""
        if layout.past is not None:
            return layout.past.mix_frames(self, qkv)
        if layout.is_uniform:
            frames, positions = layout.clips[0]
            fold = rearrange(qkv, "(b t n) (k h d) -> b n t k h d", t=frames, n=positions, k=3, h=self.num_heads)
            out = rearrange(self._attend(fold, layout), "(b n) t h d -> (b t n) (h d)", n=positions)
        else:
            out = self._mix_unequal(qkv, layout)
        if self.config.token_order == "published":
            out = out.index_select(0, layout.published_index(out.device))
        return out

    def _mix_unequal(self, qkv: Tensor, layout: ClipLayout) -> Tensor:
        """Clips of different lengths: all clips of one length together, so that no mask or padding is needed."""
        parts = torch.split(qkv.index_select(0, layout.gather_index(qkv.device)), [t * n for t, n in layout.groups])
        outs = []
        for (frames, _), part in zip(layout.groups, parts, strict=True):
            fold = rearrange(part, "(t p) (k h d) -> p t k h d", t=frames, k=3, h=self.num_heads)
            outs.append(rearrange(self._attend(fold, layout), "p t h d -> (t p) (h d)"))
        return torch.cat(outs).index_select(0, layout.scatter_index(qkv.device))

    def _attend(self, qkv: Tensor, layout: ClipLayout) -> Tensor:
        """(..., T, 3, H, D) -> (P, T, H, D), for P positions of clips with the same number of frames."""
        frames = qkv.shape[-4]
        if frames == 1:
            return qkv[..., 2, :, :].flatten(0, -4)  # v: a softmax over one frame is 1
        if self.config.rope_theta is None:
            q, k, v = qkv.flatten(0, -5).unbind(2)
        else:
            cos, sin = (x[:frames, None] for x in layout.rotary_tables(self.head_dim, self.config.rope_theta, qkv))
            q, k = apply_rotary(qkv[..., :2, :, :], cos, sin).flatten(0, -5).unbind(2)
            v = qkv[..., 2, :, :].flatten(0, -4)
        config = self.config
        return attend(q, k, v, causal=config.causal, window=config.window, backend=config.attention)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding by half-rotation; x is (..., D), the tables fit it by broadcasting, such as (T, 1, D)."""
    left, right = x.chunk(2, dim=-1)
    cos, sin = cos[..., : left.shape[-1]], sin[..., : left.shape[-1]]
    return torch.cat([torch.addcmul(left * cos, right, sin, value=-1), torch.addcmul(right * cos, left, sin)], dim=-1)
