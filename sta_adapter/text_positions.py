"""The rule that a model numbers text beside clips by; see docs/compatibility.md."""

from sta_adapter.injection.text_positions import rule_in_use, use_positions

__all__ = ["rule_in_use", "use_positions"]
