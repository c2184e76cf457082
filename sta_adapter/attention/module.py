"""TemporalAttention: the STA branch of one block, a plain module that knows no backbone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sta_adapter.attention.block_function import block_branch, is_autocast, weights_or_reason
from sta_adapter.attention.explain import KernelCall, calls_of
from sta_adapter.attention.frame_attention import mix_frames
from sta_adapter.attention.layout import ClipLayout
from sta_adapter.compatibility.seams import has_forward_derivatives, operations_are_watched
from sta_adapter.config import COMPUTED, STAConfig
from sta_adapter.distributed import execution_device
from sta_adapter.errors import ConfigError, LayoutError

CHILD = "sta"  # the name of the STA module in its block
SETTINGS = "sta_config"  # the name of what a state dict tells of an STA module


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
        recompute: keep only the branch's input for the backward, and compute the rest again.

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
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.config = config
        self.recompute = False
        self.norm = (nn.RMSNorm if norm == "rmsnorm" else nn.LayerNorm)(width, eps=norm_eps, device=device, dtype=dtype)
        self.to_qkv = nn.Linear(width, 3 * num_heads * head_dim, bias=qkv_bias, device=device, dtype=dtype)
        self.to_out = nn.Linear(num_heads * head_dim, width, device=device, dtype=dtype)
        gamma = None if config.gamma_init is None else torch.empty(width, device=device, dtype=dtype)
        self.gamma = None if gamma is None else nn.Parameter(gamma)
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
        for module in self.modules():  # transformers' init_weights() would give them other numbers
            vars(module)["_is_hf_initialized"] = True

    def forward(self, tokens: Tensor, layout: ClipLayout) -> Tensor:
        """The branch, without the residual.

        Args:
            tokens: (..., C), the encoder's tokens without class tokens: `layout.patches(...)`.
            layout: where each token stands.

        Returns:
            (..., C), shaped as `tokens`, in the module's dtype (or autocast's).

        Raises:
            LayoutError: there are other tokens than in the layout.
        """
        if tokens.shape[:-1].numel() != layout.num_tokens:
            raise LayoutError(f"{tuple(tokens.shape)} tokens, expected the {layout.num_tokens} of {layout}.")
        weights = weights_or_reason(self, tokens, layout)
        if not isinstance(weights, str):
            return block_branch(self, weights, tokens, layout)
        return _recomputed(self._branch, tokens, layout) if self.recompute else self._branch(tokens, layout)

    def _branch(self, tokens: Tensor, layout: ClipLayout) -> Tensor:
        """`forward`, layer by layer."""
        qkv = self.to_qkv(self.norm(tokens.to(self.placement[1]))).reshape(layout.num_tokens, -1)
        heads = self._mix_frames(qkv, layout) if self.recompute else _recomputed(self._mix_frames, qkv, layout)
        branch = self.to_out(heads)
        if self.gamma is not None:
            branch = branch * self.gamma
        if not self.config.single_frames and layout.past is None and any(t == 1 for t, _ in layout.clips):
            branch = branch.masked_fill(layout.single_frame_mask(branch.device), 0)
        return cast("Tensor", branch.view(tokens.shape))

    def _mix_frames(self, qkv: Tensor, layout: ClipLayout) -> Tensor:
        if layout.past is not None:
            return layout.past.mix_frames(self, qkv)
        config = self.config
        if config.attention == "auto" and not torch.compiler.is_compiling() and has_forward_derivatives():
            config = dataclasses.replace(config, attention="eager")  # the other kernels have none
        return mix_frames(qkv, layout, self.num_heads, config)

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        """Tell the settings beside the tensors, in what torch keeps of a state's modules; files of safetensors have no place for that."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        of_modules = getattr(destination, "_metadata", {})
        of_modules.setdefault(prefix[:-1], {})[SETTINGS] = {name: getattr(self.config, name) for name in COMPUTED}

    def _load_from_state_dict(
        self, state: dict[str, Tensor], prefix: str, metadata: dict[str, object], strict: bool, *found: list[str]
    ) -> None:
        """As a module's own; tensors of other settings are an error, the last of `found`, as those of other shapes are."""
        if differ := self.config.told_apart(cast("dict[str, object]", metadata.get(SETTINGS, {}))):
            found[-1].append(
                f"{prefix[:-1]}: STA was trained with other settings: {differ}. Give them to inject_sta, or load dict(state) to begin from its weights"
            )
        super()._load_from_state_dict(state, prefix, metadata, strict, *found)

    @property
    def placement(self) -> tuple[torch.device, torch.dtype]:
        """Where the branch computes, and in which dtype."""
        # asked of each block in each forward, and `self.to_qkv` takes a detour
        layers = cast("dict[str, nn.Module]", self._modules)
        weight: object = layers["to_qkv"].weight
        if not isinstance(weight, Tensor):  # a method, of torch's quantised layers, which compute as the norm does
            weight = cast("Tensor", layers["norm"].weight)
        device = weight.device
        if device.type == "meta":  # accelerate brings the weights when they are needed
            device = execution_device(self) or device
        return device, weight.dtype

    def prepare(self, layout: ClipLayout) -> tuple[KernelCall, ...]:
        """Make the tables and the choices that `forward` needs ahead of it, where `torch.compile` does not look.

        Returns:
            The calls of the attention kernel that `forward` will make, one for each number of frames.

        Raises:
            BackendError: the attention kernel asked for by name can't be used.
        """
        device, dtype = self.placement
        if is_autocast(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        like = torch.empty((1, 1, self.num_heads, self.head_dim), device=device, dtype=dtype)
        if layout.past is not None:
            return layout.past.prepare(self, like)
        if layout.is_gathered:
            layout.scatter_index(device)
            layout.gather_index(device)
        if self.config.token_order == "published":
            layout.published_index(device)
        if not self.config.single_frames:
            layout.single_frame_mask(device)
        if self.config.rope_theta is not None:
            layout.rotary_tables(self.head_dim, self.config.rope_theta, like)
        return calls_of(layout, like, self.config.attention)


def _recomputed(function: Callable[..., Tensor], tensor: Tensor, *args: object) -> Tensor:
    """`function(tensor, *args)`, of which the backward keeps only `tensor`.

    Nothing is done without gradients, inside `torch.compile`, which chooses by itself what to keep, or under a transform
    of torch.func, which takes no checkpoint.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or operations_are_watched():
        return function(tensor, *args)
    return checkpoint(function, tensor, *args, use_reentrant=False, preserve_rng_state=False)
