"""A tiny vision transformer, and the plug-in that puts stacked temporal attention into it."""

from my_vit_plugin.model import MyViT

__all__ = ["MyViT"]
