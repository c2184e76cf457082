"""Bases that vLLM's attention on a CPU takes (heads of 64), adapters for them, and the same answers by vLLM and by transformers."""

import gc
import json
import re
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tiny_qwen import make_processor

from sta_adapter import STAConfig, inject_sta, load_sta
from sta_adapter.loading import load_model
from sta_adapter.text_positions import use_positions

CLIP = "<|vision_start|><|video_pad|><|vision_end|>"
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
PROMPT = f"<|im_start|>user\n{CLIP}What happens?<|im_end|>\n<|im_start|>assistant\n"
GLM_PROMPT = "<|begin_of_video|><|video|><|end_of_video|>What happens?"
NEW_TOKENS = 8
VISION = {"depth": 2, "num_heads": 2, "patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2}
OF_KIND = {
    "Qwen2VL": {"embed_dim": 128, "hidden_size": 128, "mlp_ratio": 2},
    "Qwen2_5_VL": {
        "hidden_size": 128, "out_hidden_size": 128, "intermediate_size": 128, "window_size": 16,
        "fullatt_block_indexes": [1],
    },
    "Qwen3VL": {
        "hidden_size": 128, "out_hidden_size": 128, "intermediate_size": 128, "deepstack_visual_indexes": [0],
        "num_position_embeddings": 64,
    },
    "Qwen3_5": {"hidden_size": 128, "out_hidden_size": 128, "intermediate_size": 128, "num_position_embeddings": 64},
}  # fmt: skip
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 2,
    "linear_key_head_dim": 64, "linear_value_head_dim": 64,
}  # fmt: skip
TEXT = {
    "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 2048, "tie_word_embeddings": False,
}  # fmt: skip


def clips():
    draw = np.random.default_rng(0)
    drift = draw.integers(-60, 60, (8, 32, 48, 3)).cumsum(0)
    moving = np.clip(draw.integers(0, 255, (1, 32, 48, 3)) + drift, 0, 255).astype(np.uint8)
    return [moving, moving[::-1].copy(), draw.integers(0, 255, (4, 32, 32, 3), dtype=np.uint8)]


def picture():
    return np.random.default_rng(1).integers(0, 255, (32, 32, 3), dtype=np.uint8)


def make_base(folder: Path, kind: str) -> Path:
    """A random base of that kind, drawn wide enough that STA shows, with its processor."""
    import transformers

    processor = _processor(folder, kind)
    convert = processor.tokenizer.convert_tokens_to_ids
    names = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    tokens = {f"{name}_token_id": convert(f"<|{pad}|>") for name, pad in names.items()}
    text = {**TEXT, "vocab_size": len(processor.tokenizer), "bos_token_id": None}
    text["rope_scaling"] = {"rope_type": "default", "type": "mrope", "mrope_section": [8, 12, 12]}
    vision = {**VISION, **OF_KIND[kind]}
    if kind == "Qwen3VL":
        text["rope_scaling"] |= {"type": "default", "mrope_interleaved": True}
    if kind == "Qwen3_5":  # half of each head is rotated
        rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "mrope_interleaved": True, "rope_theta": 10000.0}
        text |= {**LINEAR, "rope_parameters": {**rope, "partial_rotary_factor": 0.5}}
        del text["rope_scaling"]
    if kind.startswith("Qwen3"):
        text = {"text_config": text}
    config = getattr(transformers, f"{kind}Config")(**text, **tokens, vision_config=vision)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.08 if "visual" in name else 0.15)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    processor.tokenizer.chat_template = processor.chat_template
    processor.tokenizer.save_pretrained(folder)
    return folder


def _processor(folder: Path, kind: str):
    import transformers

    made = make_processor(folder)
    if kind == "Qwen2VL":
        return made
    parts = {"image_processor": made.image_processor, "tokenizer": made.tokenizer, "chat_template": made.chat_template}
    video = made.video_processor
    if kind.startswith("Qwen3"):
        kind = "Qwen3VL"  # Qwen3.5 has its processor
        sizes = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
        sizes |= {name: getattr(made.image_processor, name) for name in ("image_mean", "image_std")}  # vLLM has one
        video = transformers.Qwen3VLVideoProcessor(**sizes, size={"shortest_edge": 64, "longest_edge": 100_000})
    return getattr(transformers, f"{kind}Processor")(**parts, video_processor=video)


def make_adapter(folder: Path, base: Path, seed: int = 0, spread: float = 0.05, lora: bool = False, **settings) -> Path:
    """An adapter with random weights for a base, as training saves it."""
    from peft import get_peft_model

    from sta_adapter import get_sta

    model = use_positions(load_model(base, dtype="fp32", device="cpu"))
    torch.manual_seed(seed)
    handle = inject_sta(model, STAConfig(**{"init": "normal", "head_scale": 0.5, **settings}))
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn_like(parameter) * spread)
    if lora:
        wrapped = get_peft_model(handle.model, handle.lora_config())
        handle = get_sta(wrapped)
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn_like(parameter) * 0.05)
    handle.save_pretrained(folder)
    return folder


def with_metadata(frames):
    count = len(frames)
    facts = {"fps": 2.0, "duration": count / 2, "total_num_frames": count, "frames_indices": list(range(count))}
    return frames, {**facts, "video_backend": "opencv", "do_sample_frames": False}


