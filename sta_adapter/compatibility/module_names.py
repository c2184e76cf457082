"""Names of modules and tensors as the releases of transformers have them, brought to one spelling."""

from __future__ import annotations

import re

# Modules moved between releases of transformers: 4.52 put the parts of a video model into one `model`, and 5 took away the
# `vision_model` of SigLIP and CLIP; 5.4 writes Qwen3.5's `visual` into the language model. Each rule is a step to one spelling for all of them.
RENAMED = (
    (r"^model\.(?=(?:language_model|visual|vision_tower|vision_model|multi_modal_projector|projector|image_newline)\b)", ""),
    (r"^language_model\.(?=visual\.)", ""),
    (r"^language_model\.model\.", "language_model."),
    (r"^language_model\.lm_head\b", "lm_head"),
    (r"^model\.", "language_model."),
    (r"^(vision_tower\.|)vision_model\.", r"\1"),
)  # fmt: skip
STA_TENSOR = re.compile(r"\.(\d+)\.sta\.((?:norm|to_qkv|to_out)\.(?:weight|bias)|gamma)$")
AROUND_PARTS = re.compile(r"\b(?:_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def canonical(name: str) -> str:
    """A module's name in a spelling that is the same for all releases of transformers."""
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def name_in_state(name: str) -> str:
    """A tensor's name as `state_dict` has it, without what FSDP and activation checkpointing put around parts of a model."""
    return AROUND_PARTS.sub("", name)
