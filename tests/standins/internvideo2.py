"""Stand-in of InternVideo2's ViT, with plain and with fused norms, and of InternVideo2-Chat around it."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


class DropPath(nn.Module):
    """Drops the branch of a whole sample, in training."""

    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if not self.training:
            return x
        keep = 1 - self.drop_prob
        return x * torch.bernoulli(torch.full((len(x), 1, 1), keep, dtype=x.dtype)).div_(keep)


class RMSNorm(nn.Module):
    def __init__(self, hidden_size, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, x):
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)).to(
            x.dtype
        )


class DropoutAddRMSNorm(nn.Module):
    """The fused norm's arithmetic: takes a summand and the residual, gives the norm of their sum, and the sum."""

    def __init__(self, hidden_size, prenorm=True, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.prenorm = prenorm
        self.epsilon = eps

    def forward(self, x0, residual=None):
        total = x0 if residual is None else x0 + residual
        normed = F.rms_norm(total, self.weight.shape, self.weight, self.epsilon)
        return (normed, total) if self.prenorm else normed


class Attention(nn.Module):
    def __init__(self, dim, num_heads, qkv_bias, norm_layer, qk_normalization, use_fused_rmsnorm):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.q_norm = norm_layer(dim) if qk_normalization else nn.Identity()
        self.k_norm = norm_layer(dim) if qk_normalization else nn.Identity()
        self.use_fused_rmsnorm = use_fused_rmsnorm and qk_normalization

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.use_fused_rmsnorm:
            q, k = q[0], k[0]
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(
        self,
        dim,
        num_heads,
        mlp_ratio,
        qkv_bias,
        init_values,
        drop_path,
        norm_layer,
        with_cp,
        qk_normalization,
        use_fused_rmsnorm,
        use_reentrant=True,
    ):
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, num_heads, qkv_bias, norm_layer, qk_normalization, use_fused_rmsnorm)
        self.ls1 = nn.Parameter(init_values * torch.ones(dim))
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.ls2 = nn.Parameter(init_values * torch.ones(dim))
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.with_cp = with_cp
        self.use_fused_rmsnorm = use_fused_rmsnorm
        self.use_reentrant = use_reentrant

    def _inner_forward(self, x, residual=None):
        if self.use_fused_rmsnorm:
            x, residual = self.norm1(x, residual)
            x = self.drop_path1(self.ls1 * self.attn(x))
            x, residual = self.norm2(x, residual)
            return self.drop_path2(self.ls2 * self.mlp(x)), residual
        x = x + self.drop_path1(self.ls1 * self.attn(self.norm1(x)))
        return x + self.drop_path2(self.ls2 * self.mlp(self.norm2(x)))

    def forward(self, x, residual=None):
        if self.with_cp:
            return checkpoint(self._inner_forward, x, residual, use_reentrant=self.use_reentrant)
        return self._inner_forward(x, residual)


