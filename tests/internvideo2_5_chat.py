"""Tiny InternVideo2.5-Chat: the published layout's configuration, weights, words and prompts, the same on every machine.

`goldens/internvideo2_5_chat.safetensors` holds what the published code made of them; run this file to make it again:

    STA_REAL_CODE=FOLDER python tests/internvideo2_5_chat.py

with transformers 4.45.2 and the published files, see real_code.py.
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

GOLDENS = Path(__file__).parent / "goldens" / "internvideo2_5_chat.safetensors"
ADDED = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"]
UNK, BOS, EOS, START, END, IMG, IMG_END, CONTEXT = range(8)
VOCAB = len(ADDED) + 256
VISION = {
    **{"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 48},
    **{"image_size": 112, "patch_size": 14, "qkv_bias": True, "qk_normalization": False, "norm_type": "layer_norm"},
    **{"drop_path_rate": 0.0, "layer_norm_eps": 1e-6, "hidden_act": "gelu", "use_flash_attn": False},
}
LANGUAGE = {
    **{"architectures": ["InternLM2ForCausalLM"], "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48},
    **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "bias": False, "hidden_act": "silu"},
    **{"pad_token_id": EOS, "bos_token_id": BOS, "eos_token_id": EOS, "rope_theta": 1000000, "rms_norm_eps": 1e-5},
    **{"max_position_embeddings": 512, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
}
CONFIG = {
    "architectures": ["InternVLChatModel"],
    "auto_map": {
        "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
        "AutoModel": "modeling_internvl_chat_hico2.InternVLChatModel",
    },
    "model_type": "internvl_chat",
    **{"template": "internvl2_5", "ps_version": "v2", "downsample_ratio": 0.5, "select_layer": -1},
    **{"min_dynamic_patch": 1, "max_dynamic_patch": 6, "use_thumbnail": True, "dynamic_image_size": True},
    "torch_dtype": "float32",
    "vision_config": VISION,
    "llm_config": LANGUAGE,
}
ROW_TOKENS, GROUP = 2, 4
"""Visual tokens of a row, and rows that are merged together; the tokens of a group are merged in three steps, 64 to 8."""
FRAME = [70, 71, IMG, *[CONTEXT] * ROW_TOKENS, IMG_END, 72]
QUESTION = [*range(100, 112)]


def clip(frames):
    return FRAME * frames


def picture(rows):
    return [IMG, *[CONTEXT] * ROW_TOKENS * rows, IMG_END, 72]


CASES = {
    "one_clip": (8, [clip(8)]),
    "long_clip": (64, [clip(64)]),  # more positions than the language model was made for
    "two_clips": (12, [[*clip(8), *clip(4)]]),
    "clip_and_pictures": (16, [[*clip(8), *picture(4), 90, *picture(4)]]),
    "batch": (12, [clip(8), clip(4)]),
}
"""Rows of pixels, and the prompts of each sample but for the words around them."""


def prompts(case):
    """`input_ids` and `attention_mask` of a case, filled up on the left."""
    rows = [[BOS, START, 80, *prompt, *QUESTION, END] for prompt in CASES[case][1]]
    width = max(map(len, rows))
    ids = torch.tensor([[EOS] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def pixels(count, seed=0):
    return numbers(f"pixels{seed}", (count, 3, 112, 112))


def numbers(name, shape):
    """Normal numbers that no release draws otherwise."""
    seed = sum(ord(letter) * (place + 1) for place, letter in enumerate(name)) % 2**32
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def weights(shapes):
    """Weights by their published names, for a mapping from names to shapes."""
    made = {}
    for name, shape in shapes.items():
        drawn = numbers(name, tuple(shape))
        is_norm = len(shape) == 1 and name.endswith("weight")
        made[name] = 1 + 0.2 * drawn if is_norm else 0.1 * drawn if len(shape) == 1 else drawn / shape[-1] ** 0.5
        if name.endswith((".ls1", ".ls2")):
            made[name] = 0.5 + 0.1 * drawn
    made["language_model.output.weight"] *= 3
    return made


def tokenizer():
    """A tokenizer of bytes, with the model's special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {text: number for number, text in enumerate([*ADDED, *(f"<0x{byte:02X}>" for byte in range(256))])}
    core = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("▁", " ")])
    core.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in ADDED])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    ends = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    made = PreTrainedTokenizerFast(tokenizer_object=core, **ends, clean_up_tokenization_spaces=False)
    made.add_special_tokens({"additional_special_tokens": ADDED[3:]})
    return made


