"""InternViT, the vision encoder of InternVL and InternVideo2.5: frames or tiles as its batch, under the published names.

The same arithmetic as the published file (its plain attention), so that adapters and weights go from one to the other.
Behind it, HiCo's merging of visual tokens (InternVideo2.5, arXiv 2501.12386, section 3), by ToMe (arXiv 2210.09461,
section 3).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from sta_adapter.errors import LayoutError
from sta_adapter.internvideo.v2_5_config import InternVisionConfig
from sta_adapter.internvideo.vision_layers import InternVisionEncoderLayer


class InternVisionEmbeddings(nn.Module):
    """Patches, a class token, and positions that are resized to the picture's grid."""

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.side = config.image_size // config.patch_size
        self.class_embedding = nn.Parameter(torch.randn(1, 1, config.hidden_size))
        self.patch_embedding = nn.Conv2d(config.num_channels, config.hidden_size, config.patch_size, config.patch_size)
        self.position_embedding = nn.Parameter(torch.randn(1, self.side**2 + 1, config.hidden_size))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(F, 3, H, W) to (F, 1 + N, C)."""
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        rows, columns = patches.shape[2:]
        grid = self.position_embedding[:, 1:].unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
        grid = F.interpolate(grid.float(), size=(rows, columns), mode="bicubic", align_corners=False).to(patches.dtype)
        tokens = patches.flatten(2).transpose(1, 2) + grid.flatten(2).transpose(1, 2)
        first = (self.class_embedding + self.position_embedding[:, :1]).to(patches.dtype)
        return torch.cat([first.expand(len(patches), -1, -1), tokens], dim=1)


class InternVisionEncoder(nn.Module):
    """The layers, checkpointed in training where that is switched on."""

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        depth = config.num_hidden_layers
        rates = [config.drop_path_rate * index / max(1, depth - 1) for index in range(depth)]
        self.layers = nn.ModuleList(InternVisionEncoderLayer(config, rate) for rate in rates)
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: Callable[..., Tensor] = checkpoint

    def forward(self, states: Tensor) -> list[Tensor]:
        """(F, 1 + N, C) to the input and the output of every layer."""
        found = [states]
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                found.append(self._gradient_checkpointing_func(layer.__call__, found[-1]))
            else:
                found.append(layer(found[-1]))
        return found


class InternVisionModel(PreTrainedModel):
    """The encoder; each row of the batch by itself."""

    config_class = InternVisionConfig
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _no_split_modules = ["InternVisionEncoderLayer"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flash_attn_2 = True

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__(config)
        self.embeddings = InternVisionEmbeddings(config)
        self.encoder = InternVisionEncoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """What takes pixels."""
        return self.embeddings.patch_embedding

    def forward(
        self,
        pixel_values: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        pixel_embeds: Tensor | None = None,
    ) -> BaseModelOutputWithPooling:
        """`pixel_values` (F, 3, H, W), or `pixel_embeds` (F, 1 + N, C), to `last_hidden_state` (F, 1 + N, C)."""
        if pixel_embeds is None:
            size = self.config.patch_size
            if pixel_values is None or pixel_values.dim() != 4 or any(side % size for side in pixel_values.shape[2:]):
                found = None if pixel_values is None else tuple(pixel_values.shape)
                raise LayoutError(
                    f"pixel_values have the shape {found}; expected (frames, {self.config.num_channels}, height, width) in "
                    f"multiples of {size}, frames and tiles one after the other, as the processor makes them."
                )
            pixel_embeds = self.embeddings(pixel_values)
        states = self.encoder(pixel_embeds)
        kept = tuple(states) if output_hidden_states else None
        return BaseModelOutputWithPooling(
            last_hidden_state=states[-1], pooler_output=states[-1][:, 0], hidden_states=kept
        )


def merge_tokens(tokens: Tensor, target: int, heads: int) -> Tensor:
    """Merge the tokens (G, P, C) of each group to `target` of them, (G, target, C), the most alike first.

    In each step, every second token may be merged into the token among the others that it is most alike, by the cosine
    of their features averaged over `heads` slices. Tokens in pairs of the greatest likeness are merged, at most half of
    all, until `target` remain: those that weren't merged, least alike last, then the others. A merged token is the mean
    of all that went into it.

    Raises:
        LayoutError: a group has not more than `target` tokens, or C is not divisible by `heads`.
    """
    count, width = tokens.shape[1:]
    if count <= target:
        raise LayoutError(
            f"a group has {count} tokens to merge, expected more than {target}; take larger frames (image_size), or fewer "
            "num_tome_tokens."
        )
    if width % heads:
        raise LayoutError(
            f"features are {width} wide, expected a multiple of {heads}, the heads of the language model."
        )
    weights = torch.ones_like(tokens[..., :1])
    while (count := tokens.shape[1]) > target:
        merged = min(count - target, count // 2)
        source, into = _pairs(tokens.unflatten(-1, (heads, -1)).mean(2), merged)
        sums = _add(tokens * weights, source, into)
        weights = _add(weights, source, into)
        tokens = sums / weights
    return tokens


@torch.no_grad()
def _pairs(features: Tensor, merged: int) -> tuple[Tensor, Tensor]:
    """Order (G, P/2) of the even tokens, the first `merged` to go, and (G, merged) the odd tokens that they go into."""
    features = features / features.norm(dim=-1, keepdim=True)
    likeness, nearest = (features[:, ::2] @ features[:, 1::2].transpose(-1, -2)).max(dim=-1)
    order = likeness.argsort(dim=-1, descending=True)
    return order, nearest.gather(-1, order[:, :merged])


def _add(values: Tensor, order: Tensor, into: Tensor) -> Tensor:
    """(G, P, C) to (G, P - merged, C): even tokens that stay, in their order, then odd ones with what was added to them."""
    even, odd = values[:, ::2], values[:, 1::2]
    merged, width = into.shape[1], values.shape[-1]
    even = even.gather(1, order[..., None].expand(-1, -1, width))
    odd = odd.scatter_add(1, into[..., None].expand(-1, -1, width), even[:, :merged])
    return torch.cat([even[:, merged:], odd], dim=1)
