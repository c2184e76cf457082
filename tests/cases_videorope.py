"""VideoRoPE for the contract: Qwen2-VL changed by `apply_videorope`, or on an old transformers the published names."""

from __future__ import annotations

from cases import Case, make_qwen2_vl, merged_tokens, qwen2_vl_arguments, qwen2_vl_config, qwen2_vl_prompt
from qwen2_vl_prompts import transformers_version
from standins.videorope import Qwen2VLForConditionalGeneration
from torch import nn

from sta_adapter.backbones.videorope import apply_videorope


def make_videorope() -> nn.Module:
    """The full model."""
    if transformers_version() < (4, 52):
        return Qwen2VLForConditionalGeneration(qwen2_vl_config())
    return apply_videorope(make_qwen2_vl())


CASES = [
    Case("videorope", "videorope", make_videorope, qwen2_vl_arguments, merged_tokens, generate=qwen2_vl_prompt),
]
