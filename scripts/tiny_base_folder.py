"""The files of the tiny base beside its weights: config, tokenizer, chat template, picture and clip processor."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>")
SPECIAL += ("<|image_pad|>", "<|video_pad|>")
TOKEN_IDS = {token: i for i, token in enumerate(SPECIAL)}
VOCABULARY = 512
PATCH = 8
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

MODEL = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "model_type": "qwen2_vl",
    "text_positions": "rows-and-columns",  # transformers 5's rule, by which it was trained
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    # The heads are so small that rows and columns get the low frequencies; a small base lets them be told apart.
    "rope_theta": 4.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 2,
    "tie_word_embeddings": False,
    "use_cache": True,
    "torch_dtype": "float32",
    "bos_token_id": TOKEN_IDS["<|endoftext|>"],
    "eos_token_id": TOKEN_IDS["<|im_end|>"],
    "pad_token_id": TOKEN_IDS["<|endoftext|>"],
    "vision_start_token_id": TOKEN_IDS["<|vision_start|>"],
    "vision_end_token_id": TOKEN_IDS["<|vision_end|>"],
    "vision_token_id": TOKEN_IDS["<|vision_pad|>"],
    "image_token_id": TOKEN_IDS["<|image_pad|>"],
    "video_token_id": TOKEN_IDS["<|video_pad|>"],
    "vision_config": {
        "model_type": "qwen2_vl",
        "depth": 4,
        "embed_dim": 48,
        "hidden_size": 64,
        "hidden_act": "quick_gelu",
        "mlp_ratio": 4,
        "num_heads": 3,
        "in_channels": 3,
        "in_chans": 3,
        "patch_size": PATCH,
        "spatial_patch_size": PATCH,
        "spatial_merge_size": 2,
        "temporal_patch_size": 1,
    },
}
PROCESSOR = {
    "processor_class": "Qwen2VLProcessor",
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
    "rescale_factor": 1 / 255,
    "resample": 3,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "min_pixels": 16 * 16,
    "max_pixels": 32 * 32,
    "size": {"shortest_edge": 16 * 16, "longest_edge": 32 * 32},
    "patch_size": PATCH,
    "temporal_patch_size": 1,
    "merge_size": 2,
}
TOKENIZER = {
    "tokenizer_class": "Qwen2Tokenizer",
    "processor_class": "Qwen2VLProcessor",
    "add_prefix_space": False,
    "additional_special_tokens": list(SPECIAL[1:]),
    "bos_token": None,
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "unk_token": None,
    "clean_up_tokenization_spaces": False,
    "errors": "replace",
    "model_max_length": 4096,
    "split_special_tokens": False,
    "chat_template": CHAT_TEMPLATE,
}


def write_json(path: Path, value: dict) -> None:
    """Write JSON that reads well in a diff."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def train_tokenizer(sentences: Iterable[str]) -> Tokenizer:
    """Byte-level BPE, so that it can spell anything, whose merges make one token of each word in the sentences."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, spell])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=list(SPECIAL), initial_alphabet=alphabet)
    tokenizer.train_from_iterator(sentences, trainer)
    return tokenizer


def write_files(folder: Path, sentences: Iterable[str]) -> None:
    """Write everything but the weights, in forms that transformers 4.45 to 5 read alike."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(sentences)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))  # vocab.json and merges.txt
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    added = {str(i): {"content": token, **flags} for token, i in TOKEN_IDS.items()}
    write_json(folder / "tokenizer_config.json", {"added_tokens_decoder": added, **TOKENIZER})
    write_json(folder / "chat_template.json", {"chat_template": CHAT_TEMPLATE})
    write_json(folder / "preprocessor_config.json", {"image_processor_type": "Qwen2VLImageProcessor", **PROCESSOR})
    video = {"video_processor_type": "Qwen2VLVideoProcessor", **PROCESSOR}
    write_json(folder / "video_preprocessor_config.json", video)
    write_json(folder / "config.json", MODEL)
    ends = {name: MODEL[f"{name}_token_id"] for name in ("bos", "eos", "pad")}
    write_json(folder / "generation_config.json", {f"{k}_token_id": v for k, v in ends.items()} | {"do_sample": False})
