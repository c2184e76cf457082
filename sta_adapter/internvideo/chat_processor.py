"""What the processors of both chat models share: the chat template, decoding, saving."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, cast

from sta_adapter.errors import DataError
from sta_adapter.internvideo.visuals import Frames, Picture

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import BatchFeature, PreTrainedTokenizerBase

Conversation: TypeAlias = list[dict[str, Any]]
"""Messages with `role` and `content`, a text or parts."""
SETTINGS = "preprocessor_config.json"


class ChatProcessor(ABC):
    """A processor with a tokenizer and a chat template; a subclass encodes texts, clips and pictures."""

    tokenizer: PreTrainedTokenizerBase
    chat_template: str
    image_token: str
    video_token: str
    template_options: ClassVar[dict[str, object]] = {}  # for calls on what the template has written

    @abstractmethod
    def __call__(
        self,
        images: Sequence[Picture] | None = None,
        text: str | Sequence[str] | None = None,
        videos: Sequence[Frames] | None = None,
        **options: Any,
    ) -> BatchFeature:
        """Encode texts with the clips and pictures whose placeholders stand in them."""

    def _texts(
        self,
        text: str | Sequence[str] | None,
        return_tensors: str | None,
        pictures: Sequence[Picture],
        clips: Sequence[Frames],
    ) -> list[str]:
        """The texts, if they have a placeholder for each picture and clip."""
        if text is None or return_tensors not in ("pt", None):
            raise DataError(f"text is {text!r} and return_tensors {return_tensors!r}; expected a text, and 'pt'.")
        texts = [text] if isinstance(text, str) else list(text)
        images, videos = (sum(one.count(token) for one in texts) for token in (self.image_token, self.video_token))
        if (images, videos) != (len(pictures), len(clips)):
            raise DataError(
                f"the text has {images} times {self.image_token} and {videos} times {self.video_token}, and there are "
                f"{len(pictures)} pictures and {len(clips)} clips; expected one for each. Either one is missing, or the text "
                "contains these words itself."
            )
        return texts

    @abstractmethod
    def to_dict(self) -> dict[str, object]:
        """The settings, as they are saved."""

    def apply_chat_template(
        self,
        conversation: Conversation | list[Conversation],
        chat_template: str | None = None,
        *,
        tokenize: bool = False,
        return_dict: bool = True,
        add_generation_prompt: bool = False,
        **options: object,
    ) -> str | list[str] | BatchFeature | Tensor:
        """The conversation as text, or with `tokenize` encoded with the clips and pictures that stand in its parts.

        Args:
            conversation: messages with `role` and `content`; or a list of such conversations.
            chat_template: instead of the processor's own.
            tokenize: encode it; parts of type "video" and "image" then hold the frames and the picture under their
                type.
            return_dict: whether everything is returned, or the token ids alone.
            add_generation_prompt: whether the text ends where an answer begins.
            options: of calling the processor.
        """
        template = chat_template or self.chat_template
        written = self.tokenizer.apply_chat_template(
            conversation, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        text = cast("str | list[str]", written)  # as nothing is tokenized
        if not tokenize:
            return text
        messages = [message for one in conversation for message in ([one] if isinstance(one, dict) else one)]
        parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
        held = {kind: [part[kind] for part in parts if part["type"] == kind] for kind in ("image", "video")}
        options = {**self.template_options, **options}
        encoded = self(text=text, images=held["image"] or None, videos=held["video"] or None, **options)
        return encoded if return_dict else encoded["input_ids"]

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """As the tokenizer."""
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> str | list[str]:
        """As the tokenizer."""
        return self.tokenizer.decode(*args, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: object) -> None:
        """Write the tokenizer, the chat template and the settings into a folder."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        before, self.tokenizer.chat_template = self.tokenizer.chat_template, self.chat_template
        try:
            self.tokenizer.save_pretrained(folder)
        finally:
            self.tokenizer.chat_template = before
        (folder / SETTINGS).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
