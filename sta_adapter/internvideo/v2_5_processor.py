"""What InternVideo2.5-Chat reads: a processor in transformers' manner, of a conversation with clips and pictures to tensors."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeVar

import torch
from torch import Tensor
from transformers import BatchFeature

from sta_adapter.errors import CheckpointError, DataError
from sta_adapter.internvideo.chat_processor import SETTINGS, ChatProcessor
from sta_adapter.internvideo.internlm2_tokenizer import load_tokenizer
from sta_adapter.internvideo.v2_5_config import read_config
from sta_adapter.internvideo.v2_5_images import InternVideo2_5ImageProcessor
from sta_adapter.internvideo.v2_5_prompt import IMAGE, IMAGE_TOKEN, VIDEO, frames_prefix, image_tokens
from sta_adapter.internvideo.v2_5_prompt import chat_template as written_template
from sta_adapter.internvideo.visuals import Frames, Picture
from sta_adapter.internvideo.weights import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAME = "InternVideo2_5Processor"
T = TypeVar("T")
PLACES = re.compile(f"{re.escape(IMAGE)}|{re.escape(VIDEO)}")


class InternVideo2_5Processor(ChatProcessor):
    """Tokens and rows of pixels of conversations; a frame and a tile of a picture are rows of the same size.

    A clip is written as in training, a line for each frame: `Frame1: <img>...</img>`. Clips and pictures are filled up
    to whole groups of rows, whose tokens the model merges.

    Attributes:
        tokenizer: the model's.
        image_processor: what makes rows.
        chat_template: Jinja; parts of type "video" and "image" are clips and pictures.
        image_seq_length: visual tokens of a row.
    """

    image_token, video_token = IMAGE, VIDEO
    text_placeholders = True
    template_options: ClassVar[dict[str, object]] = {"add_special_tokens": False}  # the template writes them
    model_input_names = ("input_ids", "attention_mask", "pixel_values", "clip_lengths")

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: InternVideo2_5ImageProcessor,
        *,
        image_seq_length: int = 16,
        template: str = "internvl2_5",
        chat_template: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.image_seq_length = image_seq_length
        self.template = template
        self.chat_template = chat_template or written_template(template, tokenizer.bos_token or "")
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        if self.image_token_id in (None, tokenizer.unk_token_id):
            raise CheckpointError(
                f"the tokenizer has no token {IMAGE_TOKEN}; expected InternVideo2.5-Chat's own, with its added tokens "
                "(tokenizer_config.json or added_tokens.json)."
            )

    def __call__(
        self,
        images: Sequence[Picture] | None = None,
        text: str | Sequence[str] | None = None,
        videos: Sequence[Frames] | None = None,
        *,
        add_special_tokens: bool | None = None,
        return_tensors: str | None = "pt",
        padding: bool | str = True,
        **options: object,
    ) -> BatchFeature:
        """Encode texts with their clips and pictures.

        Args:
            images: all pictures of the texts, in order.
            text: one or several, with `<image>` for each picture and `<video>` for each clip.
            videos: all clips of the texts, in order, (T, H, W, 3) or (T, 3, H, W) uint8 each.
            add_special_tokens: whether the token in front of every conversation is added; None adds it where the text
                has none.
            return_tensors: "pt", the only kind.
            padding: as for the tokenizer; False takes one text.
            options: of the tokenizer; `videos_kwargs` and `images_kwargs` hold nothing that matters here.

        Returns:
            `input_ids` and `attention_mask` (B, L); with clips or pictures `pixel_values` (F, 3, size, size), and
            `clip_lengths`, the rows of each clip and 1 for each tile of a picture.

        Raises:
            DataError: texts, clips and pictures don't go together.
        """
        for name in ("videos_kwargs", "images_kwargs"):
            options.pop(name, None)
        pictures, clips = _listed(images), _listed(videos)
        texts = self._texts(text, return_tensors, pictures, clips)
        next_picture, next_clip = iter(pictures), iter(clips)
        rows: list[Tensor] = []
        lengths: list[int] = []

        def written(place: re.Match[str]) -> str:
            of_clip, rows_of = place[0] == VIDEO, self.image_processor
            made = rows_of.clip(next(next_clip)) if of_clip else rows_of.picture(next(next_picture))
            rows.append(made)
            lengths.extend([len(made)] if of_clip else [1] * len(made))
            tokens = self.image_seq_length
            return frames_prefix(len(made), tokens) if of_clip else image_tokens(tokens * len(made))

        whole, bos = [PLACES.sub(written, one) for one in texts], self.tokenizer.bos_token
        if add_special_tokens is None:
            add_special_tokens = not (bos and all(one.startswith(bos) for one in whole))
        options |= {"add_special_tokens": add_special_tokens, "padding": padding, "return_tensors": "pt"}
        inputs = dict(self.tokenizer(whole, **options))
        if rows:
            inputs |= {"pixel_values": torch.cat(rows), "clip_lengths": torch.tensor(lengths)}
        return BatchFeature(inputs)

    def to_dict(self) -> dict[str, object]:
        """The settings, as they are saved."""
        own = {"processor_class": NAME, "image_seq_length": self.image_seq_length, "template": self.template}
        return {**own, "image_processor": self.image_processor.to_dict()}

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike[str], config: Mapping[str, object] | None = None
    ) -> InternVideo2_5Processor:
        """The processor of a folder with published files, or of one that `save_pretrained` wrote.

        `config` is the contents of the model's `config.json`; None reads it from the folder.

        Raises:
            CheckpointError: the tokenizer's files are missing or damaged, or the settings of both are.
        """
        folder = Path(folder)
        saved = read_json(folder / SETTINGS)
        if saved.get("processor_class") == NAME:
            tokenizer = load_tokenizer(folder)
            told = {key: value for key, value in saved["image_processor"].items() if key != "image_processor_type"}
            kept = {key: saved[key] for key in ("image_seq_length", "template")}
            return cls(tokenizer, InternVideo2_5ImageProcessor(**told), chat_template=tokenizer.chat_template, **kept)
        found = read_config(read_json(folder / "config.json") if config is None else config)
        rows = InternVideo2_5ImageProcessor(
            found.vision_config.image_size,
            found.min_dynamic_patch,
            found.max_dynamic_patch,
            found.use_thumbnail,
            found.local_num_frames,
        )
        per_row = found.num_tome_tokens // found.local_num_frames
        return cls(load_tokenizer(folder), rows, image_seq_length=per_row, template=found.template)


def _listed(given: Sequence[T] | None) -> list[T]:
    """Pictures or clips as a list; one array of a single clip or picture is none."""
    if given is None:
        return []
    if not isinstance(given, (list, tuple)):
        raise DataError(f"pictures and clips come as a list of them; found a {type(given).__name__}.")
    return list(given)
