"""The demo: made clips, the comparison of STA with LoRA on the tiny base, and its report."""

from sta_adapter.tiny_base import TINY_BASE

__all__ = ["TINY_BASE"]
