"""Stacked temporal attention (STA, arXiv 2510.26027) as a plug-in for video language models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

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

_PLACES = {
    "attend": "sta_adapter.attention.kernels",
    "ClipLayout": "sta_adapter.attention.layout",
    "TemporalAttention": "sta_adapter.attention.module",
    "STAConfig": "sta_adapter.config",
    "Backbone": "sta_adapter.injection.backbone",
    "STAHandle": "sta_adapter.injection.handle",
    "get_sta": "sta_adapter.injection.handle",
    "inject_sta": "sta_adapter.injection.inject",
    "load_sta": "sta_adapter.injection.load",
    "list_backbones": "sta_adapter.injection.registry",
    "register_backbone": "sta_adapter.injection.registry",
}
_MODULES = (
    *("attention", "adapter", "backbones", "compatibility", "config", "data", "distributed", "errors", "evaluation"),
    *("injection", "inspection", "loading", "training", "video", "visualization"),
)


def __getattr__(name: str) -> Any:
    """Import what is asked for, so that commands start without torch."""
    if name in _MODULES:
        return import_module(f"sta_adapter.{name}")
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    """What is there, for completion."""
    return sorted({*globals(), *__all__})
