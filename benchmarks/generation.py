"""Generation by the full Qwen2-VL of random weights behind one clip: the prompt alone, and the prompt with tokens behind it.

STA works in the prompt's forward and never again, so that the longer the answer, the less it adds. On a GPU the sizes
are those of the 2B model in bfloat16; on the CPU a tiny model shows that it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from common import Report, benchmark_options, set_threads
from towers import FULL_DEPTH, HEADS, WIDTH, dtype_of, with_sta

SPECIAL = {"image_token_id": 150, "video_token_id": 151, "vision_start_token_id": 152, "vision_end_token_id": 153}


def full_model(device: str, depth: int, *, tiny: bool) -> Any:
    """Qwen2-VL with its language model."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    hidden, layers, heads, section = (64, 2, 4, [2, 3, 3]) if tiny else (1536, 28, 12, [16, 24, 24])
    width, vision_heads = (64, 4) if tiny else (WIDTH, HEADS)
    text = {"vocab_size": 160 if tiny else 151936, "hidden_size": hidden, "intermediate_size": 6 * hidden}
    text |= {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": 2}
    text |= {"rope_scaling": {"type": "mrope", "mrope_section": section}, "tie_word_embeddings": True}
    vision = {"depth": depth, "embed_dim": width, "hidden_size": hidden, "num_heads": vision_heads, "mlp_ratio": 4}
    config = Qwen2VLConfig(**text, **SPECIAL, eos_token_id=2, pad_token_id=0, vision_config=vision)
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2VLForConditionalGeneration(config)
    return model.to(dtype_of(device)).eval()


def prompt(model: Any, batch: int, clip: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    """`batch` prompts of one clip each."""
    parameter, config = next(model.parameters()), model.config.vision_config
    frames, rows, columns = clip
    row = [152, *[151] * (frames * rows * columns // config.spatial_merge_size**2), 153, 5, 6, 7]
    size = config.in_channels * config.temporal_patch_size * config.patch_size**2
    ids = torch.tensor([row] * batch, device=parameter.device)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": torch.where(ids == SPECIAL["video_token_id"], 2, 0),
        "pixel_values_videos": torch.randn(batch * frames * rows * columns, size).to(parameter),
        "video_grid_thw": torch.tensor([clip] * batch, device=parameter.device),
    }


def generate(model: Any, arguments: dict[str, torch.Tensor], tokens: int) -> Callable[[], torch.Tensor]:
    """Just so many tokens, greedily."""

    def run() -> torch.Tensor:
        with torch.no_grad():
            return model.generate(**arguments, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens)

    return run


@click.command(help=__doc__)
@benchmark_options
@click.option("--depth", type=int, help="Blocks of the encoder. [default: 2 on the CPU, 32 on a GPU]")
@click.option("--tokens", default=32, show_default=True, help="Of the longer answer.")
def main(device: str, repeats: int, threads: int | None, out: Path, depth: int | None, tokens: int) -> None:
    """Measure one prompt and several at once."""
    set_threads(threads)
    big = device == "cuda"
    untouched = full_model(device, depth or (FULL_DEPTH if big else 2), tiny=not big)
    models = {"untouched": untouched, "STA": with_sta(untouched)}
    clip = (8, 16, 16) if big else (4, 4, 4)
    title = f"Generation, Qwen2-VL of {'2B sizes' if big else 'tiny sizes'}, {dtype_of(device)}, clip {'x'.join(map(str, clip))}"
    report = Report("generation", title, device, out, settings={"clip": clip}, ratio_label="time / untouched model")
    for batch in (1, 8) if big else (1,):
        arguments = prompt(untouched, batch, clip)
        for count in (1, tokens):
            calls = {name: generate(model, arguments, count) for name, model in models.items()}
            report.measure(f"{batch} prompts, {count} tokens", calls, repeats=repeats)
    report.finish()


if __name__ == "__main__":
    main()
