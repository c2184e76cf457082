"""What STA costs in vLLM on video prompts: time to the first token, and time of many prompts at once.

    python benchmarks/serving.py                                          # a base of Qwen2-VL-2B's widths, made here
    python benchmarks/serving.py --base BASE --adapter ADAPTER --device cuda --engine '{"dtype": "bfloat16"}'

Needs the extras `vllm` and `viz`. Two engines in one process, with STA and without, take turns with the same prompts;
every prompt has a clip of its own, so that no cache helps. Beside the time on the clock stands the CPU time of the
process, in which other programs on the machine show less.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # two engines in one process
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import click
import numpy as np
from common import Report, benchmark_options, synchronize, use_checkout

WIDTHS = {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2}
VISION = {"embed_dim": 1280, "hidden_size": 1536, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14}
SIZES = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}


def make_base(folder: Path, depth: int) -> tuple[str, str]:
    """A random Qwen2-VL of the 2B model's widths, with so many of its 32 blocks and 28 layers, and an adapter for it."""
    import torch
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    from sta_adapter import STAConfig, inject_sta
    from sta_adapter.demo import TINY_BASE
    from sta_adapter.loading import load_processor
    from sta_adapter.text_positions import use_positions

    processor = load_processor(TINY_BASE)
    for part in (processor.image_processor, processor.video_processor):
        for name, value in SIZES.items():
            setattr(part, name, value)
        part.size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
    tokens = processor.tokenizer.convert_tokens_to_ids
    names = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    config = Qwen2VLConfig(
        **WIDTHS,
        num_hidden_layers=depth,
        vocab_size=len(processor.tokenizer),
        rope_scaling={"rope_type": "default", "type": "mrope", "mrope_section": [16, 24, 24]},
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=processor.tokenizer.eos_token_id,
        vision_config={**VISION, "depth": depth, "temporal_patch_size": 2, "spatial_merge_size": 2},
        **{f"{name}_token_id": tokens(f"<|{pad}|>") for name, pad in names.items()},
    )
    torch.manual_seed(0)
    model = use_positions(Qwen2VLForConditionalGeneration(config).eval())
    for part in (model, processor, processor.tokenizer):
        part.save_pretrained(folder / "base")
    inject_sta(model, STAConfig(init="normal")).save_pretrained(folder / "sta")
    return str(folder / "base"), str(folder / "sta")


class Prompts:
    """Clips of noise with a question, each one new.

    Args:
        base: whose processor writes the prompt.
        frames: of each clip.
        size: edge of a frame, in pixels.
    """

    def __init__(self, base: str, frames: int, size: int) -> None:
        from transformers import AutoProcessor

        content = [{"type": "video"}, {"type": "text", "text": "What happens in the video?"}]
        message = [{"role": "user", "content": content}]
        processor = AutoProcessor.from_pretrained(base)
        self.text = processor.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        self.shape = (frames, size, size, 3)
        self.draw = np.random.default_rng(0)

    def take(self, count: int) -> list[dict[str, Any]]:
        """So many new ones."""
        clips = [self.draw.integers(0, 255, self.shape, np.uint8) for _ in range(count)]
        return [{"prompt": self.text, "multi_modal_data": {"video": clip}} for clip in clips]


@click.command()
@benchmark_options
@click.option("--base", help="Its folder or id. [default: made here]")
@click.option("--adapter", help="Its folder or id.")
@click.option("--depth", default=4, show_default=True, help="Blocks and layers of the base that is made here.")
@click.option("--frames", default=8, show_default=True)
@click.option("--size", default=112, show_default=True, help="Edge of a frame, in pixels.")
@click.option("--prompts", default=4, show_default=True, help="At once.")
@click.option("--tokens", default=16, show_default=True, help="Of each answer.")
@click.option("--engine", default="{}", help="JSON, further arguments of vllm.LLM.")
def main(
    device: str,
    repeats: int,
    threads: int | None,
    out: Path,
    base: str | None,
    adapter: str | None,
    depth: int,
    frames: int,
    size: int,
    prompts: int,
    tokens: int,
    engine: str,
) -> None:
    """Measure both engines in turn."""
    os.environ["OMP_NUM_THREADS"] = str(threads or os.cpu_count())
    use_checkout()
    with tempfile.TemporaryDirectory() as folder:
        made = base is None
        if base is None or adapter is None:
            base, adapter = make_base(Path(folder), depth)
        settings = {"dtype": "float32", "max_model_len": 4096, "enforce_eager": device == "cpu"}
        settings |= {"limit_mm_per_prompt": {"video": 1, "image": 0}, **json.loads(engine)}
        found = measure(base, adapter, Prompts(base, frames, size), settings, device, repeats, prompts, tokens)
    what = f"{depth} of 32 blocks, {depth} of 28 layers of Qwen2-VL-2B's widths, random" if made else base
    title = f"Serving by vLLM: {frames} frames of {size} x {size}, {what}, {settings['dtype']}"
    report = Report("serving", title, device, out, settings={"engine": settings}, ratio_label="time / without STA")
    for case in next(iter(found.values())):
        named = {"first": "first token", "all": f"{prompts} prompts, {tokens} tokens each"}[case[0]] + case[1]
        report.add(named, {variant: seconds[case] for variant, seconds in found.items()})
    report.finish()


def measure(
    base: str,
    adapter: str,
    source: Prompts,
    settings: dict[str, Any],
    device: str,
    repeats: int,
    prompts: int,
    tokens: int,
) -> dict[str, dict[tuple[str, str], list[float]]]:
    """Seconds by engine, then by what was asked and which clock ran; the first round is not counted."""
    from vllm import LLM, SamplingParams

    engines = {
        name: LLM(base, hf_overrides={"sta_adapter": adapter} if adapts else {}, **settings)
        for name, adapts in (("without STA", False), ("with STA", True))
    }
    found: dict[str, dict[tuple[str, str], list[float]]] = {name: {} for name in engines}
    for turn in range(repeats + 1):
        for case, count, length in (("first", 1, 1), ("all", prompts, tokens)):
            asked = source.take(count)
            how = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
            for name in engines if turn % 2 else reversed(engines):
                synchronize(device)
                clock, cpu = time.perf_counter(), time.process_time()
                engines[name].generate(asked, how, use_tqdm=False)
                synchronize(device)
                for kind, seconds in ("", time.perf_counter() - clock), (", CPU time", time.process_time() - cpu):
                    if turn:
                        found[name].setdefault((case, kind), []).append(seconds)
    return found


if __name__ == "__main__":
    main()
