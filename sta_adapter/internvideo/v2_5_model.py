"""InternVideo2.5-Chat put together: InternViT, HiCo's token merging, and InternLM2 as transformers' Llama.

The same numbers as the published code (OpenGVLab/InternVideo2_5_Chat_8B), without running it, on every release of
transformers. What differs is said at `generate` and where the published code would compute something that nobody can
mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, LlamaForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from sta_adapter.errors import LayoutError
from sta_adapter.internvideo.v2_5_chat import ChatMethods
from sta_adapter.internvideo.v2_5_config import InternVideo2_5Config
from sta_adapter.internvideo.v2_5_vision import InternVisionModel, merge_tokens

if TYPE_CHECKING:
    from transformers import GenerationConfig
    from transformers.generation.utils import GenerateOutput


class InternVideo2_5ForConditionalGeneration(ChatMethods, PreTrainedModel, GenerationMixin):
    """The chat model: rows of pixels, frames or tiles, become visual tokens in a Llama's prompt.

    Rows are merged in groups of `config.local_num_frames`, so that clips, and pictures with their tiles, come in
    multiples of it; the processor fills them up.
    """

    config_class = InternVideo2_5Config
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _no_split_modules = ["InternVisionEncoderLayer", "LlamaDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flash_attn_2 = True

    def __init__(self, config: InternVideo2_5Config) -> None:
        super().__init__(config)
        self.vision_model = InternVisionModel(config.vision_config)
        self.language_model = LlamaForCausalLM(config.text_config)
        wide = config.vision_config.hidden_size * int(1 / config.downsample_ratio) ** 2
        width = config.text_config.hidden_size
        self.mlp1 = nn.Sequential(nn.LayerNorm(wide), nn.Linear(wide, width), nn.GELU(), nn.Linear(width, width))
        self.num_image_token = config.num_tome_tokens // config.local_num_frames
        self.post_init()

    @property
    def img_context_token_id(self) -> int | None:
        """Id of the token that stands for a visual one."""
        found: int | None = self.config.image_token_id
        return found

    @img_context_token_id.setter
    def img_context_token_id(self, value: int | None) -> None:
        self.config.image_token_id = value

    def get_input_embeddings(self) -> nn.Module:
        """Of the language model."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Of the language model."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Of the language model."""
        found: nn.Module = self.language_model.get_output_embeddings()
        return found

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Of the language model."""
        self.language_model.set_output_embeddings(new_embeddings)

    def extract_feature(self, pixel_values: Tensor) -> Tensor:
        """Visual tokens (F, num_image_token, C) of rows (F, 3, H, W), merged over each `local_num_frames` of them.

        Raises:
            LayoutError: F is not a multiple of that, or the rows are of another shape.
        """
        config = self.config
        if len(pixel_values) % config.local_num_frames:
            raise LayoutError(
                f"{len(pixel_values)} rows of pixels: tokens of {config.local_num_frames} rows are merged at a time. Fill up "
                "each clip with its last frame, and each picture with its last tile, as the processor does."
            )
        last = config.select_layer == -1
        output = self.vision_model(pixel_values=pixel_values, output_hidden_states=not last)
        states = output.last_hidden_state if last else output.hidden_states[config.select_layer]
        tokens = fold_patches(states[:, 1:], config.downsample_ratio, turned=config.ps_version == "v1")
        groups = tokens.reshape(len(tokens) // config.local_num_frames, -1, tokens.shape[-1])
        merged = merge_tokens(groups, config.num_tome_tokens, config.text_config.num_attention_heads)
        found: Tensor = self.mlp1(merged.reshape(len(tokens), -1, merged.shape[-1]))
        return found

    def embed(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None,
        image_flags: Tensor | None = None,
        visual_features: Tensor | None = None,
        clip_lengths: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        """Embeddings (B, L, C) of a prompt with the visual tokens in their places; arguments as for `forward`.

        Raises:
            LayoutError: their number is not that of their places, or a clip doesn't end where a merged group of rows ends.
        """
        embeddings: Tensor = self.get_input_embeddings()(input_ids)
        if visual_features is None and pixel_values is None:
            return embeddings
        token = self.config.image_token_id
        if token is None:
            raise LayoutError(
                "which token stands for a visual one isn't known; set model.img_context_token_id = "
                "tokenizer.convert_tokens_to_ids('<IMG_CONTEXT>')."
            )
        if clip_lengths is not None:
            require_whole_groups(clip_lengths, self.config.local_num_frames)
        features = visual_features
        if features is None:
            features = self.extract_feature(cast(Tensor, pixel_values))
        if image_flags is not None:
            features = features[image_flags.flatten() == 1]
        places = input_ids == token
        features = features.reshape(-1, features.shape[-1]).to(embeddings)
        if int(places.sum()) != len(features):
            raise LayoutError(
                f"the prompts have {int(places.sum())} places for visual tokens, and the rows of pixels give {len(features)}: "
                f"{self.num_image_token} a row. Write {self.num_image_token} of the token {token} for each frame or tile."
            )
        return embeddings.masked_scatter(places[..., None].expand_as(embeddings), features)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        image_flags: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        visual_features: Tensor | None = None,
        clip_lengths: Tensor | Sequence[int] | None = None,
        logits_to_keep: int | Tensor = 0,
        **options: object,
    ) -> CausalLMOutputWithPast:
        """Logits (B, L, V), and the loss with `labels` (B, L).

        Args:
            pixel_values: (F, 3, H, W), the rows of all samples one after the other.
            input_ids: (B, L), with `num_image_token` image tokens for each row.
            attention_mask: (B, L), 0 where a row is filled up.
            position_ids: (B, L).
            image_flags: (F,) or (F, 1): 0 for rows that no token stands for; their features are left out.
            inputs_embeds: (B, L, C), in the place of `input_ids` and `pixel_values`.
            visual_features: of `extract_feature`, in the place of `pixel_values`.
            clip_lengths: rows of each clip, 1 for a tile of a picture; for STA, and checked against the merging.
            logits_to_keep: how many of the last logits are computed; 0 for all.
            options: further arguments of `LlamaForCausalLM`, such as `labels` and the cache.

        Raises:
            LayoutError: pixels, tokens and clips don't go together.
        """
        if inputs_embeds is None:
            if input_ids is None:
                raise LayoutError("neither input_ids nor inputs_embeds were given.")
            inputs_embeds = self.embed(input_ids, pixel_values, image_flags, visual_features, clip_lengths=clip_lengths)
        if logits_to_keep is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            options[KEPT_LOGITS] = logits_to_keep
        found: CausalLMOutputWithPast = self.language_model(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, position_ids=position_ids, **options
        )
        return found

    @torch.no_grad()
    def generate(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        visual_features: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        clip_lengths: Tensor | Sequence[int] | None = None,
        image_flags: Tensor | None = None,
        **options: object,
    ) -> GenerateOutput | Tensor:
        """Token ids (B, L + new), the prompt in front, as transformers' models give them; the published code leaves it out.

        Arguments and errors are those of `forward`, with prompts filled up on the left, and of transformers' `generate`.
        """
        if input_ids is None:
            raise LayoutError("generate needs input_ids, the prompt's tokens; found none.")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        embeddings = self.embed(input_ids, pixel_values, image_flags, visual_features, clip_lengths=clip_lengths)
        self.language_model.generation_config = self.generation_config
        if generation_config is not None:
            options["generation_config"] = generation_config
        out: GenerateOutput | Tensor = self.language_model.generate(
            input_ids=input_ids, inputs_embeds=embeddings, attention_mask=attention_mask, **options
        )
        return out


def fold_patches(tokens: Tensor, ratio: float, *, turned: bool) -> Tensor:
    """Neighbouring patches (F, N, C) of a square put side by side in the features: (F, N * ratio**2, C / ratio**2).

    `turned`: whether rows and columns change places in the result, as in the first release of InternVL.
    """
    side, step = round(tokens.shape[1] ** 0.5), round(1 / ratio)
    if side**2 != tokens.shape[1] or side % step:
        raise LayoutError(
            f"a row has {tokens.shape[1]} patches; expected a square whose side is a multiple of {step}. Bring frames to the "
            "size of the configuration, as the processor does."
        )
    squares = tokens.unflatten(1, (side // step, step, side // step, step))  # f (rows down) (columns across) c
    order = (0, 3, 1, 2, 4, 5) if turned else (0, 1, 3, 2, 4, 5)
    found: Tensor = squares.permute(*order).flatten(3).flatten(1, 2)
    return found


def require_whole_groups(clip_lengths: Tensor | Sequence[int], group: int) -> None:
    """Refuse clips of several frames that share a merged group of rows with what stands beside them.

    `clip_lengths` are rows of each clip, or (frames, tiles of each frame); a `group` is the rows that are merged together.
    """
    lengths = clip_lengths.tolist() if isinstance(clip_lengths, Tensor) else list(clip_lengths)
    start = 0
    for number, length in enumerate(lengths, 1):
        rows = length[0] * length[1] if isinstance(length, Sequence) else int(length)
        if rows > 1 and (start % group or rows % group):
            raise LayoutError(
                f"clip {number} takes rows {start} to {start + rows - 1}, and tokens of {group} rows are merged at a time, so "
                "that its frames would be mixed with what stands beside it. Fill up each clip with its last frame, and each "
                f"picture with its last tile, to a multiple of {group}, as the processor does."
            )
        start += rows


KEPT_LOGITS = next(
    n for n in ("logits_to_keep", "num_logits_to_keep") if n in signature(LlamaForCausalLM.forward).parameters
)
"""What this release of transformers calls it."""
