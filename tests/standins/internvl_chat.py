"""Stand-in of InternVideo2.5-Chat: InternViT with frames as its batch, and the chat model with its four ways in."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from standins.internvideo2 import DropPath, Mlp


class InternVisionEmbeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.side = config.image_size // config.patch_size
        self.class_embedding = nn.Parameter(torch.randn(1, 1, config.hidden_size))
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, config.patch_size, config.patch_size)
        self.position_embedding = nn.Parameter(torch.randn(1, self.side**2 + 1, config.hidden_size))

    def forward(self, pixel_values):
        patches = self.patch_embedding(pixel_values)
        grid = self.position_embedding[:, 1:].unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
        grid = F.interpolate(grid.float(), size=patches.shape[2:], mode="bicubic", align_corners=False).to(grid.dtype)
        classes = (self.class_embedding + self.position_embedding[:, :1]).expand(len(patches), -1, -1)
        return torch.cat([classes, (patches + grid).flatten(2).transpose(1, 2)], dim=1)


class InternAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class InternVisionEncoderLayer(nn.Module):
    def __init__(self, config, drop_path_rate):
        super().__init__()
        self.attn = InternAttention(config)
        self.mlp = Mlp(config.hidden_size, config.intermediate_size)
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.ls1 = nn.Parameter(config.initializer_factor * torch.ones(config.hidden_size))
        self.ls2 = nn.Parameter(config.initializer_factor * torch.ones(config.hidden_size))
        self.drop_path1 = DropPath(drop_path_rate) if drop_path_rate > 0 else nn.Identity()
        self.drop_path2 = DropPath(drop_path_rate) if drop_path_rate > 0 else nn.Identity()

    def forward(self, hidden_states):
        hidden_states = hidden_states + self.drop_path1(self.attn(self.norm1(hidden_states)) * self.ls1)
        return hidden_states + self.drop_path2(self.mlp(self.norm2(hidden_states)) * self.ls2)


class InternVisionEncoder(nn.Module):
    """Checkpoints its layers in training, as the published one does unless told otherwise."""

    def __init__(self, config):
        super().__init__()
        rates = torch.linspace(0, config.drop_path_rate, config.num_hidden_layers).tolist()
        self.layers = nn.ModuleList(InternVisionEncoderLayer(config, rate) for rate in rates)
        self.gradient_checkpointing = True
        self.use_reentrant = True

    def forward(self, inputs_embeds):
        states = [inputs_embeds]
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                states.append(checkpoint(layer, states[-1], use_reentrant=self.use_reentrant))
            else:
                states.append(layer(states[-1]))
        return states


class InternVisionModel(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        defaults = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 48}
        defaults |= {"image_size": 8, "patch_size": 4, "qkv_bias": True, "layer_norm_eps": 1e-6}
        defaults |= {"initializer_factor": 0.1, "drop_path_rate": 0.0}
        self.config = PretrainedConfig(**{**defaults, **settings})
        self.embeddings = InternVisionEmbeddings(self.config)
        self.encoder = InternVisionEncoder(self.config)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs):
        """By the name of transformers."""
        self.encoder.gradient_checkpointing = True
        self.encoder.use_reentrant = gradient_checkpointing_kwargs["use_reentrant"]

    def forward(self, pixel_values=None, output_hidden_states=None, return_dict=None, pixel_embeds=None):
        states = self.encoder(self.embeddings(pixel_values) if pixel_embeds is None else pixel_embeds)
        states, last = tuple(states), states[-1]
        return BaseModelOutputWithPooling(last_hidden_state=last, pooler_output=last[:, 0], hidden_states=states)


class Tokenizer:
    """A tokenizer of few words: the image tokens have ids of their own, any other word is an id from 3 to 59."""

    special = ("<IMG_CONTEXT>", "<img>", "</img>")

    def convert_tokens_to_ids(self, token):
        return 60 + self.special.index(token)

    def __call__(self, texts):
        for token in self.special:
            texts = [text.replace(token, f" {token} ") for text in texts]
        ids = [[self._id(word) for word in text.split()] for text in texts]
        width = max(map(len, ids))
        padded = [[0] * (width - len(row)) + row for row in ids]
        return torch.tensor(padded), torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])

    def _id(self, word):
        return self.convert_tokens_to_ids(word) if word in self.special else 3 + sum(map(ord, word)) % 57


class InternVLChatModel(nn.Module):
    """The chat model: rows of pixels become image tokens of a tiny language model's prompt."""

    def __init__(self, **vision):
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        self.vision_model = InternVisionModel(**vision)
        width = self.vision_model.config.hidden_size
        self.num_image_token = self.vision_model.embeddings.side**2 // 4
        self.img_context_token_id = None
        sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
        ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        self.language_model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, **ends))
        self.mlp1 = nn.Sequential(nn.LayerNorm(4 * width), nn.Linear(4 * width, 32), nn.GELU(), nn.Linear(32, 32))

    def extract_feature(self, pixel_values):
        tokens = self.vision_model(pixel_values=pixel_values, return_dict=True).last_hidden_state[:, 1:]
        rows, count, width = tokens.shape
        half = int(count**0.5) // 2
        tokens = tokens.view(rows, half, 2, half, 2, width).permute(0, 1, 3, 2, 4, 5)
        return self.mlp1(tokens.reshape(rows, half * half, 4 * width))

    def _embeddings(self, pixel_values, input_ids, image_flags=None):
        embeddings = self.language_model.get_input_embeddings()(input_ids).clone()
        if pixel_values is not None:
            features = self.extract_feature(pixel_values)
            if image_flags is not None:
                features = features[image_flags.squeeze(-1) == 1]
            embeddings[input_ids == self.img_context_token_id] = features.flatten(0, 1)
        return embeddings

    def forward(self, pixel_values, input_ids=None, attention_mask=None, image_flags=None):
        embeddings = self._embeddings(pixel_values, input_ids, image_flags)
        return self.language_model(inputs_embeds=embeddings, attention_mask=attention_mask)

    @torch.no_grad()
    def generate(self, pixel_values=None, input_ids=None, attention_mask=None, visual_features=None, **options):
        embeddings = self._embeddings(pixel_values, input_ids)
        return self.language_model.generate(inputs_embeds=embeddings, attention_mask=attention_mask, **options)

    def _answer(self, tokenizer, pixel_values, prompts, generation_config):
        self.img_context_token_id = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
        ids, mask = tokenizer(prompts)
        return self.generate(pixel_values=pixel_values, input_ids=ids, attention_mask=mask, **generation_config)

    def _filled(self, prompt, counts):
        for count in counts:
            tokens = "<IMG_CONTEXT>" * (self.num_image_token * count)
            prompt = prompt.replace("<image>", f"<img>{tokens}</img>", 1)
        return prompt

    def chat(self, tokenizer, pixel_values, question, generation_config, history=None, num_patches_list=None):
        if history is None and pixel_values is not None and "<image>" not in question:
            question = "<image>\n" + question
        if num_patches_list is None:
            num_patches_list = [] if pixel_values is None else [len(pixel_values)]
        prompt = "\n".join([*(text for turn in history or [] for text in turn), question])
        return self._answer(tokenizer, pixel_values, [self._filled(prompt, num_patches_list)], generation_config)

    def batch_chat(self, tokenizer, pixel_values, questions, generation_config, num_patches_list=None):
        prompts = []
        for count, question in zip(num_patches_list, questions, strict=True):
            question = question if "<image>" in question or not count else "<image>\n" + question
            prompts.append(self._filled(question, [count]))
        return self._answer(tokenizer, pixel_values, prompts, generation_config)