def shapes():
    """Shapes of the published weights, by name."""
    vision, language = VISION, LANGUAGE
    wide, width = vision["hidden_size"], language["hidden_size"]
    inner, heads = language["intermediate_size"], language["num_attention_heads"]
    qkv = (heads + 2 * language["num_key_value_heads"]) * width // heads
    found = {
        "vision_model.embeddings.class_embedding": (1, 1, wide),
        "vision_model.embeddings.patch_embedding.weight": (wide, 3, 14, 14),
        "vision_model.embeddings.patch_embedding.bias": (wide,),
        "vision_model.embeddings.position_embedding": (1, 65, wide),
        "language_model.model.tok_embeddings.weight": (VOCAB, width),
        "language_model.model.norm.weight": (width,),
        "language_model.output.weight": (VOCAB, width),
        **{f"mlp1.0.{part}": (4 * wide,) for part in ("weight", "bias")},
        **{"mlp1.1.weight": (width, 4 * wide), "mlp1.1.bias": (width,)},
        **{"mlp1.3.weight": (width, width), "mlp1.3.bias": (width,)},
    }
    for index in range(vision["num_hidden_layers"]):
        at, mlp = f"vision_model.encoder.layers.{index}", vision["intermediate_size"]
        linear = {
            "attn.qkv": (3 * wide, wide),
            "attn.proj": (wide, wide),
            "mlp.fc1": (mlp, wide),
            "mlp.fc2": (wide, mlp),
        }
        for name, shape in linear.items():
            found |= {f"{at}.{name}.weight": shape, f"{at}.{name}.bias": shape[:1]}
        found |= {f"{at}.{norm}.{part}": (wide,) for norm in ("norm1", "norm2") for part in ("weight", "bias")}
        found |= {f"{at}.{scale}": (wide,) for scale in ("ls1", "ls2")}
    for index in range(language["num_hidden_layers"]):
        at = f"language_model.model.layers.{index}"
        linear = {"attention.wqkv": (qkv, width), "attention.wo": (width, width)}
        linear |= {f"feed_forward.{name}": (inner, width) for name in ("w1", "w3")}
        linear |= {"feed_forward.w2": (width, inner)}
        found |= {f"{at}.{name}.weight": shape for name, shape in linear.items()}
        found |= {f"{at}.{norm}.weight": (width,) for norm in ("attention_norm", "ffn_norm")}
    return found


def save_published(folder, *, with_tokenizer=True, **changed):
    """A folder with the published layout: config.json, weights in two files with an index, and a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changed}))
    made, index = weights(shapes()), {}
    for number, part in enumerate(("vision_model", ""), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        names = [name for name in made if name.startswith("vision_model") == bool(part)]
        save_file({name: made[name] for name in names}, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(names, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    if with_tokenizer:
        tokenizer().save_pretrained(folder)
    return folder


def tiny(model):
    """A tiny model merges to fewer tokens than the published one, which has that number in its code."""
    model.num_tome_tokens, model.num_image_token = GROUP * ROW_TOKENS, ROW_TOKENS
    if hasattr(model.config, "num_tome_tokens"):
        model.config.num_tome_tokens = GROUP * ROW_TOKENS
    model.img_context_token_id = CONTEXT
    return model


def published(fresh_config=CONFIG):
    """The published model with the tiny weights; each time a new one, as its rotary frequencies keep what they have seen."""
    from real_code import load

    files = load("internvideo2_5", "modeling_internvl_chat_hico2")
    known = {key: value for key, value in fresh_config.items() if key not in ("model_type", "auto_map")}
    model = files.InternVLChatModel(files.InternVLChatConfig(**json.loads(json.dumps(known))), use_flash_attn=False)
    found = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert fresh_config is not CONFIG or found == shapes()
    model.load_state_dict(weights(found))
    return tiny(model.eval())


LABELS = "".join(f"Frame{number}: <image>\n" for number in range(1, 9))
CHATS = {
    "chat": ([1] * 8, [LABELS + "Which way?"]),
    "chat_without_labels": ([8], ["Which way?"]),
    "batch_chat": ([8, 4], ["Which way?", "<image>\nWhat falls?"]),
}
"""`num_patches_list` and questions of `chat` and `batch_chat`."""
OPTIONS = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}


def run_chat(model, words, name):
    """Answers of a chat, the tokens of the prompt that it was made of, and those of the answers."""
    counts, questions = CHATS[name]
    seen, inner = [], type(model).generate
    rows = pixels(sum(counts), seed=1)

    def generate(**arguments):
        out = inner(model, **arguments)
        seen.extend([arguments["input_ids"], out[:, -OPTIONS["max_new_tokens"] :]])
        return out

    model.generate = generate
    if name == "batch_chat":
        said = model.batch_chat(words, rows, questions, dict(OPTIONS), num_patches_list=counts)
    else:
        said = [model.chat(words, rows, questions[0], dict(OPTIONS), num_patches_list=counts)]
    del model.generate
    return said, *seen


def make_goldens():
    import torch.distributed as dist

    dist.get_rank = lambda: 0  # its forward prints on the first process
    found, words = {}, tokenizer()
    for case, (count, _) in CASES.items():
        ids, mask = prompts(case)
        rows = pixels(count)
        with torch.no_grad():
            found[f"{case}.features"] = published().extract_feature(rows)
            out = published()(rows, ids, mask, image_flags=torch.ones(count, 1, dtype=torch.long), labels=ids)
        found[f"{case}.logits"] = out.logits[:, ::7].contiguous()
        found[f"{case}.loss"] = out.loss
        options = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False, "pad_token_id": EOS}
        found[f"{case}.tokens"] = published().generate(rows, ids, mask, eos_token_id=END, **options)
    answers = {}
    for name in CHATS:
        said, found[f"{name}.input_ids"], found[f"{name}.tokens"] = run_chat(published(), words, name)
        answers[name] = json.dumps(said)
    save_file({name: value.contiguous() for name, value in found.items()}, GOLDENS, metadata=answers)
    print(GOLDENS, {name: tuple(value.shape) for name, value in found.items()}, answers)


if __name__ == "__main__":
    make_goldens()
