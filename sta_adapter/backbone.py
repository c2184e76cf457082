"""What a description of a vision encoder is written with; see docs/add-a-backbone.md."""

from sta_adapter.injection.backbone import Backbone, ClipSource, EncoderCall, LoRARecipe, TextPositions

__all__ = ["Backbone", "ClipSource", "EncoderCall", "LoRARecipe", "TextPositions"]
