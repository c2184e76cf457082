"""What InternVideo2-Chat reads: a processor in transformers' manner, of a conversation with clips and pictures to tensors."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, BatchFeature, MistralConfig, PreTrainedTokenizerBase

from sta_adapter._validate import one_line
from sta_adapter.adapter.base_model import CACHED
from sta_adapter.data.collator import padded
from sta_adapter.errors import CheckpointError, DataError
from sta_adapter.internvideo.chat_processor import SETTINGS, ChatProcessor
from sta_adapter.internvideo.v2_config import InternVideo2ChatConfig
from sta_adapter.internvideo.v2_images import InternVideo2ImageProcessor
from sta_adapter.internvideo.v2_prompt import CHAT_TEMPLATE, IMAGE, VIDEO, prompt_tokens
from sta_adapter.internvideo.visuals import Frames, Picture
from sta_adapter.internvideo.weights import read_json

NAME = "InternVideo2ChatProcessor"
HD_TILES = (2, 1)
"""Columns and rows of tiles that the HD variant was published with, whatever the picture's shape."""
FRAMES = 8
"""Frames that a clip was published with."""
PLACES = re.compile(
    f"<(Image|Video)>(?:{re.escape(IMAGE)}|{re.escape(VIDEO)})</\\1>|{re.escape(IMAGE)}|{re.escape(VIDEO)}"
)
BERT_FOLDERS = ("bert-base-uncased", "bert")


