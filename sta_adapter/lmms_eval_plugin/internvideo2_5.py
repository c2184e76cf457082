"""lmms-eval's InternVideo2.5-Chat with STA. Its class loads the published code, with flash attention, onto a GPU."""

from __future__ import annotations

from lmms_eval.models.simple.internvideo2_5 import InternVideo2_5

from sta_adapter.lmms_eval_plugin.adapted import WithAdapter


class Simple(WithAdapter, InternVideo2_5):
    """`internvideo2_5_sta`."""
