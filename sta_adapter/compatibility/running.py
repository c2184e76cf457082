"""Whether a module's call is still at work: no hook hears of its end by an interrupt, or by an error where it is compiled."""

from __future__ import annotations

import sys
from types import FrameType

from torch import nn


def is_running(module: nn.Module | None) -> bool:
    """Whether a call of a module, which runs its hooks, is at work in this thread.

    Frames are looked at and none is kept, as that would keep all tensors of a call that has ended.
    """
    frame: FrameType | None = None if module is None else sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == nn.modules.module.__name__ and frame.f_locals.get("self") is module:
            return True
        frame = frame.f_back
    return False
