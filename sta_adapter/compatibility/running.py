"""Whether a module's call is still at work: no hook hears of its end by an interrupt, or by an error where it is compiled."""

from __future__ import annotations

import sys
from types import FrameType

from torch import nn

__all__ = ["calling_frame", "is_running"]


def calling_frame() -> FrameType | None:
    """The frame of the module's call that runs the hook which asks; None where there is none to be found."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__") != nn.modules.module.__name__:
        frame = frame.f_back
    return frame


def is_running(call: FrameType) -> bool:
    """Whether a call has not ended, asked in its thread."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame is not call:
        frame = frame.f_back
    return frame is not None
