"""What the processors of both chat models share: the chat template, decoding, saving."""

from __future__ import annotations

import itertools
import json
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

__all__ = ["SETTINGS", "ChatProcessor"]

SETTINGS = "preprocessor_config.json"


class ChatProcessor(ABC):
    """A processor with a tokenizer and a chat template; a subclass encodes texts, clips and pictures."""

    tokenizer: Any
    chat_template: Any
    template_options: ClassVar[dict[str, Any]] = {}  # for calls on what the template has written

    @abstractmethod
    def __call__(self, images: Any = None, text: Any = None, videos: Any = None, **options: Any) -> Any:
        """Encode texts with the clips and pictures whose placeholders stand in them."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The settings, as they are saved."""

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        *,
        tokenize: bool = False,
        return_dict: bool = True,
        **options: Any,
    ) -> Any:
        """The conversation as text, or with `tokenize` encoded with the clips and pictures that stand in its parts.

        Args:
            conversation: messages with `role` and `content`; or a list of such conversations.
            chat_template: instead of the processor's own.
            tokenize: encode it; parts of type "video" and "image" then hold the frames and the picture under their
                type.
            return_dict: whether everything is returned, or the token ids alone.
            options: `add_generation_prompt`, and those of calling the processor.
        """
        prompt = options.pop("add_generation_prompt", False)
        template = chat_template or self.chat_template
        text = self.tokenizer.apply_chat_template(
            conversation, chat_template=template, tokenize=False, add_generation_prompt=prompt
        )
        if not tokenize:
            return text
        several = bool(conversation) and isinstance(conversation[0], (list, tuple))
        messages = list(itertools.chain.from_iterable(conversation)) if several else conversation
        parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
        held = {kind: [part[kind] for part in parts if part["type"] == kind] for kind in ("image", "video")}
        options = {**self.template_options, **options}
        encoded = self(text=text, images=held["image"] or None, videos=held["video"] or None, **options)
        return encoded if return_dict else encoded["input_ids"]

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """As the tokenizer."""
        found: list[str] = self.tokenizer.batch_decode(*args, **kwargs)
        return found

    def decode(self, *args: Any, **kwargs: Any) -> str:
        """As the tokenizer."""
        found: str = self.tokenizer.decode(*args, **kwargs)
        return found

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        """Write the tokenizer, the chat template and the settings into a folder."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        before, self.tokenizer.chat_template = self.tokenizer.chat_template, self.chat_template
        try:
            self.tokenizer.save_pretrained(folder)
        finally:
            self.tokenizer.chat_template = before
        (folder / SETTINGS).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