class PatchEmbed(nn.Module):
    def __init__(self, img_size, patch_size, in_chans, embed_dim, num_frames, tubelet_size):
        super().__init__()
        side = img_size // patch_size
        self.tubelet_size = tubelet_size
        self.grid_size = (num_frames // tubelet_size, side, side)
        self.num_patches = self.grid_size[0] * side * side
        kernel = (tubelet_size, patch_size, patch_size)
        self.proj = nn.Conv3d(in_chans, embed_dim, kernel_size=kernel, stride=kernel)

    def forward(self, x):
        return self.proj(x).flatten(3).permute(0, 2, 3, 1)


class PretrainVisionTransformer(nn.Module):
    """Frames of a clip stand in one row; the class token is its first. A clip of other length gets stretched positions."""

    def __init__(
        self,
        in_chans=3,
        img_size=8,
        patch_size=4,
        qkv_bias=False,
        drop_path_rate=0.0,
        embed_dim=32,
        num_heads=4,
        mlp_ratio=2,
        init_values=1e-5,
        qk_normalization=True,
        depth=2,
        use_fused_rmsnorm=False,
        num_frames=4,
        tubelet_size=1,
        checkpoint_num=0,
        use_reentrant=True,
        x_vis_return_idx=-1,
        **unused,
    ):
        super().__init__()
        norm = partial(DropoutAddRMSNorm, prenorm=True) if use_fused_rmsnorm else RMSNorm
        self.embed_dim = embed_dim
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim, num_frames, tubelet_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.randn(1, self.patch_embed.num_patches + 1, embed_dim) * 0.02)
        depth = depth + x_vis_return_idx + 1
        rates = [drop_path_rate * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(
            Block(
                *(embed_dim, num_heads, mlp_ratio, qkv_bias, init_values, rate, norm, i < checkpoint_num),
                *(qk_normalization, use_fused_rmsnorm, use_reentrant),
            )
            for i, rate in enumerate(rates)
        )

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs):
        """By the name of transformers; the published class takes `checkpoint_num` when it is made."""
        for block in self.blocks:
            block.with_cp, block.use_reentrant = True, gradient_checkpointing_kwargs["use_reentrant"]

    def positions(self, frames):
        """(1, 1 + frames * N, C): the learned positions, stretched over the frames; their mean for an image."""
        grid = self.pos_embed[:, 1:].unflatten(1, (self.patch_embed.grid_size[0], -1))
        if frames == 1:
            grid = grid.mean(1, keepdim=True)
        elif frames != grid.shape[1]:
            grid = F.interpolate(grid.permute(0, 2, 3, 1).flatten(0, 1), size=frames, mode="linear")
            grid = grid.unflatten(0, (1, -1)).permute(0, 3, 1, 2)
        return torch.cat([self.pos_embed[:, :1], grid.flatten(1, 2)], dim=1)

    def forward(self, x, mask=None, use_image=False):
        x = self.patch_embed(x.type(self.cls_token.dtype))
        clips, frames = x.shape[:2]
        x = torch.cat([self.cls_token.expand(clips, -1, -1), x.flatten(1, 2)], dim=1)
        x = x + self.positions(1 if use_image else frames)
        if mask is not None:
            x = x[~mask].reshape(clips, -1, self.embed_dim)
        residual = None
        for block in self.blocks:
            if isinstance(x, tuple):
                x, residual = x
            x = block(x, residual=residual)
        if isinstance(x, tuple):
            x = x[0] + x[1]
        return x


class PretrainVisionTransformer_clean(PretrainVisionTransformer):
    """The name that InternVideo2-Chat gives it."""


class InternVideo2_VideoChat2(nn.Module):
    """The chat model's skeleton: the encoder, a projection in the Q-Former's place, a tiny language model."""

    def __init__(self, **vision):
        super().__init__()
        from transformers import MistralConfig, MistralForCausalLM

        self.vision_encoder = PretrainVisionTransformer_clean(**vision)
        self.project_up = nn.Linear(self.vision_encoder.embed_dim, 32)
        sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
        self.lm = MistralForCausalLM(MistralConfig(**sizes, **heads, pad_token_id=0))

    def forward(self, input_ids, video=None):
        """Logits of the text (B, L) after the video's tokens (B, 1 + T * N); video is (B, channels, T, H, W)."""
        return self.lm(inputs_embeds=self._embeddings(input_ids, video)).logits

    @torch.no_grad()
    def generate(self, input_ids, video=None, **options):
        """Tokens that follow."""
        embeddings = self._embeddings(input_ids, video)
        mask = torch.ones(embeddings.shape[:2], dtype=torch.long, device=embeddings.device)
        return self.lm.generate(inputs_embeds=embeddings, attention_mask=mask, **options)

    def _embeddings(self, input_ids, video):
        embeddings = self.lm.get_input_embeddings()(input_ids)
        if video is None:
            return embeddings
        seen = self.project_up(self.vision_encoder(video, use_image=video.shape[2] == 1))
        return torch.cat([seen, embeddings], dim=1)
