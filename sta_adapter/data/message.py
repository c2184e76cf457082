"""What a conversation is made of, as chat templates take it, and the record that it came from."""

from __future__ import annotations

from typing import Any

__all__ = ["Message", "Part", "Record"]

Part = dict[str, Any]
"""Of a message's content: `{"type": "text" | "image" | "video", ...}`, with the clip's own settings."""

Message = dict[str, Any]
"""`{"role": ..., "content": [part, ...]}`, and "loss" where an answer is not learned."""

Record = dict[str, Any]
"""One object of a file of samples."""
