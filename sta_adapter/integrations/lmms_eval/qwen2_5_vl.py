"""lmms-eval's Qwen2.5-VL with STA; the one that takes chat messages is its default."""

from __future__ import annotations

from lmms_eval.models.chat.qwen2_5_vl import Qwen2_5_VL as Chat2_5
from lmms_eval.models.simple.qwen2_5_vl import Qwen2_5_VL as Simple2_5

from sta_adapter.integrations.lmms_eval.adapted import WithAdapter


class Simple(WithAdapter, Simple2_5):
    """`qwen2_5_vl_sta` with `--force_simple`."""


class Chat(WithAdapter, Chat2_5):
    """`qwen2_5_vl_sta`."""
