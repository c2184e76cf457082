"""InternVideo2-Chat, tiny, in its published layout: configuration, weights by a rule, inputs; and the published code run on them.

`STA_REAL_CODE=FOLDER python tests/internvideo2_chat.py`, with transformers 4.45.2, writes `goldens/internvideo2_chat.safetensors`.
See real_code.py for the folder.
"""

import json
import sys
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

GOLDEN = Path(__file__).parent / "goldens" / "internvideo2_chat.safetensors"
SIDE, QUERIES, NEW_TOKENS = 28, 96, 32
LETTERS = [chr(code) for code in range(32, 127)]
SPECIAL = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
LLM = {
    **{"model_type": "mistral", "architectures": ["MistralForCausalLM"], "vocab_size": len(LETTERS) + len(SPECIAL)},
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8},
    **{"num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None},
    **{"bos_token_id": 1, "eos_token_id": None, "max_position_embeddings": 1024},
}
BERT = {"vocab_size": 20, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
BERT |= {"max_position_embeddings": 32}
VISION = {
    **{"name": "internvideo2-1B", "num_frames": 8, "tubelet_size": 1, "sep_image_video_pos_embed": True},
    **{"x_vis_return_idx": -2, "x_vis_only": True, "vit_add_ln": True, "use_checkpoint": False, "checkpoint_num": 0},
    **{"encoder_embed_dim": 32, "d_model": 32, "pretrained": None},
    **{"embed_dim": 32, "depth": 3, "num_heads": 4, "mlp_ratio": 2, "img_size": SIDE, "patch_size": 14},
}
BRIDGE = {
    **{"name": "qformer", "num_query_token": 32, "extra_num_query_token": 64, "qformer_drop_path_rate": 0.2},
    **{"qformer_attention_probs_dropout_prob": 0.1, "qformer_hidden_dropout_prob": 0.1, "qformer_config": BERT},
}
CONFIG = {
    "architectures": ["InternVideo2_VideoChat2"],
    "auto_map": {
        "AutoConfig": "model_config.VideoChat2Config",
        "AutoModel": "modeling_videochat2.InternVideo2_VideoChat2",
    },
    "model_config": {
        **{"vision_encoder": VISION, "bridge": BRIDGE, "loss": {"use_vision_regression_loss": False}},
        **{"freeze_llm": False, "freeze_bridge": False, "freeze_vision_encoder": False, "use_flash_attention": True},
        "llm": {
            **{"name": "mistral_7b", "pretrained_llm_path": "llm", "use_lora": True},
            **{"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.1},
        },
    },
    "torch_dtype": "float32",
}


def value(name, shape):
    """A weight that its name and shape determine, the same with every release of torch."""
    drawn = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    drawn = torch.from_numpy(drawn)
    if name.endswith((".ls1", ".ls2")):
        return 0.5 + 0.1 * drawn
    if len(shape) == 1:
        return (1.0 if name.endswith("weight") else 0.0) + 0.1 * drawn
    if "embed" in name or "token" in name:
        return 0.5 * drawn
    return drawn / float(np.prod(shape[1:])) ** 0.5


def pixels(name, *shape):
    """Normalised pixels by the same rule."""
    drawn = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    return torch.from_numpy(drawn)


def tokenizer():
    """A tokenizer of letters, which begins a text with <s> as the published one does."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate([*SPECIAL, *LETTERS])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    made.add_special_tokens([AddedToken(word, special=True) for word in SPECIAL])
    made.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )


def read_golden():
    """(shapes of the published weights by name, results of the published code)."""
    with safe_open(GOLDEN, "pt") as file:
        shapes = json.loads(file.metadata()["shapes"])
        return shapes, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def write_folder(folder, shards=2, changes=None):
    """The tiny checkpoint as it would be published: configuration, tokenizer, weights in parts with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "llm").mkdir(exist_ok=True)
    (folder / "llm" / "config.json").write_text(json.dumps(LLM))
    tokenizer().save_pretrained(folder)
    weights = {name: value(name, shape) for name, shape in read_golden()[0].items()}
    weights.update(changes or {})
    names = sorted(weights)
    index = {}
    for part in range(shards):
        file = f"model-{part + 1:05}-of-{shards:05}.safetensors"
        held = names[part * len(names) // shards : (part + 1) * len(names) // shards]
        save_file({name: weights[name].contiguous() for name in held}, folder / file)
        index.update(dict.fromkeys(held, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


QUESTION = "What is shown?"
HISTORY = [("Who?", "A cat.")]
INSTRUCTION = torch.tensor([[3, 7, 5, 9, 4]])
CLIPS = {  # name: (clips, frames)
    **{"one clip of 8": (1, 8), "two clips of 16": (2, 16), "one clip of 64": (1, 64), "one clip of 12": (1, 12)},
    **{"three tiles of 8": (3, 8), "two pictures": (2, 1)},
}


def clips(name):
    """(n, T, 3, H, W)."""
    return pixels(name, *CLIPS[name], 3, SIDE, SIDE)


def write_golden():
    """Run the published code, and keep its numbers."""
    sys.path.insert(0, str(Path(__file__).parent))
    model, shapes = published_with_weights()
    results = dict(results_of(model))
    save_file(results, GOLDEN, {"shapes": json.dumps(shapes)})
    print(f"{len(results)} results, {len(shapes)} weights, {GOLDEN.stat().st_size} bytes")


def published_with_weights():
    """(the published model with the weights of the rule, their shapes by the names that published files have)."""
    model = published()
    renamed = {key: key.replace(".base_layer.", ".") for key in model.state_dict() if not key.endswith("position_ids")}
    shapes = {renamed[key]: list(kept.shape) for key, kept in model.state_dict().items() if key in renamed}
    model.load_state_dict({key: value(name, shapes[name]) for key, name in renamed.items()}, strict=False)
    return model.float().eval(), shapes


def published():
    """The published model, with the tiny sizes in the places where its code has fixed ones."""
    import real_code
    from transformers import BertConfig

    class EasyDict(dict):
        def __init__(self, content):
            super().__init__({k: EasyDict(v) if isinstance(v, dict) else v for k, v in content.items()})

        __getattr__ = dict.__getitem__

    folder = Path("build/tiny-internvideo2-chat-llm")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLM))
    stubs = {"easydict": real_code._module("easydict", EasyDict=EasyDict)}
    with mock.patch.dict(sys.modules, stubs):
        chat = real_code.load("internvideo2_chat", "modeling_videochat2")
    base = chat.BaseMLLM.build_bridge.__globals__
    made_by = "pretrain_internvideo2_giant_patch14_224_clean"
    cls = base[made_by].__globals__["PretrainVisionTransformer_clean"]

    def encoder(config):
        wanted = (
            "embed_dim",
            "depth",
            "num_heads",
            "mlp_ratio",
            "img_size",
            "patch_size",
            "num_frames",
            "tubelet_size",
        )
        wanted += ("sep_image_video_pos_embed", "x_vis_return_idx", "x_vis_only")
        plain = dict.fromkeys(("use_flash_attn", "use_fused_rmsnorm", "use_fused_mlp"), False)
        return cls(**{key: config.vision_encoder[key] for key in wanted}, **plain)

    words = mock.Mock()
    words.from_pretrained.return_value.__len__ = lambda self: BERT["vocab_size"]
    settings = json.loads(json.dumps(CONFIG["model_config"]))
    settings["llm"]["pretrained_llm_path"] = str(folder)
    with (
        mock.patch.dict(base, {made_by: encoder}),
        mock.patch("transformers.BertTokenizer", words),
        mock.patch.object(BertConfig, "from_pretrained", return_value=BertConfig(**BERT)),
    ):
        model = chat.InternVideo2_VideoChat2(base["VideoChat2Config"](model_config=EasyDict(settings)))
    model.project_up = torch.nn.Linear(BERT["hidden_size"], LLM["hidden_size"])  # from 768 there
    model.project_down = torch.nn.Linear(LLM["hidden_size"], BERT["hidden_size"])
    return model


@torch.no_grad()
def results_of(model):
    """Names and tensors: what the language model reads of clips, logits, greedy tokens, answers of `chat`."""
    text, greedy = tokenizer(), {"do_sample": False, "max_new_tokens": NEW_TOKENS, "top_p": None}
    with mock.patch.object(torch.Tensor, "cuda", lambda self: self):  # the published code stretches positions there
        for name in CLIPS:
            yield f"{name}/embeddings", model.project_up(model.encode_vision(clips(name).transpose(1, 2), None))
        told = mock.Mock()
        told.return_value.to.return_value = mock.Mock(
            input_ids=INSTRUCTION.expand(3, -1), attention_mask=torch.ones(3, 5).long()
        )
        model.qformer_tokenizer = told
        tiles = clips("three tiles of 8").transpose(1, 2)
        yield "three tiles of 8/instructed", model.project_up(model.encode_vision(tiles, ["?"] * 3))
        for name in ("one clip of 8", "two clips of 16", "one clip of 64", "three tiles of 8"):
            yield from _forward(model, text, name, greedy)
        yield from _mixed(model, text, greedy)
        for name, kind in (("one clip of 8", "video"), ("two pictures", "image")):
            said = model.chat(
                *(text, "Taken at 1, 2 s. ", QUESTION, kind, clips(name)[0]),
                **{"chat_history": list(HISTORY), "instruction": "Look closely.", "generation_config": greedy},
            )
            yield f"{name}/chat", torch.tensor(list(said.encode()))


def prompts(name):
    """The published conversation about clips, one for each, or one for all tiles."""
    count = CLIPS[name][0]
    shown = "<Video>[<VID_PLH>]</Video>"
    if name == "three tiles of 8":
        return [f"[INST] {shown * count}[/INST] [INST] {QUESTION} [/INST]"]
    return [f"[INST] {shown}[/INST] [INST] {QUESTION}{'?' * row} [/INST]" for row in range(count)]


def _forward(model, text, name, greedy):
    rows = [
        model.build_input_ids(text, prompt, 1024, True, False, padding=False, return_tensors="pt")
        for prompt in prompts(name)
    ]
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(key, fill):
        return torch.stack(
            [torch.nn.functional.pad(row[key], (longest - len(row[key]), 0), value=fill) for row in rows]
        )

    ids, mask, places = padded("input_ids", 0), padded("attention_mask", 0), padded("index", False)
    video = clips(name) if len(rows) > 1 or CLIPS[name][0] == 1 else clips(name)[None]
    yield f"{name}/logits", model(ids, mask, video=video, video_idx=places).logits[:, -6:].clone()
    embeddings = model.pad_text_embeds(ids, video=video, video_idx=places)
    yield f"{name}/tokens", model.lm.generate(inputs_embeds=embeddings, attention_mask=mask, **greedy)


MIXED = (
    "[INST] <Image>[<IMG_PLH>]</Image><Video>[<VID_PLH>]</Video><Image>[<IMG_PLH>]</Image>[/INST] [INST] Which? [/INST]"
)


def _mixed(model, text, greedy):
    """Pictures and a clip in one sample, whose features the published code gives one after the other."""
    row = model.build_input_ids(text, MIXED, 1024, True, False, padding=False, return_tensors="pt")
    ids, places = row["input_ids"][None], row["index"][None]
    seen = [
        model.project_up(model.encode_vision(clips(name).transpose(1, 2), None))
        for name in ("two pictures", "one clip of 8")
    ]
    embeddings = model.lm.get_input_embeddings()(ids)
    embeddings[places] = torch.cat([seen[0][0], seen[1][0], seen[0][1]])
    mask = torch.ones_like(ids)
    yield "mixed/logits", model.lm(inputs_embeds=embeddings, attention_mask=mask).logits[:, -6:].clone()
    yield "mixed/tokens", model.lm.generate(inputs_embeds=embeddings, attention_mask=mask, **greedy)


if __name__ == "__main__":
    write_golden()
