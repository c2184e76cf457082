"""lmms-eval's InternVideo2.5-Chat with STA. Its class loads the published code, with flash attention, onto a GPU."""

from __future__ import annotations

from lmms_eval.models.simple.internvideo2_5 import InternVideo2_5

from sta_adapter.errors import ConfigError
from sta_adapter.integrations.lmms_eval.adapted import WithAdapter


class Simple(WithAdapter, InternVideo2_5):
    """`internvideo2_5_sta`."""

    def generate_until_multi_round(self, requests: list[object]) -> list[str]:
        """Refuse. lmms-eval 0.7.3 asks for the method and its own class has none, so that it can't be made without."""
        raise ConfigError("InternVideo2.5 answers questions of one round; take another task or another model.")
