"""InternVideo's chat models in their full size with random weights: are they loaded within the size of their weights?

    python tests/full_size_chat.py internvideo2_5 FOLDER    # or internvideo2; 16 GB on the disk, 24 GB of memory

writes a checkpoint in the published layout and names, loads it in bf16 on the CPU in a process of its own, gives it STA, and
with `--ask` asks it about a clip. Run by hand: it takes minutes. What is printed is the most memory that the process held of its own
while loading, beside the size of the weights (pages of the files, which the system takes back at will, aren't counted).
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import internvideo2_5_chat
import internvideo2_chat
import torch
from safetensors.torch import save_file

from sta_adapter import inject_sta
from sta_adapter.internvideo import builder_of
from sta_adapter.internvideo.v2_5_config import read_config
from sta_adapter.internvideo.v2_5_loading import convert
from sta_adapter.internvideo.v2_config import LORA_TARGETS
from sta_adapter.internvideo.v2_loading import model_weights
from sta_adapter.loading import load_model

SHARD = 2 * 2**30  # bytes of a file of weights
LORA_RANK = 16
INTERNVIT = {"hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 24, "intermediate_size": 4096}
INTERNLM2 = {
    **{"vocab_size": 92553, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    **{"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768},
}


def internvideo2_5():
    """(config.json, published shapes of the tiny model, published to our names)."""
    tiny = internvideo2_5_chat
    vision = {**tiny.VISION, **INTERNVIT, "image_size": 448}
    config = {**tiny.CONFIG, "vision_config": vision, "llm_config": {**tiny.LANGUAGE, **INTERNLM2}}
    tiny_text = read_config(tiny.CONFIG).text_config
    return config, tiny.shapes(), lambda weights: convert(weights, tiny_text)


def internvideo2():
    """The same for InternVideo2-Chat: an encoder of 1B, a Q-Former as bert-base and Mistral-7B with LoRA of rank 16."""
    tiny = internvideo2_chat
    known = json.loads(json.dumps(tiny.CONFIG["model_config"]))
    vision = {key: known["vision_encoder"][key] for key in ("name", "num_frames", "tubelet_size", "x_vis_return_idx")}
    known["vision_encoder"] = {**vision, "sep_image_video_pos_embed": True, "vit_add_ln": True}
    known["bridge"].pop("qformer_config")
    known["llm"] = {"name": "mistral_7b", "use_lora": True, "lora_r": LORA_RANK, "lora_alpha": 2 * LORA_RANK}
    return {**tiny.CONFIG, "model_config": known}, tiny.read_golden()[0], lambda weights: model_weights(weights, None)


def full_shapes(config, tiny_shapes, to_ours):
    """Published names and full-size shapes, from our model of the configuration and the names of the tiny checkpoint."""
    patterns = {}
    for published, shape in tiny_shapes.items():
        for ours, _ in to_ours([(published, torch.empty(shape, device="meta"))]):
            patterns[layerless(ours)] = layerless(published)
    with torch.device("meta"):
        model = builder_of(config).empty_model(config)
    found = {}
    for ours, value in model.state_dict().items():
        numbers = iter(re.findall(r"\.(\d+)(?=\.)", ours))
        published = re.sub(r"\*", lambda _, left=numbers: next(left), patterns[layerless(ours)])
        rows = found.get(published, (0,))[0] + value.shape[0]  # queries, keys and values in one
        found[published] = (rows, *value.shape[1:])
        layer = published.removesuffix(".weight")
        if layer.startswith("lm.base_model") and layer.endswith(LORA_TARGETS):
            found[f"{layer}.lora_A.default.weight"] = (LORA_RANK, value.shape[1])
            found[f"{layer}.lora_B.default.weight"] = (rows, LORA_RANK)
    return found


def layerless(name):
    return re.sub(r"\.\d+(?=\.)", ".*", name)


def write(name, folder):
    """Make the checkpoint, a file at a time."""
    config, tiny_shapes, to_ours = {"internvideo2_5": internvideo2_5, "internvideo2": internvideo2}[name]()
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16"}))
    (internvideo2_5_chat if name == "internvideo2_5" else internvideo2_chat).tokenizer().save_pretrained(folder)
    index, held, number = {}, {}, 0
    shapes = full_shapes(config, tiny_shapes, to_ours)
    for last, (published, shape) in enumerate(shapes.items(), 1 - len(shapes)):
        drawn = torch.randn(shape, dtype=torch.bfloat16)
        held[published] = 1 + 0.02 * drawn if "norm" in published.lower() and len(shape) == 1 else 0.02 * drawn
        if last == 0 or sum(tensor.nbytes for tensor in held.values()) > SHARD:
            number += 1
            save_file(held, folder / f"model-{number:05}.safetensors")
            index.update(dict.fromkeys(held, f"model-{number:05}.safetensors"))
            held = {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def load(folder, ask):
    """Load, measure and ask."""
    stop, held = threading.Event(), []

    def watch():
        while not stop.wait(0.02):
            held.append(own_memory())

    before, began = own_memory(), time.monotonic()
    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load_model(folder, dtype="bf16", device="cpu")
    stop.set()
    watcher.join()
    weights = sum(value.nbytes for value in (*model.parameters(), *model.buffers()))
    print(
        f"loaded in {time.monotonic() - began:.0f} s: {sum(p.numel() for p in model.parameters()) / 1e9:.2f} G parameters"
    )
    print(
        f"weights {weights / 2**30:.2f} GiB, held at most {(max(held) - before) / 2**30:.2f} GiB while loading, ",
        end="",
    )
    print(f"{(max(held) - before) / weights:.3f} of the weights")
    handle = inject_sta(model)
    print(f"with STA: {sum(p.numel() for p in handle.parameters()) / 1e6:.0f} M more")
    if ask:
        began = time.monotonic()
        print(f"it answers {answer(model)!r} in {time.monotonic() - began:.0f} s")


def answer(model):
    """Four tokens about a clip of 8 frames."""
    options = {"max_new_tokens": 4, "do_sample": False}
    if hasattr(model, "batch_chat"):
        pixels = torch.randn(8, 3, 448, 448, dtype=torch.bfloat16)
        question = "".join(f"Frame{number}: <image>\n" for number in range(1, 9)) + "Which way?"
        return model.chat(internvideo2_5_chat.tokenizer(), pixels, question, options, num_patches_list=[1] * 8)
    frames = torch.randn(8, 3, 224, 224, dtype=torch.bfloat16)
    return model.chat(internvideo2_chat.tokenizer(), "", "Which way?", "video", frames, generation_config=options)


def own_memory():
    """Bytes of this process that belong to no file."""
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=("internvideo2_5", "internvideo2", "load"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ask", action="store_true")
    args = parser.parse_args()
    if args.name == "load":
        return load(args.folder, args.ask)
    args.folder.mkdir(parents=True)
    try:
        write(args.name, args.folder)
        subprocess.run([sys.executable, __file__, "load", str(args.folder), *["--ask"] * args.ask], check=True)
    finally:
        shutil.rmtree(args.folder)


if __name__ == "__main__":
    main()
