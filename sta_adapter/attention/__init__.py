"""The attention of STA, without any model: the layout of clips, the kernels and the module of one block."""

from sta_adapter.attention.kernels import attend
from sta_adapter.attention.layout import ClipLayout
from sta_adapter.attention.module import TemporalAttention

__all__ = ["ClipLayout", "TemporalAttention", "attend"]
