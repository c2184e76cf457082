"""What a description of a vision encoder is written with; see docs/add-a-backbone.md."""

from sta_adapter.injection.backbone import Backbone, ClipSource, LoRARecipe, TextPositions
from sta_adapter.injection.encoder_call import EncoderCall

__all__ = ["Backbone", "ClipSource", "EncoderCall", "LoRARecipe", "TextPositions"]
