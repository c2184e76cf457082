"""The layers of InternViT and of InternVideo2's encoder, under the published names and with the published arithmetic."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from sta_adapter.internvideo.v2_5_config import InternVisionConfig

NORMS: dict[str, type[nn.Module]] = {"rms_norm": LlamaRMSNorm, "layer_norm": nn.LayerNorm}


class DropPath(nn.Module):
    """Stochastic depth: leaves out a branch of some rows in training."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, states: Tensor) -> Tensor:
        """(F, ...) to the same."""
        if not self.training or self.rate == 0:
            return states
        keep = 1 - self.rate
        kept = states.new_empty(len(states), *[1] * (states.dim() - 1)).bernoulli_(keep)
        return states * kept / keep


class InternAttention(nn.Module):
    """Self-attention within a row of the batch, with queries and keys normalised, if at all, over all heads together."""

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.dropout = config.attention_dropout
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.proj_drop = nn.Dropout(config.dropout)
        self.qk_normalization = config.qk_normalization
        if config.qk_normalization:
            self.q_norm = LlamaRMSNorm(config.hidden_size, config.layer_norm_eps)
            self.k_norm = LlamaRMSNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, states: Tensor) -> Tensor:
        """(F, 1 + N, C) to the same."""
        q, k, v = self.qkv(states).chunk(3, dim=-1)
        if self.qk_normalization:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        found: Tensor = self.proj_drop(self.proj(mixed.transpose(1, 2).flatten(2)))
        return found


class InternMLP(nn.Module):
    """Two layers."""

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        self.act = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, states: Tensor) -> Tensor:
        """(..., C) to the same."""
        found: Tensor = self.fc2(self.act(self.fc1(states)))
        return found


class InternVisionEncoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and with a scale for each channel."""

    def __init__(self, config: InternVisionConfig, drop_path: float = 0.0) -> None:
        super().__init__()
        norm = NORMS[config.norm_type]
        self.attn = InternAttention(config)
        self.mlp = InternMLP(config)
        self.norm1 = norm(config.hidden_size, eps=config.layer_norm_eps)
        self.norm2 = norm(config.hidden_size, eps=config.layer_norm_eps)
        self.ls1 = nn.Parameter(config.initializer_factor * torch.ones(config.hidden_size))
        self.ls2 = nn.Parameter(config.initializer_factor * torch.ones(config.hidden_size))
        self.drop_path1 = DropPath(drop_path)
        self.drop_path2 = DropPath(drop_path)

    def forward(self, states: Tensor) -> Tensor:
        """(F, 1 + N, C) to the same."""
        states = states + self.drop_path1(self.attn(self.norm1(states)) * self.ls1)
        found: Tensor = states + self.drop_path2(self.mlp(self.norm2(states)) * self.ls2)
        return found