class InternVideo2ChatProcessor(ChatProcessor):
    """Tokens and clips of conversations.

    Attributes:
        tokenizer: the language model's.
        image_processor: what makes pixels; its `tiles` are set for the HD variant.
        qformer_tokenizer: of bert-base-uncased, for instructions that the Q-Former reads; None where there is none.
        chat_template: Jinja; parts of type "video" and "image" are clips and pictures.
        num_visual_tokens: of each clip and picture.
        image_token_id: stands for each token of a picture.
        video_token_id: stands for each token of a clip.
        num_frames: of a clip, as published.
    """

    image_token, video_token = IMAGE, VIDEO
    model_input_names = ("input_ids", "attention_mask", "pixel_values_videos", "pixel_values")

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: InternVideo2ImageProcessor,
        *,
        num_visual_tokens: int,
        image_token_id: int,
        video_token_id: int,
        num_frames: int = FRAMES,
        qformer_tokenizer: PreTrainedTokenizerBase | None = None,
        chat_template: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        # for who counts them in a text; ids of our own stand for them
        tokenizer.add_tokens([IMAGE, VIDEO], special_tokens=True)
        self.image_processor = image_processor
        self.qformer_tokenizer = qformer_tokenizer
        self.num_visual_tokens = num_visual_tokens
        self.image_token_id = image_token_id
        self.video_token_id = video_token_id
        self.num_frames = num_frames
        self.chat_template = chat_template or CHAT_TEMPLATE

    def __call__(
        self,
        images: Sequence[Picture] | None = None,
        text: str | Sequence[str] | None = None,
        videos: Sequence[Frames] | None = None,
        *,
        instruction: str | None = None,
        add_special_tokens: bool = True,
        return_tensors: str | None = "pt",
        padding: bool | str = True,
        **options: object,
    ) -> BatchFeature:
        """Encode texts with their clips and pictures.

        Args:
            images: all pictures of the texts, in order.
            text: one or several, with `[<IMG_PLH>]` for each picture and `[<VID_PLH>]` for each clip.
            videos: all clips of the texts, in order, (T, H, W, 3) or (T, 3, H, W) uint8 each.
            instruction: what the Q-Former reads along with each clip, as the HD variant's `chat` gives it.
            add_special_tokens: whether a text begins with the token for that also where it has none, as one that goes on.
            return_tensors: "pt", the only kind.
            padding: of texts of unequal lengths, on the tokenizer's `padding_side`; False takes one text.
            options: `videos_kwargs` and `images_kwargs`, neither of which matters here.

        Returns:
            `input_ids` and `attention_mask` (B, L); `pixel_values_videos` (n, T, 3, size, size), shorter clips filled
            up with frames of NaN; `pixel_values` (n, 3, size, size); with an instruction `qformer_input_ids` and its
            mask.

        Raises:
            DataError: texts, clips and pictures don't go together.
        """
        if unknown := options.keys() - {"videos_kwargs", "images_kwargs"}:
            raise DataError(f"{', '.join(sorted(unknown))} has no effect here; leave it out.")
        pictures, clips = list(() if images is None else images), list(() if videos is None else videos)
        texts = self._texts(text, return_tensors, pictures, clips)
        repeated = [PLACES.sub(lambda found: found[0] * self.image_processor.per_clip, one) for one in texts]
        rows = [torch.tensor(prompt_tokens(self.tokenizer, one, self, begins=add_special_tokens)) for one in repeated]
        if padding is False and len({len(row) for row in rows}) > 1:
            raise DataError(f"texts have {sorted({len(row) for row in rows})} tokens; expected padding=True for these.")
        side = self.tokenizer.padding_side
        inputs = {
            "input_ids": padded(rows, self.tokenizer.pad_token_id, side),
            "attention_mask": padded([torch.ones_like(row) for row in rows], 0, side),
            **self.image_processor.preprocess(pictures, clips),
        }
        if instruction:
            inputs |= self._instruction(instruction)
        return BatchFeature(inputs)

    def _instruction(self, instruction: str) -> dict[str, Tensor]:
        if self.qformer_tokenizer is None:
            raise DataError(
                "an instruction for the Q-Former needs the tokenizer of bert-base-uncased; put its files into the model's folder as "
                "bert-base-uncased/, or set processor.qformer_tokenizer."
            )
        told = self.qformer_tokenizer(instruction, truncation=True, max_length=512, return_tensors="pt")
        return {"qformer_input_ids": told["input_ids"], "qformer_attention_mask": told["attention_mask"]}

    def to_dict(self) -> dict[str, object]:
        """The settings, as they are saved."""
        kept = {
            key: getattr(self, key) for key in ("num_visual_tokens", "image_token_id", "video_token_id", "num_frames")
        }
        return {"processor_class": NAME, **kept, "image_processor": self.image_processor.to_dict()}

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: object) -> None:
        """As for any chat processor, with the Q-Former's tokenizer, if there is one."""
        super().save_pretrained(save_directory)
        if self.qformer_tokenizer is not None:
            self.qformer_tokenizer.save_pretrained(Path(save_directory) / BERT_FOLDERS[0])

    @classmethod
    def of_folder(cls, folder: Path, config: InternVideo2ChatConfig, name: str) -> InternVideo2ChatProcessor:
        """The processor of a folder with published files, or of one that `save_pretrained` wrote.

        `name` is what the model is called, also its path in the Hub's cache; one that ends in "HD" is the HD variant, whose
        configuration is the same.

        Raises:
            CheckpointError: the tokenizer's files are missing or damaged.
        """
        tokenizer, saved = _tokenizer(folder), read_json(folder / SETTINGS)
        berts = [folder / bert for bert in BERT_FOLDERS if (folder / bert).is_dir()]
        bert = _tokenizer(berts[0]) if berts else None
        if saved.get("processor_class") == NAME:
            told = {key: value for key, value in saved["image_processor"].items() if key != "image_processor_type"}
            kept = {key: value for key, value in saved.items() if key not in ("processor_class", "image_processor")}
            own = {"qformer_tokenizer": bert, "chat_template": tokenizer.chat_template}
            return cls(tokenizer, InternVideo2ImageProcessor(**told), **own, **kept)
        cached = CACHED.search(name)
        tiles = HD_TILES if (cached[2] if cached else name.rstrip("/")).upper().endswith("HD") else None
        return cls(
            tokenizer,
            InternVideo2ImageProcessor(config.vision_config["img_size"], tiles),
            num_visual_tokens=config.num_visual_tokens,
            image_token_id=config.image_token_id,
            video_token_id=config.video_token_id,
            qformer_tokenizer=bert,
        )


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        # the configuration spares a look at config.json, which names code of its own
        return AutoTokenizer.from_pretrained(folder, config=MistralConfig(), trust_remote_code=False)
    except Exception as error:  # whatever the releases of transformers and tokenizers raise
        held = (
            ", ".join(sorted(path.name for path in folder.iterdir() if "token" in path.name))
            or "no file of a tokenizer"
        )
        raise CheckpointError(
            f"the tokenizer in {folder} can't be loaded ({one_line(error)}); the folder holds "
            f"{held}, expected tokenizer.json, or tokenizer.model with the package sentencepiece, and tokenizer_config.json. "
            "InternVideo2-Chat's is that of mistralai/Mistral-7B-Instruct-v0.3."
        ) from error
