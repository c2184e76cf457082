"""TemporalAttention: the STA branch of one block, a plain module that knows no backbone."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from sta_adapter.attention import attend, choose_backend
from sta_adapter.config import STAConfig
from sta_adapter.errors import ConfigError
from sta_adapter.layout import ClipLayout


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
        qkv = self.to_qkv(self.norm(tokens.to(self.to_qkv.weight.dtype)))
        heads = self.mix_frames(qkv.reshape(layout.num_tokens, -1), layout)
        branch = self.to_out(heads)
        if self.gamma is not None:
            branch = branch * self.gamma
        if not self.config.single_frames and any(t == 1 for t, _ in layout.clips):
            branch = branch.masked_fill(layout.single_frame_mask(branch.device), 0)
        return branch.view(tokens.shape)

    def prepare(self, layout: ClipLayout) -> None:
        """Make the tables and the choice that `forward` needs ahead of it, where `torch.compile` does not look.

        Raises:
            BackendError: the attention kernel asked for by name can't be used.
        """
        weight = self.to_qkv.weight
        device = weight.device
        if not layout.is_uniform:
            layout.scatter_index(device)
            layout.gather_index(device)
        if self.config.token_order == "published":
            layout.published_index(device)
        if not self.config.single_frames:
            layout.single_frame_mask(device)
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else weight.dtype
        like = weight.new_empty((1, 1, self.num_heads, self.head_dim), dtype=dtype)
        choose_backend(like, self.config.attention)
        if self.config.rope_theta is not None:
            layout.rotary_tables(self.head_dim, self.config.rope_theta, like)

    def mix_frames(self, qkv: Tensor, layout: ClipLayout) -> Tensor:
        """Attention over the frames of each position: (tokens, 3 * heads * head_dim) -> (tokens, heads * head_dim)."""
        if layout.is_uniform:
            frames, positions = layout.clips[0]
            fold = rearrange(qkv, "(b t n) (k h d) -> k b n t h d", t=frames, n=positions, k=3, h=self.num_heads)
            out = self._attend(fold.flatten(1, 2), layout)
            out = rearrange(out, "(b n) t h d -> (b t n) (h d)", n=positions)
        else:
            out = self._mix_unequal(qkv, layout)
        if self.config.token_order == "published":
            out = out.index_select(0, layout.published_index(out.device))
        return out

    def _mix_unequal(self, qkv: Tensor, layout: ClipLayout) -> Tensor:
        """Clips of different lengths: all clips of one length together, so that no mask or padding is needed."""
        parts = qkv.index_select(0, layout.gather_index(qkv.device)).split([t * n for t, n in layout.groups])
        outs = []
        for (frames, _), part in zip(layout.groups, parts, strict=True):
            fold = rearrange(part, "(t p) (k h d) -> k p t h d", t=frames, k=3, h=self.num_heads)
            outs.append(rearrange(self._attend(fold, layout), "p t h d -> (t p) (h d)"))
        return torch.cat(outs).index_select(0, layout.scatter_index(qkv.device))

    def _attend(self, qkv: Tensor, layout: ClipLayout) -> Tensor:
        """(3, P, T, H, D) -> (P, T, H, D), for P positions of clips with the same number of frames."""
        q, k, v = qkv.unbind(0)
        if q.shape[1] == 1:
            return v  # a softmax over one frame is 1
        if self.config.rope_theta is not None:
            cos, sin = layout.rotary_tables(self.head_dim, self.config.rope_theta, q)
            cos, sin = cos[: q.shape[1]], sin[: q.shape[1]]
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return attend(q, k, v, causal=self.config.causal, backend=self.config.attention)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding by half-rotation; x is (P, T, H, D), the tables (T, 1, D)."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin
