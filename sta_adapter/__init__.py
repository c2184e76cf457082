"""Stacked temporal attention (STA, arXiv 2510.26027) as a plug-in for video language models."""

from pkgutil import iter_modules
from typing import TYPE_CHECKING

from sta_adapter._lazy import lazy

if TYPE_CHECKING:
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

__getattr__, __dir__ = lazy(
    __name__,
    {
        "sta_adapter.attention.kernels": ["attend"],
        "sta_adapter.attention.layout": ["ClipLayout"],
        "sta_adapter.attention.module": ["TemporalAttention"],
        "sta_adapter.config": ["STAConfig"],
        "sta_adapter.injection.backbone": ["Backbone"],
        "sta_adapter.injection.handle": ["STAHandle", "get_sta"],
        "sta_adapter.injection.inject": ["inject_sta"],
        "sta_adapter.injection.load": ["load_sta"],
        "sta_adapter.injection.registry": ["list_backbones", "register_backbone"],
    },
    modules=[*(module.name for module in iter_modules(__path__)), "backbones"],  # which may lie elsewhere
)
