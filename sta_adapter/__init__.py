"""Stacked temporal attention (STA, arXiv 2510.26027) as a plug-in for video language models."""

from sta_adapter.attention.kernels import attend
from sta_adapter.attention.layout import ClipLayout
from sta_adapter.attention.module import TemporalAttention
from sta_adapter.config import STAConfig
from sta_adapter.injection.backbone import Backbone
from sta_adapter.injection.handle import STAHandle, get_sta
from sta_adapter.injection.inject import inject_sta
from sta_adapter.injection.load import load_sta
from sta_adapter.injection.registry import list_backbones, register_backbone

__version__ = "0.1.0"
__all__ = [
    "Backbone",
    "ClipLayout",
    "STAConfig",
    "STAHandle",
    "TemporalAttention",
    "attend",
    "get_sta",
    "inject_sta",
    "list_backbones",
    "load_sta",
    "register_backbone",
]
