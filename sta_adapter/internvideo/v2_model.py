"""InternVideo2-Chat, put together from transformers' parts: video encoder, Q-Former (InstructBLIP's), Mistral.

Numbers made by the published code prove that it computes the same: `tests/test_internvideo2_chat.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import LongTensor, Tensor, nn
from transformers import InstructBlipQFormerModel, MistralForCausalLM, PreTrainedModel

from sta_adapter.data.clip_batches import missing_frames
from sta_adapter.errors import DataError
from sta_adapter.internvideo.v2_config import InternVideo2ChatConfig
from sta_adapter.internvideo.v2_encoder import InternVideo2Encoder
from sta_adapter.internvideo.v2_prompt import IMAGE, VIDEO, conversation, prompt_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from transformers.generation.utils import GenerateOutput
    from transformers.modeling_outputs import CausalLMOutputWithPast

LAYER_NORM_EPS = 1e-12


class InternVideo2Chat(PreTrainedModel):
    """A language model that reads each clip and each picture as as many tokens as the Q-Former has queries."""

    config_class = InternVideo2ChatConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: InternVideo2ChatConfig) -> None:
        super().__init__(config)
        encoder, qformer = config.encoder(), config.qformer()
        self.vision_encoder = InternVideo2Encoder(encoder)
        self.vision_layernorm = nn.LayerNorm(encoder.embed_dim, eps=LAYER_NORM_EPS)
        self.qformer = InstructBlipQFormerModel(qformer)
        self.query_tokens = nn.Parameter(torch.randn(1, config.num_query_token, qformer.hidden_size) * 0.02)
        self.extra_query_tokens = nn.Parameter(torch.zeros(1, config.extra_num_query_token, qformer.hidden_size))
        self.project_up = nn.Linear(qformer.hidden_size, config.text_config.hidden_size)
        self.lm = MistralForCausalLM(config.text_config)
        self.generation_config = self.lm.generation_config

    def _init_weights(self, module: nn.Module) -> None:
        """Each part initialises itself."""

    def get_input_embeddings(self) -> nn.Module:
        """The language model's."""
        return self.lm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put others in their place."""
        self.lm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The language model's."""
        found: nn.Module = self.lm.get_output_embeddings()
        return found

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        pixel_values: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
        **kwargs: object,
    ) -> CausalLMOutputWithPast:
        """The language model's output: `logits` (B, L, V), `loss` if there are `labels`.

        Args:
            input_ids: (B, L), with a placeholder for each token of each clip and picture.
            attention_mask: (B, L).
            pixel_values_videos: clips (n, T, 3, H, W) in the order of their placeholders, normalised; shorter ones are
                filled up with frames of NaN.
            pixel_values: pictures (n, 3, H, W), likewise.
            inputs_embeds: (B, L, C) instead of `input_ids` and pixels.
            qformer_input_ids: tokens (1 or n, L') of an instruction that the Q-Former reads as well.
            qformer_attention_mask: of these.
            kwargs: what Mistral takes.

        Raises:
            DataError: placeholders and pixels don't go together.
        """
        if inputs_embeds is None:
            text = (qformer_input_ids, qformer_attention_mask)
            inputs_embeds = self.embed(input_ids, pixel_values_videos, pixel_values, text)
        found: CausalLMOutputWithPast = self.lm(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)
        return found

    def embed(
        self,
        input_ids: Tensor | None,
        pixel_values_videos: Tensor | None = None,
        pixel_values: Tensor | None = None,
        instruction: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> Tensor:
        """Embeddings (B, L, C) of text, clips and pictures; arguments and errors are those of `forward`."""
        if input_ids is None:
            raise DataError("neither input_ids nor inputs_embeds were given; expected one of them.")
        config = self.config
        seen = (
            ("clips", config.video_token_id, pixel_values_videos),
            ("pictures", config.image_token_id, None if pixel_values is None else pixel_values.unsqueeze(1)),
        )
        visual = (input_ids == config.video_token_id) | (input_ids == config.image_token_id)
        embeddings: Tensor = self.get_input_embeddings()(input_ids.masked_fill(visual, 0))
        for kind, token, pixels in seen:
            places = input_ids == token
            found = 0 if pixels is None else len(pixels)
            if int(places.sum()) != found * config.num_visual_tokens:
                raise DataError(
                    f"{int(places.sum())} placeholders of {kind} and {found} {kind} were given; expected "
                    f"{config.num_visual_tokens} for each. Make both with the processor of this model."
                )
            if pixels is not None and found:
                features = self.encode(pixels, *instruction).to(embeddings.dtype)
                embeddings = embeddings.masked_scatter(places[..., None], features)
        return embeddings

    def encode(
        self, clips: Tensor, qformer_input_ids: Tensor | None = None, qformer_attention_mask: Tensor | None = None
    ) -> Tensor:
        """What the language model reads of clips (n, T, 3, H, W), pictures with T = 1: (n, queries, C)."""
        if clips.dim() != 5 or clips.shape[2] != 3:
            raise DataError(
                f"clips have the shape {tuple(clips.shape)}; expected (clips, frames, 3, height, width) of pixel_values_videos, "
                "or (pictures, 3, height, width) of pixel_values."
            )
        lengths = (~missing_frames(clips)).sum(1).tolist()
        if 0 in lengths:
            raise DataError(f"clips have {lengths} frames; expected at least one of each.")
        features: list[Tensor | None] = [None] * len(clips)
        for frames in sorted(set(lengths)):  # a forward for each length: a row of the encoder is a whole clip
            rows = [row for row, length in enumerate(lengths) if length == frames]
            text = [_rows(tensor, rows) for tensor in (qformer_input_ids, qformer_attention_mask)]
            for row, feature in zip(rows, self._encode(clips[rows, :frames], *text), strict=True):
                features[row] = feature
        return torch.stack([feature for feature in features if feature is not None])

    def _encode(self, clips: Tensor, input_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor:
        """Clips (n, T, 3, H, W) of as many frames each."""
        tokens = self.vision_layernorm(self.vision_encoder(clips.transpose(1, 2)))
        queries = torch.cat([self.query_tokens, self.extra_query_tokens], dim=1).expand(len(clips), -1, -1)
        count, mask = queries.shape[1], None
        if input_ids is not None:
            given = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            mask = torch.cat([given.new_ones(len(clips), count), given], dim=1)
        out = self.qformer(input_ids=input_ids, attention_mask=mask, query_embeds=queries, encoder_hidden_states=tokens)
        found: Tensor = self.project_up(out.last_hidden_state[:, :count])
        return found

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        pixel_values: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
        **options: object,
    ) -> GenerateOutput | Tensor:
        """What the language model writes: `input_ids` and the new tokens (B, L + new), of `inputs_embeds` the new ones alone.

        Arguments as for `forward`, and those of transformers' `generate`.
        """
        if inputs_embeds is None:
            text = (qformer_input_ids, qformer_attention_mask)
            inputs_embeds = self.embed(input_ids, pixel_values_videos, pixel_values, text)
        if attention_mask is None:
            attention_mask = torch.ones(inputs_embeds.shape[:2], dtype=torch.long, device=inputs_embeds.device)
        self.lm.generation_config = self.generation_config
        out: GenerateOutput | Tensor = self.lm.generate(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, **options
        )
        if input_ids is None:
            return out
        if isinstance(out, Tensor):
            return _behind(input_ids, out)
        out.sequences = cast(LongTensor, _behind(input_ids, out.sequences))
        return out

    def chat(
        self,
        tokenizer: PreTrainedTokenizerBase,
        msg: str,
        user_prompt: str,
        media_type: str,
        media_tensor: Tensor,
        instruction: str | None = None,
        chat_history: Sequence[tuple[str, str]] = (),
        return_history: bool = False,
        generation_config: Mapping[str, object] | None = None,
        qformer_tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> str | tuple[str, list[tuple[str, str]]]:
        """An answer, by the published call.

        Args:
            tokenizer: the language model's.
            msg: text behind the clip, such as at which seconds its frames were taken.
            user_prompt: the question.
            media_type: "video" or "image".
            media_tensor: a clip (T, 3, H, W); with the HD variant's tiles (1, tiles, T, 3, H, W). A picture (1, 3, H,
                W), or several (n, 1, 3, H, W).
            instruction: text in front of all.
            chat_history: questions and answers before.
            return_history: give the history with this answer as well.
            generation_config: options of `generate`; by default it samples up to 200 tokens, as published.
            qformer_tokenizer: of bert-base-uncased; with it the Q-Former reads the instruction too, as in the HD
                variant.

        Returns:
            The answer, or (answer, history).

        Raises:
            DataError: the tensor is of another shape, or an instruction for the Q-Former can't be tokenized.
        """
        clips = _clips(media_type, media_tensor.to(self.device))
        places = [IMAGE if media_type == "image" else VIDEO] * len(clips)
        text = conversation(
            user_prompt, places, message=msg, instruction=instruction or "", history=tuple(chat_history)
        )
        config = cast(InternVideo2ChatConfig, self.config)
        ids = torch.tensor([prompt_tokens(tokenizer, text, config)], device=self.device)
        pixels = {"pixel_values": clips[:, 0]} if media_type == "image" else {"pixel_values_videos": clips}
        read: dict[str, Tensor] = {}
        if instruction and qformer_tokenizer is not None:
            told = qformer_tokenizer(instruction, truncation=True, max_length=512, return_tensors="pt").to(self.device)
            read = {"qformer_input_ids": told["input_ids"], "qformer_attention_mask": told["attention_mask"]}
        options: dict[str, Any] = {
            "max_new_tokens": 200,
            "do_sample": True,
            "min_length": 1,
            **(generation_config or {}),
        }
        if options["do_sample"]:
            options.setdefault("top_p", 0.9)
        out = self.generate(input_ids=ids, **pixels, **read, **options)
        answer = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)[0]
        return (answer, [*chat_history, (user_prompt, answer)]) if return_history else answer


def _rows(tensor: Tensor | None, rows: Sequence[int]) -> Tensor | None:
    """The rows of those clips, or the only one for each of them."""
    if tensor is None:
        return None
    return tensor.expand(len(rows), -1) if len(tensor) == 1 else tensor[list(rows)]


def _behind(prompts: Tensor, new: Tensor) -> Tensor:
    """New tokens (B * n, L') behind their prompts (B, L)."""
    return torch.cat([prompts.repeat_interleave(len(new) // len(prompts), dim=0), new], dim=1)


def _clips(kind: str, tensor: Tensor) -> Tensor:
    """Clips (n, T, 3, H, W), of pictures with T = 1."""
    shape = tuple(tensor.shape)
    if kind == "video" and tensor.dim() in (4, 6):
        clips = tensor[None] if tensor.dim() == 4 else tensor.flatten(0, 1)
    elif kind == "image" and tensor.dim() in (4, 5):
        clips = tensor[None] if tensor.dim() == 4 else tensor
    else:
        raise DataError(
            f"media_type is {kind!r} and media_tensor of the shape {shape}; expected 'video' with (frames, 3, height, width) or "
            "(1, tiles, frames, 3, height, width), or 'image' with (1, 3, height, width) or (pictures, 1, 3, height, width)."
        )
    if clips.shape[2] != 3 or (kind == "image" and clips.shape[1] != 1):
        raise DataError(
            f"media_tensor is of the shape {shape}; expected {'one frame a picture and ' if kind == 'image' else ''}three "
            "channels in front of height and width."
        )
    return clips
