"""An adapter on disk and on the Hub, without any model: its format, reading files that anybody may have written, LoRA beside it."""
