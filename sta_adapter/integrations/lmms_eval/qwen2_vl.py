"""lmms-eval's Qwen2-VL with STA."""

from __future__ import annotations

from lmms_eval.models.simple.qwen2_vl import Qwen2_VL

from sta_adapter.integrations.lmms_eval.adapted import WithAdapter


class Simple(WithAdapter, Qwen2_VL):
    """`qwen2_vl_sta`."""
