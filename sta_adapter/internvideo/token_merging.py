"""HiCo's merging of visual tokens (InternVideo2.5, arXiv 2501.12386, section 3), by ToMe (arXiv 2210.09461, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from sta_adapter.errors import LayoutError

__all__ = ["merge_tokens"]


def merge_tokens(tokens: Tensor, target: int, heads: int) -> Tensor:
    """Merge the tokens of each group to a fixed number, the most alike first.

    In each step, every second token may be merged into the token among the others that it is most alike, by the cosine
    of their features averaged over `heads` slices. Tokens in pairs of the greatest likeness are merged, at most half of
    all, until `target` remain. A merged token is the mean of all that went into it.

    Args:
        tokens: (G, P, C), a group each.
        target: tokens that remain of a group.
        heads: by how many slices the features are averaged; divides C.

    Returns:
        (G, target, C), of the input's type: those that weren't merged, least alike last, then the others.

    Raises:
        LayoutError: a group has not more than `target` tokens, or C is not divisible.
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
