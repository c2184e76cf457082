"""Models with STA for lmms-eval: `lmms_eval --model qwen2_vl_sta --model_args pretrained=...,sta=PATH_OR_ID`.

Each model is lmms-eval's own class with the adapter put in once it has loaded the base; prompts, frames and scoring
stay lmms-eval's. One file a model, imported when it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

__all__ = ["manifests"]

MODELS = {  # name: file here, and the kinds of class that lmms-eval has for the base
    "qwen2_vl_sta": ("qwen2_vl", ("simple",)),
    "qwen2_5_vl_sta": ("qwen2_5_vl", ("simple", "chat")),
    "internvideo2_5_sta": ("internvideo2_5", ("simple",)),
    "vllm_sta": ("vllm", ("chat",)),
}


def manifests() -> list[ModelManifest]:
    """What lmms-eval registers."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [
        ModelManifest(
            model_id=name, **{f"{kind}_class_path": f"{__name__}.{file}.{kind.capitalize()}" for kind in kinds}
        )
        for name, (file, kinds) in MODELS.items()
    ]