class Engine:
    """An LLM in this process, whose vision embeddings are kept."""

    def __init__(self, base, adapter=None, **options):
        from vllm import LLM

        overrides = options.pop("hf_overrides", {"sta_adapter": str(adapter)} if adapter else {})
        settings = {
            "dtype": "float32", "enforce_eager": True, "max_model_len": 512, "max_num_seqs": 4, "seed": 0,
            "max_num_batched_tokens": 512, "limit_mm_per_prompt": {"image": 2, "video": 2}, "disable_log_stats": True,
        }  # fmt: skip
        self.llm = LLM(model=str(base), hf_overrides=overrides, **{**settings, **options})
        self.embeddings, self.identifiers = [], []
        core = self.llm.llm_engine.engine_core
        add = core.add_request

        def keep_identifiers(request, *args, **kwargs):
            self.identifiers += [feature.identifier for feature in request.mm_features or ()]
            return add(request, *args, **kwargs)

        core.add_request = keep_identifiers
        if "tensor_parallel_size" not in options:
            self.llm.apply_model(self._keep_embeddings)

    def _keep_embeddings(self, model):
        original = model.embed_multimodal

        def embed(**kwargs):
            found = original(**kwargs)
            self.embeddings += [part.float().clone() for part in found]
            return found

        model.embed_multimodal = embed

    def ask(self, prompts, **options):
        """(tokens, logprobs of the likeliest) of each prompt's answer."""
        from vllm import SamplingParams

        how = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, logprobs=3, ignore_eos=True)
        self.embeddings.clear()
        found = self.llm.generate(prompts, how, use_tqdm=False, **options)
        return [
            (list(o.outputs[0].token_ids), [{t: e.logprob for t, e in d.items()} for d in o.outputs[0].logprobs])
            for o in found
        ]

    def close(self):
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()


def clip_prompt(frames, meta=False, text=PROMPT):
    return {"prompt": text, "multi_modal_data": {"video": with_metadata(frames) if meta else frames}}


class Reference:
    """The same by transformers and load_sta, with the text positions that vLLM has."""

    def __init__(self, base, adapter=None):
        from transformers import AutoProcessor

        self.processor = AutoProcessor.from_pretrained(base)
        self.model = use_positions(load_model(base, dtype="fp32", device="cpu"))
        self.text = GLM_PROMPT if "<|video|>" in self.processor.tokenizer.get_vocab() else PROMPT
        self.handle = None
        if adapter is not None:
            self.handle = load_sta(self.model, adapter)
            self.model = self.handle.model

    def inputs(self, text=None, videos=None, images=None):
        given = {} if videos is None else {"videos": [list(v) for v in videos]}
        if videos is not None and type(self.processor).__name__ != "Qwen2VLProcessor":
            facts = [{k: v for k, v in with_metadata(c)[1].items() if k != "do_sample_frames"} for c in videos]
            given |= {"video_metadata": facts, "do_sample_frames": False}
        return self.processor(text=[text or self.text], images=images, **given, return_tensors="pt")

    @torch.no_grad()
    def embeddings(self, frames):
        inputs = self.inputs(videos=[frames])
        inner = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        found = inner.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"])
        deeper = list(getattr(found, "deepstack_features", None) or ())
        found = getattr(found, "pooler_output", found)
        if deeper:  # Qwen3-VL: vLLM has them behind the embeddings
            return torch.cat(
                [
                    torch.cat(list(found)),
                    *(part if torch.is_tensor(part) else torch.cat(list(part)) for part in deeper),
                ],
                dim=-1,
            )
        return torch.cat(list(found)) if isinstance(found, (list, tuple)) else found

    @torch.no_grad()
    def answer(self, inputs):
        out = self.model.generate(
            **inputs, do_sample=False, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, eos_token_id=None,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        tokens = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        return tokens, [logits[0].log_softmax(-1) for logits in out.logits]


def difference(a, b):
    return ((a - b).norm() / b.norm()).item()


def copy_folder(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


def quantize_base(base: Path, folder: Path) -> Path:
    """A copy whose language model has weights in 8 bits, in the format of compressed-tensors."""
    weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False}
    activations = {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    quantization = {
        "quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": ["re:.*visual.*", "lm_head"],
    }  # fmt: skip
    copy_folder(base, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    state = load_file(folder / "model.safetensors")
    for name in [n for n in state if n.endswith("_proj.weight") and "visual" not in n]:
        scale = state[name].abs().amax(1, keepdim=True) / 127
        state[f"{name}_scale"] = scale
        state[name] = (state[name] / scale).round().to(torch.int8)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def make_family_base(folder: Path, name: str) -> Path:
    """A random base of one of the families of tests/tiny_bases.py, with heads of 64 in its language model."""
    import copy

    import tiny_bases

    family = tiny_bases.FAMILIES[name]
    settings = copy.deepcopy(family.settings)
    settings["text_config"].update(TEXT)
    if "out_hidden_size" in settings["vision_config"]:
        settings["vision_config"]["out_hidden_size"] = TEXT["hidden_size"]
    if name.startswith("glm"):  # half of each head is rotated
        rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "partial_rotary_factor": 0.5}
        settings["text_config"] |= {"rope_scaling": rope, "use_qk_norm": False}
    processor = tiny_bases.make_processor(name, folder / "words")
    tiny_bases.FAMILIES[name] = family._replace(settings=settings)
    try:
        model = tiny_bases.make_model(name, processor.tokenizer)
    finally:
        tiny_bases.FAMILIES[name] = family
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    model.save_pretrained(folder)
    if name == "llava_onevision":  # as the published checkpoints call it, which is what vLLM reads
        file = folder / "model.safetensors"
        state = {
            re.sub(r"vision_tower\.(?!vision_model)", "vision_tower.vision_model.", k): v
            for k, v in load_file(file).items()
        }
        save_file(state, file, {"format": "pt"})
    processor.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    if name.startswith("glm"):  # vLLM looks up the published words
        for file in (file for file in folder.iterdir() if file.suffix in (".json", ".jinja")):
            words = file.read_text().replace("<|image_pad|>", "<|image|>").replace("<|video_pad|>", "<|video|>")
            file.write_text(words.replace("'_pad|>", "'|>"))
    return folder
