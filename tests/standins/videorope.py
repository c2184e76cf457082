"""What tells the model file of VideoRoPE's authors from Qwen2-VL: its attribute, its method, its class's name."""

from __future__ import annotations

from typing import Any

import transformers


class Qwen2VLForConditionalGeneration(transformers.Qwen2VLForConditionalGeneration):
    """Qwen2-VL with the names of that file, for transformers 4.45.2; its arithmetic is the `real_code` lane's."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.which_rope: str | None = None

    def get_t_scale_rope_index(self, *args: Any, **kwargs: Any) -> Any:
        """Positions of VideoRoPE; not called when STA looks for its place."""
        raise RuntimeError("the stand-in has no positions of its own")
