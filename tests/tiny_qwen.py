"""A tiny random Qwen2-VL with its processor, and clips on disk, for the tests of data, training and evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

SPECIAL = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|image_pad|>", "<|video_pad|>"),
]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}{{ '<|vision_start|><|' + part['type'] + '_pad|><|vision_end|>' }}{% endif %}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tokenizer(folder: Path):
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2TokenizerFast

    letters = sorted(ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate(letters)}
    merges = []
    for word in ("left", "right", "up", "down"):  # one token each
        done = word[0]
        for letter in word[1:]:
            merges.append(f"{done} {letter}")
            done += letter
            vocab.setdefault(done, len(vocab))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(dict.fromkeys(merges)) + "\n")
    tokenizer = Qwen2TokenizerFast.from_pretrained(
        str(folder), eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token=None
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[1:]})
    return tokenizer


def make_processor(folder: Path):
    import transformers
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor

    sizes = {"min_pixels": 64, "max_pixels": 4096, "patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
    parts = {"image_processor": Qwen2VLImageProcessor(**sizes), "tokenizer": make_tokenizer(folder)}
    if hasattr(transformers, "Qwen2VLVideoProcessor"):
        parts["video_processor"] = transformers.Qwen2VLVideoProcessor(**sizes)
    return Qwen2VLProcessor(**parts, chat_template=CHATML)


def make_model(tokenizer, seed: int = 0):
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    ids = {token.strip("<|>"): tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    config = Qwen2VLConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_scaling={"type": "mrope", "mrope_section": [2, 1, 1]},
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=ids["endoftext"],
        eos_token_id=ids["im_end"],
        pad_token_id=ids["endoftext"],
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        vision_config={
            "depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2,
            "patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2, "in_channels": 3, "in_chans": 3,
        },
    )  # fmt: skip
    torch.manual_seed(seed)
    model = Qwen2VLForConditionalGeneration(config).eval()
    model.lm_head.weight.data *= 25  # so that a few steps make a difference
    model.generation_config.eos_token_id = ids["im_end"]
    model.generation_config.pad_token_id = ids["endoftext"]
    return model


def save_base(path: Path, processor, seed: int = 0) -> Path:
    """A base model in a folder, as `load_model` and `load_processor` take it."""
    make_model(processor.tokenizer, seed).save_pretrained(path)
    processor.save_pretrained(path)
    processor.tokenizer.chat_template = processor.chat_template
    processor.tokenizer.save_pretrained(path)
    return path


def write_video(path: Path, frames: np.ndarray, fps: int = 8) -> Path:
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "1"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv444p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
    return path


def moving_square(label: str, start: int = 0, size: int = 16, count: int = 8) -> np.ndarray:
    frames = np.zeros((count, size, size, 3), np.uint8)
    for index in range(count):
        step = index if label == "right" else count - 1 - index
        frames[index, 4 + start % 8 : 8 + start % 8, step + 1 : step + 5] = (250, 250 - 20 * start, 30 * start % 250)
    return frames


def write_samples(folder: Path, count: int = 8) -> Path:
    """Clips that move left or right, with the file that describes them."""
    lines = []
    for index in range(count):
        label = ("left", "right")[index % 2]
        write_video(folder / f"{index}.mp4", moving_square(label, index))
        user = [{"type": "video", "video": f"{index}.mp4", "nframes": 4}, {"type": "text", "text": "Which way?"}]
        messages = [{"role": "user", "content": user}, {"role": "assistant", "content": label}]
        lines.append(json.dumps({"messages": messages, "category": label}))
    file = folder / "data.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file
