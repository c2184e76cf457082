"""What a conversation is made of, as chat templates take it, and the record that it came from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    from typing_extensions import NotRequired

__all__ = ["Message", "Part", "Record"]

Part = dict[str, Any]
"""Of a message's content: `{"type": "text" | "image" | "video", ...}`, with the clip's own settings."""


class Message(TypedDict):
    """`{"role": ..., "content": [part, ...]}`, and "loss" where an answer is not learned."""

    role: str
    content: list[Part]
    loss: NotRequired[bool]


Record = dict[str, Any]
"""One object of a file of samples."""
