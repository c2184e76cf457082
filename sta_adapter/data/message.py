"""What a conversation is made of, as chat templates and processors take it, and the record that it came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from typing_extensions import NotRequired

    from sta_adapter.video.reader import ClipTimes

Part = dict[str, Any]
"""Of a message's content: `{"type": "text" | "image" | "video", ...}`, with the clip's own settings."""


class Message(TypedDict):
    """`{"role": ..., "content": [part, ...]}`, and "loss" where an answer is not learned."""

    role: str
    content: list[Part]
    loss: NotRequired[bool]


def text_of(message: Message) -> str:
    """What a message says beside its clips and pictures."""
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def files_of(part: Part) -> list[str]:
    """The file or folder of a clip or picture, or the pictures that make a clip."""
    found = part[part["type"]]
    return found if isinstance(found, list) else [found]


@dataclass(frozen=True)
class Visual:
    """A decoded clip or image."""

    kind: str  # "video" or "image"
    pixels: NDArray[np.uint8]  # `(T, H, W, 3)` uint8, of one frame for an image
    # when frames begin, as transformers tells it: fps, frames_indices (over fps: seconds), total_num_frames, duration
    metadata: ClipTimes | None = None
    resized: bool = False  # whether the pixels have their final size, so that the processor must not resize them


Record = dict[str, Any]
"""One object of a file of samples."""
