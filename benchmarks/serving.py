"""What STA costs in vLLM: throughput and time to first token on video prompts, as a ratio to the same engine without.

    python benchmarks/serving.py BASE ADAPTER [--frames 8 --size 224 --prompts 32 --device-options '{"dtype": "bfloat16"}']

Needs the extra `vllm`. Each engine runs in a process of its own; every prompt has a clip of its own, so that no cache helps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

import numpy as np


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Seconds to the first token (median), and tokens a second with all prompts at once."""
    from transformers import AutoProcessor
    from vllm import LLM, SamplingParams

    processor = AutoProcessor.from_pretrained(options.base)
    content = [{"type": "video"}, {"type": "text", "text": "What happens in the video?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    overrides = {"sta_adapter": options.adapter} if options.adapter != "none" else {}
    llm = LLM(options.base, hf_overrides=overrides, **json.loads(options.device_options))
    draw = np.random.default_rng(0)

    def prompts(count: int) -> list[dict[str, object]]:
        shape = (count, options.frames, options.size, options.size, 3)
        return [
            {"prompt": text, "multi_modal_data": {"video": clip}} for clip in draw.integers(0, 255, shape, np.uint8)
        ]

    first, whole = (SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (1, options.tokens))
    llm.generate(prompts(2), whole, use_tqdm=False)
    waits = []
    for prompt in prompts(options.prompts):
        start = time.perf_counter()
        llm.generate([prompt], first, use_tqdm=False)
        waits.append(time.perf_counter() - start)
    start = time.perf_counter()
    llm.generate(prompts(options.prompts), whole, use_tqdm=False)
    rate = options.prompts * options.tokens / (time.perf_counter() - start)
    return {"first_token_s": statistics.median(waits), "tokens_per_s": rate}


def main() -> None:
    """Measure both engines and print the ratios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("base")
    parser.add_argument("adapter")
    for name, default in {"frames": 8, "size": 224, "prompts": 32, "tokens": 32}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device-options", default="{}", help="JSON, further arguments of vllm.LLM")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print("RESULT", json.dumps(measure(options)))
        return
    found = {}
    for name, adapter in (("without", "none"), ("with STA", options.adapter)):
        words = [sys.argv[0], options.base, adapter, *sys.argv[3:], "--one"]
        done = subprocess.run([sys.executable, *words], check=True, capture_output=True, text=True)
        line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
        found[name] = json.loads(line.removeprefix("RESULT"))
        print(f"{name:10}", found[name])
    before, after = found["without"], found["with STA"]
    print(f"time to first token: {after['first_token_s'] / before['first_token_s']:.2f} of the engine without STA")
    print(f"throughput: {after['tokens_per_s'] / before['tokens_per_s']:.2f}")


if __name__ == "__main__":
    main()
